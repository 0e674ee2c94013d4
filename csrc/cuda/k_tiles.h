// What fills the stages of a product in the backward: k-tiles of an operand and of a weight, ahead
// of those who multiply them.
#pragma once
#include "records.h"
#include "tile.h"

namespace fusedmoe::cuda {

// The lowest place a stage has for A, and behind it B.
template <class P>
constexpr int stage_bytes = P::PanelA::bytes + P::PanelB::bytes;

// z = W h of one linear: its sources one after another, and W's columns for them. Rows of W: `live`
// of them from `first` on.
template <class T, class P>
struct LinearTiles {
  const Block<T>& block;
  const int linear, first, live;
  const bool aligned;
  int source = -1, left = 0;
  Row<T> h = {};
  Row<const T> w = {};

  // Copy the next k-tile, if there is one.
  __device__ __forceinline__ void operator()(char* to) {
    while (left <= 0) {
      if (++source >= block.plan(linear + LinearRecord::sources)) return;
      open(linear + LinearRecord::size + source * SourceRecord::size);
    }
    copy_panel<typename P::PanelA, P::threads>(to, h.first, left, aligned, Rows{block.live, h.stride});
    copy_panel<typename P::PanelB, P::threads>(to + P::PanelA::bytes, w.first, left, aligned, Rows{live, w.stride});
    h.first += k_tile<T>;
    w.first += k_tile<T>;
    left -= k_tile<T>;
  }

 private:
  __device__ __forceinline__ void open(int record) {
    h = block.rows_of(record);
    w.stride = block.plan(linear + LinearRecord::reduction);
    w.first = block.parameter(block.plan(linear + LinearRecord::weight)) + int64_t(first) * w.stride +
              block.plan(record + SourceRecord::first);
    left = block.plan(record + SourceRecord::width);
  }
};

// d = W^T dz of all linears that read a source, one behind another; those that copy it are left
// out. Columns of W: `live` of them from `first` on.
template <class T, class P>
struct UseTiles {
  const Block<T>& block;
  const Row<T> dz;
  const int first, live;
  const bool aligned;
  int use, uses, left = 0;
  const T* a = nullptr;
  Row<const T> w = {};

  // Copy the next k-tile, if there is one.
  __device__ __forceinline__ void operator()(char* to) {
    while (left <= 0) {
      if (uses == 0) return;
      if (block.plan(use + UseRecord::weight) >= 0) open();
      use += UseRecord::size;
      uses--;
    }
    // dz is zero up to the next linear's column.
    copy_panel<typename P::PanelA, P::threads>(to, a, padded(left), true, Rows{block.live, dz.stride});
    copy_panel<typename P::PanelB, P::threads>(to + P::PanelA::bytes, w.first, live, aligned, Rows{left, w.stride});
    a += k_tile<T>;
    w.first += int64_t(k_tile<T>) * w.stride;
    left -= k_tile<T>;
  }

 private:
  __device__ __forceinline__ void open() {
    a = dz.first + block.plan(use + UseRecord::dz);
    w.stride = block.plan(use + UseRecord::reduction);
    w.first = block.parameter(block.plan(use + UseRecord::weight)) + block.plan(use + UseRecord::first) + first;
    left = block.plan(use + UseRecord::outputs);
  }
};

}  // namespace fusedmoe::cuda
