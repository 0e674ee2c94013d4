#include "recycle.h"

#include <bit>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedmoe {
namespace {

// Four sizes to every doubling: batches that vary a little share their blocks, and the pages beyond what is asked for are never touched.
constexpr int sizes_per_doubling = 4;

struct Pool {
  std::mutex mutex;
  std::vector<Block*> free[64 * sizes_per_doubling];
  size_t bytes = 0;
};

// Never destroyed: tensors may die after the statics do.
Pool& pool() {
  static Pool& pool = *new Pool;
  return pool;
}

// The size of block for so many bytes: its free list, and how many bytes it has.
std::pair<int, size_t> size_of(size_t bytes) {
  if (bytes <= smallest_block) return {0, smallest_block};
  const int doubling = std::bit_width((bytes - 1) / smallest_block) - 1;
  const size_t base = smallest_block << doubling, step = base / sizes_per_doubling;
  const size_t steps = (bytes - base + step - 1) / step;
  return {doubling * sizes_per_doubling + int(steps), base + steps * step};
}

void release(Block* block) {
  std::free(block->memory);
  delete block;
}

}  // namespace

// Neither waits for another thread: where the list is in use, the system's allocator serves. A child that was forked while a thread
// of its parent was in here would wait for ever.
Block* take_block(size_t bytes) {
  const auto [kind, size] = size_of(bytes);
  Pool& p = pool();
  if (std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock); lock && !p.free[kind].empty()) {
    Block* block = p.free[kind].back();
    p.free[kind].pop_back();
    p.bytes -= size;
    block->holders.store(1, std::memory_order_relaxed);
    return block;
  }
  char* memory = static_cast<char*>(std::aligned_alloc(block_alignment, size));
  if (!memory) throw std::runtime_error("cpu backend: expected " + std::to_string(size) + " bytes of memory for results, got none");
  return new Block{memory, size, kind, 1};
}

void drop_block(Block* block) {
  if (block->holders.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  Pool& p = pool();
  std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock || block->bytes > most_free) {
    release(block);
    return;
  }
  if (p.bytes + block->bytes > most_free) {
    for (auto& list : p.free) {
      for (Block* other : list) release(other);
      list.clear();
    }
    p.bytes = 0;
  }
  p.free[block->kind].push_back(block);
  p.bytes += block->bytes;
}

size_t free_bytes() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return p.bytes;
}

}  // namespace fusedmoe
