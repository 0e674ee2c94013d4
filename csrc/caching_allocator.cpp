#include "caching_allocator.h"

#include <bit>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedmoe {
namespace {

// Four sizes to every doubling: batches that vary a little share their blocks, and the pages beyond
// what is asked for are never touched.
constexpr int sizes_per_doubling = 4;

struct Pool {
  std::mutex mutex;
  std::vector<Slab*> free[64 * sizes_per_doubling];
  size_t bytes = 0;
};

// Never destroyed: tensors may die after the statics do.
Pool& pool() {
  static Pool& pool = *new Pool;
  return pool;
}

// The size of block for so many bytes: its free list, and how many bytes it has.
std::pair<int, size_t> size_of(size_t bytes) {
  if (bytes <= smallest_slab) return {0, smallest_slab};
  const int doubling = std::bit_width((bytes - 1) / smallest_slab) - 1;
  const size_t base = smallest_slab << doubling, step = base / sizes_per_doubling;
  const size_t steps = (bytes - base + step - 1) / step;
  return {doubling * sizes_per_doubling + int(steps), base + steps * step};
}

void release(Slab* slab) {
  std::free(slab->memory);
  delete slab;
}

}  // namespace

// Neither waits for another thread: where the list is in use, the system's allocator serves. A
// child that was forked while a thread of its parent was in here would wait for ever.
Slab* take_slab(size_t bytes) {
  const auto [kind, size] = size_of(bytes);
  Pool& p = pool();
  if (std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock); lock && !p.free[kind].empty()) {
    Slab* slab = p.free[kind].back();
    p.free[kind].pop_back();
    p.bytes -= size;
    slab->holders.store(1, std::memory_order_relaxed);
    return slab;
  }
  char* memory = static_cast<char*>(std::aligned_alloc(slab_alignment, size));
  if (!memory)
    throw std::runtime_error("cpu backend: expected " + std::to_string(size) +
                             " bytes of memory for results, got none");
  return new Slab{memory, size, kind, 1};
}

void drop_slab(Slab* slab) {
  if (slab->holders.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  Pool& p = pool();
  std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock || slab->bytes > most_free) {
    release(slab);
    return;
  }
  if (p.bytes + slab->bytes > most_free) {
    for (auto& list : p.free) {
      for (Slab* other : list) release(other);
      list.clear();
    }
    p.bytes = 0;
  }
  p.free[slab->kind].push_back(slab);
  p.bytes += slab->bytes;
}

size_t free_bytes() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return p.bytes;
}

}  // namespace fusedmoe
