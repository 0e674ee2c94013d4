// The order in which a forward's stages are filled: all pieces of all maps of a list, ahead of those who multiply them.
//
// A list is the runs of a group (experts of one source each) or its selectors (gates that read one source each). A map's pieces are those of its
// sources; of a map with one inside, for every COLUMNS hidden outputs, those of the inner map, and then one that brings the outer weight alone.
// One thread walks, and leaves word of each piece in shared memory: what it must remember would cost every thread as many registers.
#pragma once
#include "columns.h"

namespace fusedmoe::cuda {

// A list: the place of its first run, their number, and what stands in it for each map: the map and `stride` - 1 more numbers, or, of
// gates, the unit, whose rows are taken COLUMNS at a time.
struct List {
  int record, runs, stride;
  bool gates;
};

// What one step copies, if it is `here`: up to `columns` numbers of rows of a source to panel `to`, unless that is negative, and of a weight.
template <class T>
struct alignas(16) Piece {
  const T *a, *b;
  int a_distance, b_distance, to, columns;
  int list, live;
  bool here;
};

// `panels`: those of sources. keep: a source stays for all maps of its run.
template <class T, int COLUMNS, bool INNER>
struct Walk {
  // Copies of 16 bytes go behind it.
  alignas(16) int panels;
  bool keep;
  List list;
  Columns outputs;
  // Maps left in the run; the map whose sources are read, and which of these; the numbers left of that one.
  int maps, map, source, left;
  // The place of the next panel of a source.
  int to;
  // The first column of the hidden outputs that are read, or -1.
  int hidden;
  bool brings, first;
  const T *a, *b;
  int a_distance, b_distance;

  __device__ __forceinline__ void begin(const Block<T>& block) {
    to = 0;
    hidden = -1;
    begin_run(block);
  }

  __device__ __forceinline__ void next(const Block<T>& block, Piece<T>& to_copy) {
    to_copy.here = maps > 0;
    if (maps == 0) return;
    const bool inside = INNER && hidden >= 0 && map != outer(block);
    to_copy.a = a, to_copy.b = b, to_copy.a_distance = a_distance, to_copy.b_distance = b_distance;
    to_copy.to = brings ? to : -1;
    to_copy.columns = left;
    to_copy.list = inside ? -1 : outputs.list;
    to_copy.live = inside ? block.plan(map + LinearRecord::width) - hidden : outputs.live;
    if (brings) to = to + 1 < panels ? to + 1 : 0;
    a += piece<T>;
    b += piece<T>;
    left -= piece<T>;
    if (left <= 0) advance(block);
  }

 private:
  // The map that the list names.
  __device__ __forceinline__ int outer(const Block<T>& block) const {
    const int named = block.plan(list.record + (list.gates ? GateReadRecord::unit : ExpertReadRecord::linear));
    return list.gates ? block.plan(named + UnitRecord::gate) : named;
  }

  // Begin with the next map, of this run or of a later one, if there is any: a unit may have no gate.
  __device__ __forceinline__ void begin_run(const Block<T>& block) {
    for (; list.runs > 0; list.runs--) {
      maps = block.plan(list.record + RunRecord::count);
      list.record += RunRecord::size;
      first = true;
      if (begin_map(block)) return;
    }
  }
  __device__ __forceinline__ bool begin_map(const Block<T>& block) {
    for (; maps > 0; maps--, list.record += list.stride) {
      const int one = outer(block);
      if (one < 0) continue;
      if (list.gates) {
        const int unit = block.plan(list.record + GateReadRecord::unit);
        outputs = {0, block.plan(unit + UnitRecord::reads), block.plan(unit + UnitRecord::seen)};
      }
      begin_sources(block, one);
      return true;
    }
    return false;
  }
  __device__ __forceinline__ void begin_sources(const Block<T>& block, int one) {
    const int inner = INNER ? block.plan(one + LinearRecord::hidden) : -1;
    hidden = inner >= 0 ? 0 : -1;
    map = inner >= 0 ? inner : one;
    source = 0;
    brings = !keep || first;
    first = false;
    open(block);
  }
  // Point at the map's source and at the weight's columns for it.
  __device__ __forceinline__ void open(const Block<T>& block) {
    const int record = map + LinearRecord::size + source * SourceRecord::size;
    const Row<T> h = block.rows_of(record);
    a = h.first;
    a_distance = h.distance;
    left = block.plan(record + SourceRecord::width);
    point(block, map, hidden >= 0 ? hidden : outputs.first, block.plan(record + SourceRecord::first));
  }
  __device__ __forceinline__ void point(const Block<T>& block, int one, int row, int column) {
    b_distance = block.plan(one + LinearRecord::reduction);
    b = block.parameter(block.plan(one + LinearRecord::weight)) + int64_t(row) * b_distance + column;
  }

  // Go on behind the last piece of a source.
  __device__ __forceinline__ void advance(const Block<T>& block) {
    const bool outside = INNER && hidden >= 0 && map == outer(block);
    if (!outside && ++source < block.plan(map + LinearRecord::sources)) return open(block);
    if (!INNER || hidden < 0) return end_map(block);
    const int one = outer(block);
    if (!outside) {
      map = one;
      brings = false;
      point(block, one, outputs.first, hidden);
      left = block.plan(one + LinearRecord::reduction) - hidden;
      left = left < COLUMNS ? left : COLUMNS;
      return;
    }
    hidden += COLUMNS;
    if (hidden >= block.plan(one + LinearRecord::reduction)) return end_map(block);
    map = block.plan(one + LinearRecord::hidden);
    source = 0;
    brings = !keep;
    open(block);
  }
  __device__ __forceinline__ void end_map(const Block<T>& block) {
    if (list.gates) {
      outputs.list += COLUMNS;
      outputs.live -= COLUMNS;
      if (outputs.live > 0) return begin_sources(block, outer(block));
    }
    maps--;
    list.record += list.stride;
    if (begin_map(block)) return;
    list.runs--;
    begin_run(block);
  }
};

}  // namespace fusedmoe::cuda
