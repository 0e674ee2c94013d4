// Memory that outlives its tensors: slabs that go back to a free list when the last tensor in them
// dies, so that a step of training finds the pages of the step before instead of asking the system
// for fresh ones.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fusedmoe {

// The smallest slab. Tensors that fit share one; a larger tensor has one of its own, up to a
// quarter larger. So whoever keeps a small gradient keeps at most this much memory besides.
constexpr size_t smallest_slab = size_t(64) << 10;
// The most that lies free, all threads together: the saved activations of AdaTT T3m2 at 16,000 rows.
// What comes back beyond it sends everything else that is free back to the system, so sizes that
// are no longer asked for do not stay.
constexpr size_t most_free = size_t(256) << 20;
// Of a slab and of every tensor in it: a cache line, and the longest vector.
constexpr size_t slab_alignment = 64;

struct Slab {
  char* memory;
  size_t bytes;
  int kind;  // the free list it belongs to
  // Tensors in it, and whoever is still filling it.
  std::atomic<int64_t> holders;
};

// A slab of at least so many bytes, held once. Throws std::runtime_error if the system has none.
Slab* take_slab(size_t bytes);
// Let go of it once; the last one that does hands it back.
void drop_slab(Slab* block);

// Bytes that lie free now.
size_t free_bytes();

}  // namespace fusedmoe
