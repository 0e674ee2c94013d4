// csrc/cuda/device.h and launch.h for a compiler of the processor: CUDA's words, and every
// operation as the emulator does it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "cuda/launch.h"
#include "emulator.h"
#include "floats.h"
#include "fragments.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace fusedmoe::cuda_on_cpu {

// Where an operation stands in a kernel.
using Here = std::source_location;
inline Site site(const Here& here) { return {here.file_name(), here.line()}; }

template <class T>
struct Shuffle {
  T x;
  int from;

  static void act(void* const (&brought)[warp_size]) {
    T all[warp_size];
    for (int i = 0; i < warp_size; i++) all[i] = static_cast<Shuffle*>(brought[i])->x;
    for (void* lane : brought) {
      Shuffle* self = static_cast<Shuffle*>(lane);
      self->x = all[self->from];
    }
  }
};

template <class T>
inline T shuffle_from(T x, int lane, const Together& operation, Site at) {
  static_assert(sizeof(T) == 4);
  Shuffle<T> self{x, lane};
  together(operation, at, &self);
  return self.x;
}

// Each lane brings one row, and gets a word of each matrix.
template <int N, bool TRANSPOSED>
struct Matrices {
  uint16_t row[8];
  uint32_t (&to)[N];
  uintptr_t at;

  // A matrix comes in one go if its rows, of 16 bytes, lie in different groups of four banks, or
  // are the same.
  static void count_conflicts(void* const (&brought)[warp_size]) {
    for (int matrix = 0; matrix < N; matrix++) {
      int rows[8] = {}, most = 0;
      for (int row = 0; row < 8; row++) {
        const auto line = [&](int i) { return static_cast<const Matrices*>(brought[8 * matrix + i])->at / 16; };
        bool again = false;
        for (int before = 0; before < row; before++) again |= line(before) == line(row);
        most = std::max(most, again ? 0 : ++rows[line(row) % 8]);
      }
      counts().bank_conflicts += uint64_t(most - 1);
    }
  }

  static void act(void* const (&brought)[warp_size]) {
    count_conflicts(brought);
    for (int lane = 0; lane < warp_size; lane++)
      for (int matrix = 0; matrix < N; matrix++) {
        const auto number = [&](int half) {
          const Place place = place_in_matrix(TRANSPOSED, lane, half);
          return uint32_t(static_cast<const Matrices*>(brought[8 * matrix + place.row])->row[place.column]);
        };
        static_cast<const Matrices*>(brought[lane])->to[matrix] = number(0) | number(1) << 16;
      }
  }
};

// Products are exact and are added in float, k ascending; hardware may add them in another order,
// and to a bit or two less.
template <class T>
struct Product {
  float (&c)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];

  static float number(uint32_t word, int half) {
    if constexpr (sizeof(T) == 2)
      return half ? cuda::high<T>(word) : cuda::low<T>(word);
    else
      return std::bit_cast<float>(word & 0xffffe000);
  }

  static void act(void* const (&brought)[warp_size]) {
    constexpr int depth = sizeof(T) == 2 ? 16 : 8;
    float a[16][depth], b[depth][8], c[16][8];
    for (int lane = 0; lane < warp_size; lane++) {
      const Product& self = *static_cast<const Product*>(brought[lane]);
      for (int half = 0; half < depth / 8; half++) {
        for (int i = 0; i < 4; i++) {
          const Place place = place_of_a(depth, lane, i, half);
          a[place.row][place.column] = number(self.a[i], half);
        }
        for (int i = 0; i < 2; i++) {
          const Place place = place_of_b(depth, lane, i, half);
          b[place.row][place.column] = number(self.b[i], half);
        }
      }
      for (int i = 0; i < 4; i++) c[place_of_c(lane, i).row][place_of_c(lane, i).column] = self.c[i];
    }
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < depth; k++)
        for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < warp_size; lane++)
      for (int i = 0; i < 4; i++)
        static_cast<const Product*>(brought[lane])->c[i] = c[place_of_c(lane, i).row][place_of_c(lane, i).column];
  }
};

}  // namespace fusedmoe::cuda_on_cpu

namespace fusedmoe::cuda {

using cuda_on_cpu::Here;
using cuda_on_cpu::site;

inline int thread() { return cuda_on_cpu::running.thread; }
inline int warp() { return thread() / 32; }
inline int lane() { return thread() % 32; }
inline int block_x() { return int(cuda_on_cpu::running.block.x); }
inline int block_y() { return int(cuda_on_cpu::running.block.y); }
inline int blocks_x() { return int(cuda_on_cpu::running.grid.x); }
inline int blocks_y() { return int(cuda_on_cpu::running.grid.y); }

template <class T>
inline T* shared_memory() {
  return reinterpret_cast<T*>(cuda_on_cpu::running.shared);
}

inline void sync_block(const Here& here = Here::current()) { cuda_on_cpu::sync_block(site(here)); }
inline void sync_warp(const Here& here = Here::current()) {
  static constexpr cuda_on_cpu::Together operation{"sync_warp", nullptr, true};
  cuda_on_cpu::together(operation, site(here), nullptr);
}

template <class T>
inline T shuffle(T x, int from, const Here& here = Here::current()) {
  static constexpr cuda_on_cpu::Together operation{"shuffle", cuda_on_cpu::Shuffle<T>::act};
  return cuda_on_cpu::shuffle_from(x, from & 31, operation, site(here));
}
template <class T>
inline T shuffle_xor(T x, int mask, const Here& here = Here::current()) {
  static constexpr cuda_on_cpu::Together operation{"shuffle_xor", cuda_on_cpu::Shuffle<T>::act};
  // From a lane that there is not a lane gets its own.
  const int from = lane() ^ mask;
  return cuda_on_cpu::shuffle_from(x, from & ~31 ? lane() : from, operation, site(here));
}
template <class T>
inline T shuffle_down(T x, int delta, const Here& here = Here::current()) {
  static constexpr cuda_on_cpu::Together operation{"shuffle_down", cuda_on_cpu::Shuffle<T>::act};
  const int from = lane() + delta;
  return cuda_on_cpu::shuffle_from(x, from & ~31 ? lane() : from, operation, site(here));
}

template <class T>
inline T load_global(const T* from, const Here& here = Here::current()) {
  cuda_on_cpu::touch_global(from, sizeof(T), sizeof(T), false, site(here));
  return *from;
}
template <class T>
inline void store_global(T* to, std::type_identity_t<T> x, const Here& here = Here::current()) {
  cuda_on_cpu::touch_global(to, sizeof(T), sizeof(T), true, site(here));
  *to = x;
}
inline int arrive(int* counter, const Here& here = Here::current()) { return cuda_on_cpu::arrive(counter, site(here)); }

template <int BYTES>
inline void copy_async(void* to, const void* from, int given = BYTES, const Here& here = Here::current()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  cuda_on_cpu::copy_async(to, from, BYTES, given, site(here));
}
inline void commit_copies() { cuda_on_cpu::commit_copies(); }
template <int N>
inline void wait_copies() {
  cuda_on_cpu::wait_copies(N);
}

template <int N, bool TRANSPOSED = false>
inline void load_matrices(uint32_t (&to)[N], const void* row, const Here& here = Here::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
  using Matrices = cuda_on_cpu::Matrices<N, TRANSPOSED>;
  static constexpr cuda_on_cpu::Together operation{"load_matrices", Matrices::act};
  Matrices self{{}, to, uintptr_t(row)};
  if (lane() < 8 * N) {
    cuda_on_cpu::check_shared(row, 16, "load_matrices", site(here));
    std::memcpy(self.row, row, 16);
  }
  cuda_on_cpu::together(operation, site(here), &self);
}

template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const Here& here = Here::current()) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16> || std::is_same_v<T, float>);
  static constexpr cuda_on_cpu::Together operation{"multiply_add", cuda_on_cpu::Product<T>::act, false, true};
  cuda_on_cpu::Product<T> self{c, a, b};
  cuda_on_cpu::together(operation, site(here), &self);
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, Stream,
            std::type_identity_t<Parameters>... arguments) {
  cuda_on_cpu::run(name, {shape.blocks_x, shape.blocks_y, 1}, shape.threads, shape.shared_bytes,
                   [&] { kernel(arguments...); });
}

}  // namespace fusedmoe::cuda
