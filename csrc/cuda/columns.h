// What is done to the numbers that a thread has of a tile: some columns of a linear.
#pragma once
#include "activation.h"
#include "records.h"
#include "tile.h"

namespace fusedmoe::cuda {

// `live` columns of a linear, or outputs, from `first` on; or by their numbers in a list of the
// plan, where `list` is not negative.
struct Columns {
  int first, live, list = -1;
};

// Two neighbours of a row, read as one where `pair` says that they begin at a multiple of both.
template <class T>
__device__ __forceinline__ void load_two(const T* at, bool pair, bool first_live, bool second_live, float& first,
                                         float& second) {
  if (pair && second_live) {
    const Vector<T, 2> two = load_global(reinterpret_cast<const Vector<T, 2>*>(at));
    first = widened(two.at[0]), second = widened(two.at[1]);
  } else {
    first = first_live ? widened(load_global(at)) : 0.0f;
    second = second_live ? widened(load_global(at + 1)) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_two(T* at, bool pair, bool first_live, bool second_live, float first,
                                          float second) {
  if (pair && second_live) {
    store_global(reinterpret_cast<Vector<T, 2>*>(at), Vector<T, 2>{rounded<T>(first), rounded<T>(second)});
  } else {
    if (first_live) store_global(at, rounded<T>(first));
    if (second_live) store_global(at + 1, rounded<T>(second));
  }
}

// sums += the numbers of `from` in their place, zeros where there are none. `pairs`: columns and
// rows begin at even numbers.
template <class P, class T>
__device__ __forceinline__ void add_tile(const Row<T>& from, const Columns& columns, int rows, bool pairs,
                                         typename P::Sums& sums) {
  P::visit(sums, [&](int row, int column, float& low, float& high) {
    const bool first_live = row < rows && column < columns.live, second_live = row < rows && column + 1 < columns.live;
    float first, second;
    load_two(from.first + int64_t(row) * from.stride + columns.first + column, pairs, first_live, second_live, first,
             second);
    low += first, high += second;
  });
}

// z += b.
template <class P, class T>
__device__ __forceinline__ void add_bias(const Block<T>& block, int linear, const Columns& columns,
                                         typename P::Sums& z) {
  const int number = block.plan(linear + LinearRecord::bias);
  if (number < 0) return;
  const T* bias = block.parameter(number) + columns.first;
  const auto term = [&](int column) {
    if (column >= columns.live) return 0.0f;
    const int at = columns.list < 0 ? column : block.plan(columns.list + column);
    return at < 0 ? 0.0f : widened(load_global(bias + at));
  };
  FUSEDMOE_CUDA_UNROLL
  for (int j = 0; j < P::N; j++) {
    const float low = term(P::column(j)), high = term(P::column(j) + 1);
    FUSEDMOE_CUDA_UNROLL
    for (int i = 0; i < P::M; i++) {
      z.at[i][j][0] += low, z.at[i][j][1] += high;
      z.at[i][j][2] += low, z.at[i][j][3] += high;
    }
  }
}

// z = act(z).
template <class P, class T>
__device__ __forceinline__ void activate(const Block<T>& block, int linear, typename P::Sums& z) {
  const float parameter = block.number(block.plan(linear + LinearRecord::parameter));
  choose(block.plan(linear + LinearRecord::activation), [&](auto act) {
    P::visit(z, [&](int, int, float& low, float& high) {
      low = act.value(low, parameter);
      high = act.value(high, parameter);
    });
  });
}

// Two neighbours of a row in shared memory.
template <class T>
__device__ __forceinline__ void put(char* row, int column, float low, float high) {
  if constexpr (sizeof(T) == 2) *reinterpret_cast<uint32_t*>(row + column * 2) = rounded_pair<T>(low, high);
  else *reinterpret_cast<Vector<float, 2>*>(row + column * 4) = {low, high};
}

// A tile to where it goes. Every warp passes its part through `scratch` in shared memory, which
// nobody else reads, so that 16 bytes are written at a time where `vectors` says that they may be.
template <class P, class T>
__device__ __forceinline__ void store_tile(char* scratch, typename P::Sums& from, const Row<T>& to,
                                           const Columns& columns, int rows, bool vectors) {
  constexpr int across = P::N * 8, down = P::M * 16, pitch = across * int(sizeof(T)) + 16,
                numbers = 16 / int(sizeof(T));
  char* part = scratch + warp() * down * pitch;
  const int first_row = warp() % P::down * down, first_column = P::first_column();
  // Of the tile before, all have been read.
  sync_warp();
  P::visit(from, [&](int row, int column, float low, float high) {
    put<T>(part + (row - first_row) * pitch, column - first_column, low, high);
  });
  sync_warp();
  const auto each = [&](auto number, int count) {
    using Stored = decltype(number);
    FUSEDMOE_CUDA_ROLLED
    for (int i = lane(); i < down * count; i += 32) {
      const int row = i / count, column = i % count * (across / count);
      if (first_row + row >= rows || first_column + column >= columns.live) continue;
      T* at = to.first + int64_t(first_row + row) * to.stride + columns.first + first_column + column;
      store_global(reinterpret_cast<Stored*>(at),
                   *reinterpret_cast<const Stored*>(part + row * pitch + column * int(sizeof(T))));
    }
  };
  if (vectors) each(Vector<T, numbers>{}, across / numbers);
  else each(T{}, across);
}
template <class P, class T>
constexpr int store_bytes = P::warps * P::M * 16 * (P::N * 8 * int(sizeof(T)) + 16);

}  // namespace fusedmoe::cuda
