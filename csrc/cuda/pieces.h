// What fills the stages of a product in the backward: pieces of an operand and of a weight, ahead of those who multiply them.
#pragma once
#include "records.h"
#include "tile.h"

namespace fusedmoe::cuda {

// The lowest place a stage has for A, and behind it B.
template <class P>
constexpr int stage_bytes = P::PanelA::bytes + P::PanelB::bytes;

// z = W h of one map: its sources one after another, and W's columns for them. Rows of W: `live` of them from `first` on.
template <class T, class P>
struct MapPieces {
  const Block<T>& block;
  const int one, first, live;
  const bool aligned;
  int source = -1, left = 0;
  Row<T> h = {};
  Row<const T> w = {};

  // Copy the next piece, if there is one.
  __device__ __forceinline__ void operator()(char* to) {
    while (left <= 0) {
      if (++source >= block.plan(one + LinearRecord::sources)) return;
      open(one + LinearRecord::size + source * SourceRecord::size);
    }
    copy_panel<typename P::PanelA, P::threads>(to, h.first, left, aligned, Rows{block.live, h.distance});
    copy_panel<typename P::PanelB, P::threads>(to + P::PanelA::bytes, w.first, left, aligned, Rows{live, w.distance});
    h.first += piece<T>;
    w.first += piece<T>;
    left -= piece<T>;
  }

 private:
  __device__ __forceinline__ void open(int record) {
    h = block.rows_of(record);
    w.distance = block.plan(one + LinearRecord::reduction);
    w.first = block.parameter(block.plan(one + LinearRecord::weight)) + int64_t(first) * w.distance + block.plan(record + SourceRecord::first);
    left = block.plan(record + SourceRecord::width);
  }
};

// d = W^T dz of all maps that read a source, one behind another; those that copy it are left out. Columns of W: `live` of them from `first` on.
template <class T, class P>
struct UsePieces {
  const Block<T>& block;
  const Row<T> dz;
  const int first, live;
  const bool aligned;
  int use, uses, left = 0;
  const T* a = nullptr;
  Row<const T> w = {};

  // Copy the next piece, if there is one.
  __device__ __forceinline__ void operator()(char* to) {
    while (left <= 0) {
      if (uses == 0) return;
      if (block.plan(use + UseRecord::weight) >= 0) open();
      use += UseRecord::size;
      uses--;
    }
    // dz is zero up to the next map's column.
    copy_panel<typename P::PanelA, P::threads>(to, a, padded(left), true, Rows{block.live, dz.distance});
    copy_panel<typename P::PanelB, P::threads>(to + P::PanelA::bytes, w.first, live, aligned, Rows{left, w.distance});
    a += piece<T>;
    w.first += int64_t(piece<T>) * w.distance;
    left -= piece<T>;
  }

 private:
  __device__ __forceinline__ void open() {
    a = dz.first + block.plan(use + UseRecord::dz);
    w.distance = block.plan(use + UseRecord::reduction);
    w.first = block.parameter(block.plan(use + UseRecord::weight)) + block.plan(use + UseRecord::first) + first;
    left = block.plan(use + UseRecord::outputs);
  }
};

}  // namespace fusedmoe::cuda
