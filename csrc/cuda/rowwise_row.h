// What all row-wise operations know of their row, and ask of the plan.
#pragma once
#include "records.h"

namespace fusedmoe::cuda {

// A forward knows of `of` the network alone. seed: of dropout; null: nothing is dropped.
struct RowwiseCall {
  Backward of;
  const int64_t* seed;
  int place;
};

// f(column) for every column of this lane.
template <class F>
__device__ __forceinline__ void each_column(int width, F&& f) {
  FUSEDMOE_CUDA_ROLLED
  for (int column = lane(); column < width; column += 32) f(column);
}

template <class T>
struct RowwiseRow {
  const RowwiseCall& call;
  // One row.
  const Block<T> block;

  __device__ __forceinline__ int plan(int at) const { return block.plan(at); }
  // A number of the plan's floats, whose place stands at `at`.
  __device__ __forceinline__ float number(int at) const { return block.number(plan(at)); }
  // The row of a vector whose place is `at`, and of its gradient.
  __device__ __forceinline__ T* values(int at) const { return block.rows_of(at).first; }
  __device__ __forceinline__ T* gradients(int at) const { return block.rows_of(at, call.of.below).first; }
  // A parameter whose number stands at `at`; null: there is none.
  __device__ __forceinline__ const T* parameter(int at) const {
    return plan(at) < 0 ? nullptr : block.parameter(plan(at));
  }
  static __device__ __forceinline__ float value(const T* of, int column) { return widened(load_global(of + column)); }
  static __device__ __forceinline__ void put(T* to, int column, float x) { store_global(to + column, rounded<T>(x)); }
  static __device__ __forceinline__ void add(T* to, int column, float x) { put(to, column, value(to, column) + x); }
  __device__ __forceinline__ void put_dw(int row, float x) const {
    store_global(call.of.dw + row * block.network.rows + block.row, x);
  }
};

}  // namespace fusedmoe::cuda
