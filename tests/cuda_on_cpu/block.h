// The threads of the block that runs, and who of them goes next.
#pragma once
#include <exception>
#include <memory>

#include "emulator.h"
#include "fiber.h"

namespace fusedmoe::cuda_on_cpu {

// Marsaglia's xorshift64*: the schedules of a seed are the same everywhere.
class Draws {
 public:
  explicit Draws(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 | 1) {}
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1d >> 16;
  }
  unsigned below(unsigned count) { return unsigned(next() % count); }

 private:
  uint64_t state_;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, given;
};

struct Thread {
  Fiber fiber;
  std::vector<Copy> copies;    // on their way, in the order they were asked for
  std::vector<size_t> groups;  // where each committed group ends in `copies`
};

struct Warp {
  // One bit a lane. A lane that is in none of them is at the block's barrier.
  uint32_t ready = 0, arrived = 0, finished = 0;
  uint64_t priority = 0;
  // What the arrived lanes do together.
  const Together* operation = nullptr;
  Site site;
  void* brought[warp_size];
  // What happens before a barrier must not seem to happen before the one that precedes it, for a
  // thread that has yet to leave that one. So phases take turns with two objects; nobody is two
  // phases behind.
  unsigned phase = 0;
  char order[2];
};

class Block {
 public:
  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void set_up(const char* kernel, int threads, size_t shared_bytes, const std::function<void()>& body);
  void run(Index at, Draws* draws);

  void sync(Site site);
  void together(const Together& operation, Site site, void* brought);
  // Somebody else may go on here.
  void switch_point();
  Thread& current() { return threads_[running.thread]; }
  std::string where(Site site) const;
  bool has_shared(const void* first, size_t bytes) const;

 private:
  static void entry();
  void give_up();
  void poison_shared();
  void check_guards();
  void check_copies();
  Warp& warp_of(int thread) { return warps_[thread / warp_size]; }
  static uint32_t bit_of(int thread) { return uint32_t(1) << thread % warp_size; }
  std::string names_of(const Warp& warp, uint32_t lanes) const;
  void draw_priorities();
  int next_thread();
  void go_to(int thread);
  void yield();
  void finish();

  const char* kernel_ = "";
  const std::function<void()>* body_ = nullptr;
  int count_ = 0, finished_ = 0, waiting_ = 0;
  size_t shared_bytes_ = 0;
  std::vector<Warp> warps_;
  std::unique_ptr<Thread[]> threads_;
  Fiber caller_;
  Draws* draws_ = nullptr;
  bool restless_ = false;
  std::exception_ptr failure_;
  // The block's barrier.
  Site barrier_;
  int first_waiting_ = 0;
  unsigned phase_ = 0;
  char order_[2];
  // What was done before the block happened before what its threads do, and that before what
  // follows.
  char began_, ended_;
  // [guard, shared memory, guard], and a stack for every thread there may be.
  char *memory_, *stacks_;
};

}  // namespace fusedmoe::cuda_on_cpu
