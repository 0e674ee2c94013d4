// Contexts that take turns on one thread of the operating system, and what the sanitizers must be
// told about them.
#pragma once
#include <cstddef>

namespace fusedmoe::cuda_on_cpu {

// ThreadSanitizer (TSan) sees every fiber as a thread of its own. A switch orders nothing for it:
// only what `released` and `acquired` say.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The context that calls.
  void become_caller();
  // One that will run `entry`, which never returns, on this stack.
  void start(char* stack, size_t bytes, void (*entry)());
  bool started() const { return at_; }
  // Give it up, wherever it is, so that it can start anew; what it did happened before what follows
  // `acquired(end)`.
  void stop(void* end);

  // Go on with `next` until something switches back. The caller is Unwatched, once, which the fiber
  // is not while it does not run.
  void switch_to(Fiber& next);
  // The first call in `entry`.
  static void entered();

 private:
  void* at_ = nullptr;  // its stack pointer, or what else names where it goes on
  char* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* thread_ = nullptr;      // ThreadSanitizer's
};

// What happened before `released(object)` happened before what follows `acquired(object)`.
void released(void* object);
void acquired(void* object);

// Hides from TSan what the emulator does to its own books: no thread of a kernel sees them.
class Unwatched {
 public:
  Unwatched();
  ~Unwatched();
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// `bytes` that may not be touched, for AddressSanitizer; and again may be.
void forbid(void* first, size_t bytes);
void permit(void* first, size_t bytes);

}  // namespace fusedmoe::cuda_on_cpu
