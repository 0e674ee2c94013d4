// How kernels read the records of a plan; kernels/layout.py says what their fields mean.
#pragma once
#include "device.h"
#include "kernels.h"
#include "layout.h"

namespace fusedmoe::cuda {

// Columns of what segments hand on begin at multiples of so many.
constexpr int column_step = 16;
// A width rounded up to a multiple of `column_step`.
__host__ __device__ __forceinline__ int padded(int width) {
  return (width + column_step - 1) / column_step * column_step;
}

// Rows at a distance, by the first number of the first one.
template <class T>
struct Row {
  T* first;
  int stride;
};

// What all threads of a block know: the rows from `row` on, `live` of them, of a network.
template <class T>
struct Block {
  const Network& network;
  int64_t row;
  int live;

  __device__ __forceinline__ int plan(int at) const { return load_global(network.plan + at); }
  __device__ __forceinline__ float number(int at) const { return load_global(network.floats + at); }

  __device__ __forceinline__ const T* parameter(int number) const {
    const Addresses& all = network.parameters;
    return static_cast<const T*>(number < Addresses::count ? all.at[number]
                                                           : load_global(all.more + (number - Addresses::count)));
  }
  // Where the block's rows of a place stand. Inside a tile 32 bits reach; what is larger stands in
  // the first.
  __device__ __forceinline__ Row<T> rows_of(int place, const Places& places) const {
    const int kind = plan(place + PlaceRecord::kind);
    const int64_t column = plan(place + PlaceRecord::column),
                  stride = kind == from_x ? places.x_row : plan(place + PlaceRecord::stride);
    const int64_t before =
        plan(place + PlaceRecord::buffer) * network.rows + (kind == from_x ? column * places.x_slot : column);
    void* base = kind == from_x ? places.x : kind == from_buffer ? places.buffers : places.out;
    return {static_cast<T*>(base) + before + row * stride, int(stride)};
  }
  __device__ __forceinline__ Row<T> rows_of(int place) const { return rows_of(place, network.places); }

  // v of one read: its fixed value, and its element of the learned tensor.
  __device__ __forceinline__ float static_weight(int unit, int read) const {
    float v = number(plan(unit + UnitRecord::fixed) + read);
    const int tensor = plan(unit + UnitRecord::statics);
    if (tensor >= 0) {
      const int element = plan(plan(unit + UnitRecord::elements) + read);
      if (element >= 0) v += widened(load_global(parameter(tensor) + element));
    }
    return v;
  }
  // Row `row` of the softmax scratch from the block's first row on.
  __device__ __forceinline__ float* softmax(int64_t of) const { return network.p + of * network.rows + row; }
};

}  // namespace fusedmoe::cuda
