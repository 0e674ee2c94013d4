// A CUDA device that runs on one thread of the processor: blocks one after another, each block's
// threads as fibers that take turns.
//
// It is there to find what tests on a real device may miss. Threads switch only where CUDA's memory
// model lets another one be seen, in an order drawn from a seed; asynchronous copies arrive as late
// or as early as they may; shared memory has exactly the size asked for and starts as NaN; whatever
// CUDA leaves undefined that can be seen here is an Error, which names the kernel, block, thread
// and line.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedmoe::cuda_on_cpu {

constexpr int warp_size = 32, most_threads = 1024;
// What a block may have on sm_90 and sm_100, the most there is.
constexpr size_t most_shared_bytes = 227 * 1024;

// A line of a kernel.
struct Site {
  const char* file = "";
  unsigned line = 0;
};

struct Settings {
  // 0: threads go in order, each as far as it can. Otherwise who goes next, and the order of the
  // blocks, are drawn.
  uint64_t seed = 0;
  // Copies arrive at once, which shows who still reads what they overwrite; otherwise when they are
  // waited for, which shows who does not wait.
  bool eager = false;
};
// What the next launch goes by. At first from FUSEDMOE_CUDA_SEED (a number) and
// FUSEDMOE_CUDA_COPIES (lazy or eager).
Settings& settings();

// What was done since the program began, or since somebody put it to zero. Bytes are those of
// global memory; load_matrices waits once more for every row of a matrix that lies in the same
// banks as another one.
struct Counts {
  uint64_t launches, blocks, barriers, matrix_products, bytes_read, bytes_written, bank_conflicts;
};
Counts& counts();

// Global memory that kernels may touch through load_global, store_global and copy_async of
// csrc/cuda/device.h. As soon as one region is named any access outside of them all is an Error,
// and so is one to what another block of the launch has written: blocks run in any order; one that
// arrives at a number sees what others stored before they arrived there.
struct Region {
  std::string name;
  const void* first;
  size_t bytes;
  bool written_to;  // may be
  uint64_t bytes_read = 0, bytes_written = 0;
  // For every two bytes the turn in which somebody wrote there last. A block's turn ends, and its
  // next one begins, where it arrives at a number.
  std::vector<uint64_t> writers = {};
};
std::vector<Region>& regions();

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Run `body` in every thread of every block. Raises: Error.
void run(const char* kernel, Index grid, int threads, size_t shared_bytes, const std::function<void()>& body);

// What follows is for the emulated operations, in a thread of a kernel.
struct Running {
  int thread = 0;
  Index block, grid;
  char* shared = nullptr;
};
extern Running running;

[[noreturn]] void fail(Site site, const std::string& message);

void sync_block(Site site);

// What the 32 threads of a warp do together. The last one to arrive calls `act` with what all of
// them brought.
struct Together {
  const char* name;
  void (*act)(void* const (&brought)[warp_size]);
  bool orders_memory = false;  // as __syncwarp does, and no other
  bool counts_as_product = false;
};
void together(const Together& operation, Site site, void* brought);

// Add 1 and return what it was. What the block has stored so far may be seen by a block that comes
// to this number later.
int arrive(int* counter, Site site);

// `given` of `bytes` bytes from global memory, and zeros for the rest.
void copy_async(void* to, const void* from, int bytes, int given, Site site);
void commit_copies();
void wait_copies(size_t but);

// Raise Error unless shared memory has these bytes, at a multiple of their number.
void check_shared(const void* first, size_t bytes, const char* what, Site site);
// Raise Error unless global memory may be read or written so; count the bytes.
void touch_global(const void* first, size_t bytes, size_t alignment, bool write, Site site);

}  // namespace fusedmoe::cuda_on_cpu
