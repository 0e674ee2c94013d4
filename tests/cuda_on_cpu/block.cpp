#include "block.h"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstring>
#include <new>
#include <utility>

namespace fusedmoe::cuda_on_cpu {
namespace {

// Frames of a kernel and of a sanitizer; what is not touched takes no memory.
constexpr size_t stack_bytes = 256 * 1024;
// Every bit set is NaN in every floating-point type, and -1.
constexpr unsigned char nan_byte = 0xff;
// In front of shared memory and behind it. Not a multiple of 256, so that nobody gets a better
// alignment than the 128 bytes promised.
constexpr size_t guard_bytes = 1024 + 128;

size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }

std::string lines(Site site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

char* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

Block* block = nullptr;

}  // namespace

Block::Block() : threads_(new Thread[most_threads]) {
  block = this;
  memory_ = map(most_shared_bytes + 2 * guard_bytes);
  stacks_ = map(most_threads * stack_bytes);
}

Block::~Block() {
  give_up();
  permit(memory_, most_shared_bytes + 2 * guard_bytes);
  permit(stacks_, most_threads * stack_bytes);
  munmap(memory_, most_shared_bytes + 2 * guard_bytes);
  munmap(stacks_, most_threads * stack_bytes);
}

void Block::give_up() {
  for (int i = 0; i < most_threads; i++)
    if (threads_[i].fiber.started()) threads_[i].fiber.stop(&ended_);
}

// Threads that returned from one kernel wait where they are for the next.
void Block::set_up(const char* kernel, int threads, size_t shared_bytes, const std::function<void()>& body) {
  Unwatched books;
  kernel_ = kernel;
  body_ = &body;
  count_ = threads;
  shared_bytes_ = shared_bytes;
  warps_.resize(size_t(threads) / warp_size);
  for (int i = 0; i < count_; i++) {
    if (threads_[i].fiber.started()) continue;
    // Below every stack a page that stops whoever overflows it.
    char* stack = stacks_ + size_t(i) * stack_bytes;
    if (mprotect(stack, page(), PROT_NONE)) throw std::bad_alloc();
    threads_[i].fiber.start(stack + page(), stack_bytes - page(), &Block::entry);
  }
}

void Block::poison_shared() {
  const size_t all = shared_bytes_ + 2 * guard_bytes;
  running.shared = memory_ + guard_bytes;
  permit(memory_, most_shared_bytes + 2 * guard_bytes);
  std::memset(memory_, nan_byte, all);
  forbid(memory_, guard_bytes);
  forbid(running.shared + shared_bytes_, guard_bytes);
}

void Block::check_guards() {
  permit(memory_, shared_bytes_ + 2 * guard_bytes);
  for (size_t i = 0; i < shared_bytes_ + 2 * guard_bytes; i++) {
    const bool before = i < guard_bytes;
    if (!before && i < guard_bytes + shared_bytes_) continue;
    if (static_cast<unsigned char>(memory_[i]) == nan_byte) continue;
    const size_t distance = before ? guard_bytes - i : i - guard_bytes - shared_bytes_;
    throw Error(std::string(kernel_) + ": expected writes inside the " + std::to_string(shared_bytes_) +
                " bytes of shared memory, got one " + std::to_string(distance) + " bytes " +
                (before ? "in front of" : "behind") + " them");
  }
}

void Block::check_copies() {
  const Thread& thread = current();
  const size_t committed = thread.groups.empty() ? 0 : thread.groups.back();
  if (committed < thread.copies.size())
    fail({}, "expected copies to be committed before the thread returns, got some that never are");
  // Groups without copies are how a pipeline runs dry.
  if (!thread.copies.empty())
    fail({}, "expected copies to be waited for before the thread returns, got some that never are");
}

void Block::run(Index at, Draws* draws) {
  Unwatched books;
  running.block = at;
  poison_shared();
  caller_.become_caller();
  draws_ = draws;
  finished_ = waiting_ = 0;
  for (Warp& warp : warps_) {
    warp.ready = ~uint32_t(0);
    warp.arrived = warp.finished = 0;
  }
  draw_priorities();
  for (int i = 0; i < count_; i++) {
    threads_[i].copies.clear();
    threads_[i].groups.clear();
  }
  running.thread = draws ? next_thread() : 0;
  released(&began_);
  caller_.switch_to(current().fiber);
  if (failure_) give_up();
  acquired(&ended_);
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  check_guards();
}

// One turn for every block.
void Block::entry() {
  Fiber::entered();
  for (;;) {
    acquired(&block->began_);
    try {
      (*block->body_)();
      block->finish();
    } catch (...) {
      Unwatched books;
      block->failure_ = std::current_exception();
    }
    released(&block->ended_);
    Unwatched books;
    Thread& self = block->current();
    const int next = block->failure_ || block->finished_ == block->count_ ? -1 : block->next_thread();
    if (next >= 0) running.thread = next;
    self.fiber.switch_to(next < 0 ? block->caller_ : block->threads_[next].fiber);
  }
}

// By order the next one that is ready; by draw any lane of the ready warp with the highest
// priority, so that one warp runs far ahead of the others and another one lags.
int Block::next_thread() {
  const int count = int(warps_.size());
  if (draws_) {
    int best = -1;
    for (int i = 0; i < count; i++)
      if (warps_[i].ready && (best < 0 || warps_[i].priority > warps_[best].priority)) best = i;
    if (best < 0) return -1;
    // The first one from a lane that is drawn.
    const int start = int(draws_->below(warp_size));
    return best * warp_size + (start + std::countr_zero(std::rotr(warps_[best].ready, start))) % warp_size;
  }
  const int warp = running.thread / warp_size;
  const uint32_t later = ~(bit_of(running.thread) | (bit_of(running.thread) - 1));
  if (const uint32_t lanes = warps_[warp].ready & later) return warp * warp_size + std::countr_zero(lanes);
  for (int i = 1; i <= count; i++) {
    const int other = (warp + i) % count;
    if (const uint32_t lanes = warps_[other].ready) return other * warp_size + std::countr_zero(lanes);
  }
  return -1;
}

// Until the next barrier. Half of the time they change at every switch point, so that all warps
// come along together.
void Block::draw_priorities() {
  if (!draws_) return;
  for (Warp& warp : warps_) warp.priority = draws_->next();
  restless_ = draws_->below(2);
}

void Block::go_to(int next) {
  Thread& from = current();
  running.thread = next;
  from.fiber.switch_to(current().fiber);
}

void Block::yield() {
  const int next = next_thread();
  if (next < 0) fail({}, "expected a thread that can go on, got none");
  if (next != running.thread) go_to(next);
}

void Block::switch_point() {
  Unwatched books;
  if (!draws_ || draws_->below(4)) return;
  if (restless_) warp_of(running.thread).priority = draws_->next();
  yield();
}

std::string Block::where(Site site) const {
  const Index& b = running.block;
  const std::string at = site.line ? ", " + lines(site) : "";
  return std::string(kernel_) + ", block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " +
         std::to_string(b.z) + "), thread " + std::to_string(running.thread) + at;
}

// The first of these lanes, as a thread.
std::string Block::names_of(const Warp& warp, uint32_t lanes) const {
  return "thread " + std::to_string((&warp - warps_.data()) * warp_size + std::countr_zero(lanes));
}

void Block::sync(Site site) {
  Unwatched books;
  Warp& warp = warp_of(running.thread);
  if (finished_)
    fail(site, "early return: expected every thread at the barrier, got " + std::to_string(finished_) +
                   " that returned before it");
  if (warp.arrived)
    fail(site, std::string("divergent warp: expected the whole warp at ") + warp.operation->name + " (" +
                   lines(warp.site) + "), where " + names_of(warp, warp.arrived) + " waits, got a thread at a barrier");
  if (waiting_ && !same(barrier_, site))
    fail(site, "divergent barrier: expected every thread at one barrier, got thread " + std::to_string(first_waiting_) +
                   " at " + lines(barrier_));
  if (!waiting_) barrier_ = site, first_waiting_ = running.thread;
  char& order = order_[phase_ % 2];
  released(&order);
  if (++waiting_ == count_) {
    waiting_ = 0;
    phase_++;
    counts().barriers++;
    for (Warp& each : warps_) each.ready = ~uint32_t(0);
    draw_priorities();
  } else {
    warp.ready &= ~bit_of(running.thread);
  }
  if (waiting_ || draws_) yield();
  acquired(&order);
}

void Block::together(const Together& operation, Site site, void* brought) {
  Unwatched books;
  Warp& warp = warp_of(running.thread);
  const uint32_t self = bit_of(running.thread), at_barrier = ~(warp.ready | warp.arrived | warp.finished);
  const std::string whole =
      at_barrier || warp.finished ? std::string("expected the whole warp at ") + operation.name : "";
  if (warp.finished)
    fail(site, "early return: " + whole + ", got " + names_of(warp, warp.finished) + ", which returned before it");
  if (at_barrier)
    fail(site,
         "divergent warp: " + whole + ", got " + names_of(warp, at_barrier) + " at the barrier of " + lines(barrier_));
  if (warp.arrived && (warp.operation != &operation || !same(warp.site, site)))
    fail(site, std::string("divergent warp: expected the whole warp at ") + warp.operation->name + " (" +
                   lines(warp.site) + "), where " + names_of(warp, warp.arrived) + " waits, got a thread at " +
                   operation.name);
  warp.operation = &operation;
  warp.site = site;
  warp.brought[running.thread % warp_size] = brought;
  warp.arrived |= self;
  warp.ready &= ~self;
  char& order = warp.order[warp.phase % 2];
  if (operation.orders_memory) released(&order);
  if (warp.arrived == ~uint32_t(0)) {
    if (operation.act) operation.act(warp.brought);
    if (operation.counts_as_product) counts().matrix_products++;
    if (operation.orders_memory) warp.phase++;
    warp.arrived = 0;
    warp.ready = ~uint32_t(0);
    if (draws_) yield();
  } else {
    yield();
  }
  if (operation.orders_memory) acquired(&order);
}

void Block::finish() {
  Unwatched books;
  Warp& warp = warp_of(running.thread);
  if (waiting_)
    fail(barrier_,
         "early return: expected every thread at the barrier, got one that returned before it, while thread " +
             std::to_string(first_waiting_) + " waits");
  if (warp.arrived)
    fail(warp.site, std::string("early return: expected the whole warp at ") + warp.operation->name + ", where " +
                        names_of(warp, warp.arrived) + " waits, got a thread that returned before it");
  check_copies();
  warp.ready &= ~bit_of(running.thread);
  warp.finished |= bit_of(running.thread);
  finished_++;
}

bool Block::has_shared(const void* first, size_t bytes) const {
  const char* at = static_cast<const char*>(first);
  return at >= running.shared && bytes <= shared_bytes_ && at <= running.shared + shared_bytes_ - bytes;
}

}  // namespace fusedmoe::cuda_on_cpu
