// The order in which a forward's stages are filled: all k-tiles of all linears of a list, ahead of
// those who multiply them.
//
// A list is the runs of a group (experts of one source each) or its selectors (gates that read one
// source each). A linear's k-tiles are those of its sources; of a linear with a hidden layer
// inside, for every COLUMNS hidden outputs, those of the inner linear, and then one that brings the
// outer weight alone. One thread iterates, and writes a descriptor of each k-tile to shared memory:
// its state would cost every thread registers.
#pragma once
#include "columns.h"

namespace fusedmoe::cuda {

// A list: the place of its first run, their number, and what stands in it for each linear: the
// linear and `stride` - 1 more numbers, or, of gates, the unit, whose rows are taken COLUMNS at a
// time.
struct WorkList {
  int record, runs, stride;
  bool gates;
};

// What one step copies, if it is `here`: up to `columns` numbers of rows of a source to panel `to`,
// unless that is negative, and of a weight.
template <class T>
struct alignas(16) CopyDescriptor {
  const T *a, *b;
  int a_stride, b_stride, to, columns;
  int list, live;
  bool here;
};

// `panels`: those of sources. resident: a source stays for all linears of its run.
template <class T, int COLUMNS, bool HIDDEN>
struct PrefetchIterator {
  // Copies of 16 bytes go behind it.
  alignas(16) int panels;
  bool resident;
  WorkList list;
  Columns outputs;
  // Linears left in the run; the linear whose sources are read, and which of these; the columns
  // left of that one.
  int left_linears, current, source, left;
  int next_panel;
  // The first column of the hidden outputs that are read, or -1.
  int hidden_column;
  bool brings, first;
  const T *a, *b;
  int a_stride, b_stride;

  __device__ __forceinline__ void begin(const Block<T>& block) {
    next_panel = 0;
    hidden_column = -1;
    begin_run(block);
  }

  __device__ __forceinline__ void next(const Block<T>& block, CopyDescriptor<T>& to_copy) {
    to_copy.here = left_linears > 0;
    if (left_linears == 0) return;
    const bool inside = HIDDEN && hidden_column >= 0 && current != named_linear(block);
    to_copy.a = a, to_copy.b = b, to_copy.a_stride = a_stride, to_copy.b_stride = b_stride;
    to_copy.to = brings ? next_panel : -1;
    to_copy.columns = left;
    to_copy.list = inside ? -1 : outputs.list;
    to_copy.live = inside ? block.plan(current + LinearRecord::width) - hidden_column : outputs.live;
    if (brings) next_panel = next_panel + 1 < panels ? next_panel + 1 : 0;
    a += k_tile<T>;
    b += k_tile<T>;
    left -= k_tile<T>;
    if (left <= 0) advance(block);
  }

 private:
  // The linear that the list names.
  __device__ __forceinline__ int named_linear(const Block<T>& block) const {
    const int named = block.plan(list.record + (list.gates ? GateReadRecord::unit : ExpertReadRecord::linear));
    return list.gates ? block.plan(named + UnitRecord::gate) : named;
  }

  // Begin with the next linear, of this run or of a later one, if there is any: a unit may have no
  // gate.
  __device__ __forceinline__ void begin_run(const Block<T>& block) {
    for (; list.runs > 0; list.runs--) {
      left_linears = block.plan(list.record + RunRecord::count);
      list.record += RunRecord::size;
      first = true;
      if (begin_linear(block)) return;
    }
  }
  __device__ __forceinline__ bool begin_linear(const Block<T>& block) {
    for (; left_linears > 0; left_linears--, list.record += list.stride) {
      const int linear = named_linear(block);
      if (linear < 0) continue;
      if (list.gates) {
        const int unit = block.plan(list.record + GateReadRecord::unit);
        outputs = {0, block.plan(unit + UnitRecord::reads), block.plan(unit + UnitRecord::seen)};
      }
      begin_sources(block, linear);
      return true;
    }
    return false;
  }
  __device__ __forceinline__ void begin_sources(const Block<T>& block, int linear) {
    const int hidden = HIDDEN ? block.plan(linear + LinearRecord::hidden) : -1;
    hidden_column = hidden >= 0 ? 0 : -1;
    current = hidden >= 0 ? hidden : linear;
    source = 0;
    brings = !resident || first;
    first = false;
    open(block);
  }
  // Point at the linear's source and at the weight's columns for it.
  __device__ __forceinline__ void open(const Block<T>& block) {
    const int record = current + LinearRecord::size + source * SourceRecord::size;
    const Row<T> h = block.rows_of(record);
    a = h.first;
    a_stride = h.stride;
    left = block.plan(record + SourceRecord::width);
    point(block, current, hidden_column >= 0 ? hidden_column : outputs.first, block.plan(record + SourceRecord::first));
  }
  __device__ __forceinline__ void point(const Block<T>& block, int linear, int row, int column) {
    b_stride = block.plan(linear + LinearRecord::reduction);
    b = block.parameter(block.plan(linear + LinearRecord::weight)) + int64_t(row) * b_stride + column;
  }

  // Go on behind the last k-tile of a source.
  __device__ __forceinline__ void advance(const Block<T>& block) {
    const bool outside = HIDDEN && hidden_column >= 0 && current == named_linear(block);
    if (!outside && ++source < block.plan(current + LinearRecord::sources)) return open(block);
    if (!HIDDEN || hidden_column < 0) return end_linear(block);
    const int linear = named_linear(block);
    if (!outside) {
      current = linear;
      brings = false;
      point(block, linear, outputs.first, hidden_column);
      left = block.plan(linear + LinearRecord::reduction) - hidden_column;
      left = left < COLUMNS ? left : COLUMNS;
      return;
    }
    hidden_column += COLUMNS;
    if (hidden_column >= block.plan(linear + LinearRecord::reduction)) return end_linear(block);
    current = block.plan(linear + LinearRecord::hidden);
    source = 0;
    brings = !resident;
    open(block);
  }
  __device__ __forceinline__ void end_linear(const Block<T>& block) {
    if (list.gates) {
      outputs.list += COLUMNS;
      outputs.live -= COLUMNS;
      if (outputs.live > 0) return begin_sources(block, named_linear(block));
    }
    left_linears--;
    list.record += list.stride;
    if (begin_linear(block)) return;
    list.runs--;
    begin_run(block);
  }
};

}  // namespace fusedmoe::cuda
