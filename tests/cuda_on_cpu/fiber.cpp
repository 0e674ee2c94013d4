#include "fiber.h"

#include <pthread.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
// A function that changes the thread under TSan's feet must not tell it about its own entry and
// exit.
#define FUSEDMOE_UNSEEN __attribute__((no_sanitize("thread"), noinline))

static void unwatch() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
static void watch_again() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
#define FUSEDMOE_UNSEEN
#endif

// swapcontext enters the kernel to save the signal mask, which takes thirty times as long as these
// twelve moves.
#if defined(__x86_64__) && !defined(FUSEDMOE_UCONTEXT)
extern "C" void fusedmoe_switch(void** from, void* to);
asm(R"(
.text
.type fusedmoe_switch, @function
fusedmoe_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusedmoe_switch, . - fusedmoe_switch
)");
#else
#include <ucontext.h>

FUSEDMOE_UNSEEN static void fusedmoe_switch(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
#endif

namespace fusedmoe::cuda_on_cpu {

void Fiber::become_caller() {
  pthread_attr_t attributes;
  void* stack = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes)) std::abort();
  pthread_attr_getstack(&attributes, &stack, &bytes_);
  pthread_attr_destroy(&attributes);
  stack_ = static_cast<char*>(stack);
#if defined(__SANITIZE_THREAD__)
  thread_ = __tsan_get_current_fiber();
#endif
}

void Fiber::start(char* stack, size_t bytes, void (*entry)()) {
  stack_ = stack;
  bytes_ = bytes;
  fake_stack_ = nullptr;
  // Frames that were given up have left their marks.
  permit(stack, bytes);
#if defined(__x86_64__) && !defined(FUSEDMOE_UCONTEXT)
  // Six registers, where to return to, and an end for whoever walks the stack; aligned as behind a
  // call.
  void** top = reinterpret_cast<void**>(stack + bytes) - 8;
  std::memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(entry);
  at_ = top;
#else
  // It lies at the lower end of the stack, which grows towards it.
  ucontext_t* context = reinterpret_cast<ucontext_t*>(stack);
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof *context;
  context->uc_stack.ss_size = bytes - sizeof *context;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  at_ = context;
#endif
#if defined(__SANITIZE_THREAD__)
  thread_ = __tsan_create_fiber(0);
#endif
}

FUSEDMOE_UNSEEN void Fiber::stop([[maybe_unused]] void* end) {
#if defined(__SANITIZE_THREAD__)
  // It cannot say so itself.
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
  __tsan_release(end);
  __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
  __tsan_destroy_fiber(thread_);
  thread_ = nullptr;
#endif
  at_ = nullptr;
}

FUSEDMOE_UNSEEN void Fiber::switch_to(Fiber& next) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, next.bytes_);
#endif
#if defined(__SANITIZE_THREAD__)
  // TSan calls it an error if a thread ends unwatched, and this one may be given up.
  watch_again();
  __tsan_switch_to_fiber(next.thread_, __tsan_switch_to_fiber_no_sync);
#endif
  fusedmoe_switch(&at_, next.at_);
#if defined(__SANITIZE_THREAD__)
  unwatch();
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

#if defined(__SANITIZE_THREAD__)
void released(void* object) { __tsan_release(object); }
void acquired(void* object) { __tsan_acquire(object); }
Unwatched::Unwatched() { unwatch(); }
Unwatched::~Unwatched() { watch_again(); }
#else
void released(void*) {}
void acquired(void*) {}
Unwatched::Unwatched() {}
Unwatched::~Unwatched() {}
#endif

#if defined(__SANITIZE_ADDRESS__)
void forbid(void* first, size_t bytes) { __asan_poison_memory_region(first, bytes); }
void permit(void* first, size_t bytes) { __asan_unpoison_memory_region(first, bytes); }
#else
void forbid(void*, size_t) {}
void permit(void*, size_t) {}
#endif

}  // namespace fusedmoe::cuda_on_cpu
