// The row-local backward of any segments in one launch. Formulas: fusedmoe/reference/operator.py; its
// twin in Triton, which reads the same plans: kernels/triton/backward.py.
//
// Grid: (row blocks, programs of a block). Each program runs a list of tiles, of two kinds:
//
//   expert   some columns of an expert: y again from its sources; dw of every unit that reads it
//            (a part for each such tile);
//            dz = a'(z) x sum of (p + v) g
//   source   some columns of a source: the softmax's backward of the gates that read it, then
//            d = sum of W^T dz over what reads it
#pragma once
#include "columns.h"
#include "k_tiles.h"

namespace fusedmoe::cuda {

struct RowsCall {
  Backward of;
  int place, columns;
  bool aligned, store_aligned, allow_tf32;
};

template <class T, int ROWS, int COLUMNS, int THREADS>
struct RowsBackward {
  static constexpr int stages = 3;
  using Up = Product<T, ROWS, COLUMNS, THREADS>;
  using Down = Product<T, ROWS, COLUMNS, THREADS, Major::k, Major::mn>;
  // Of gates, for so many reads at a time.
  static constexpr int reads_step = 16;
  using Choice = Product<T, ROWS, COLUMNS, THREADS, Major::k, Major::mn, reads_step>;
  using Sums = typename Up::Sums;
  static constexpr int stage = stage_bytes<Up> > stage_bytes<Down> ? stage_bytes<Up> : stage_bytes<Down>;
  static constexpr int bytes = stages * stage;
  static_assert(stage_bytes<Choice> <= stage && store_bytes<Up, T> <= bytes &&
                2 * Up::across * ROWS * int(sizeof(float)) <= bytes);

  const RowsCall& call;
  const Block<T> block;

  __device__ __forceinline__ int plan(int at) const { return block.plan(at); }
  static __device__ __forceinline__ char* shared(int at = 0) { return shared_memory<char>() + at * stage; }
  // The block's rows of dz, and of a row of dw.
  __device__ __forceinline__ Row<T> dz() const {
    return {static_cast<T*>(call.of.dz) + block.row * call.of.dz_row, call.of.dz_row};
  }
  __device__ __forceinline__ float* dw(int64_t part) const {
    return call.of.dw + part * block.network.rows + block.row;
  }
  __device__ __forceinline__ Columns columns_of(int first, int width) const {
    return {first, width - first < call.columns ? width - first : call.columns};
  }

  __device__ __forceinline__ void expert_tile(int record) const {
    using Tile = ExpertTileRecord;
    const int linear = plan(record + Tile::linear), width = plan(record + Tile::width);
    const Columns columns = columns_of(plan(record + Tile::column), width);
    Sums z, dy;
    Up::clear(z);
    if (plan(linear + LinearRecord::weight) >= 0) linear_forward(linear, columns, z);
    else add_tile<Up>(block.rows_of(linear + LinearRecord::size), columns, block.live, call.aligned, z);
    // Beyond the expert's columns stands 0 h, which is NaN where h is infinite.
    Up::visit(z, [&](int, int column, float& low, float& high) {
      if (column >= columns.live) low = 0.0f;
      if (column + 1 >= columns.live) high = 0.0f;
    });
    Up::clear(dy);
    readers(record + Tile::size, plan(record + Tile::readers), linear, columns, z, dy);
    slope(linear, z, dy);
    // Of the partial sums, all have been read. Zeros up to the next linear's column, so that
    // products over dz need not stop within a vector.
    sync_block();
    const Row<T> to = dz();
    store_tile<Up>(shared(), dy, Row<T>{to.first + plan(record + Tile::dz), to.stride},
                   columns_of(columns.first, padded(width)), block.live, true);
  }

  __device__ __forceinline__ void linear_forward(int linear, const Columns& columns, Sums& z) const {
    LinearTiles<T, Up> k_tiles{block, linear, columns.first, columns.live, call.aligned};
    Ring<stages> ring;
    const auto fetch = [&](int at) { k_tiles(shared(at)); };
    ring.start(fetch);
    FUSEDMOE_CUDA_ROLLED
    for (int s = 0; s < plan(linear + LinearRecord::sources); s++) {
      const int source = linear + LinearRecord::size + s * SourceRecord::size;
      FUSEDMOE_CUDA_ROLLED
      for (int left = plan(source + SourceRecord::width); left > 0; left -= k_tile<T>) {
        const char* a = shared(ring.step(fetch));
        Up::multiply(a, a + Up::PanelA::bytes, z, call.allow_tf32, columns.live);
      }
    }
    ring.finish();
    add_bias<Up>(block, linear, columns, z);
  }

  // dy = sum of (p + v) g over the units that read the expert, and each one's part of dw = sum of g
  // y over these columns.
  __device__ __forceinline__ void readers(int reader, int count, int linear, const Columns& columns, const Sums& z,
                                          Sums& dy) const {
    Sums y = z;
    activate<Up>(block, linear, y);
    Sums g;
    load_gradient(reader, count, columns, g);
    FUSEDMOE_CUDA_ROLLED
    for (int i = 0; i < count; i++, reader += ReaderRecord::size) {
      const float* p = block.softmax(plan(reader + ReaderRecord::p));
      const float v = block.static_weight(plan(reader + ReaderRecord::unit), plan(reader + ReaderRecord::read));
      // On its way while this one is added up.
      Sums next;
      load_gradient(reader + ReaderRecord::size, count - 1 - i, columns, next);
      // Two of them take turns, so that one barrier stands between the sums of one reader and those
      // of the next but one.
      float* parts = reinterpret_cast<float*>(shared()) + i % 2 * Up::across * ROWS;
      FUSEDMOE_CUDA_UNROLL
      for (int m = 0; m < Up::M; m++)
        FUSEDMOE_CUDA_UNROLL
        for (int half = 0; half < 2; half++) {
          const int row = Up::row(m, half);
          const float w = row < block.live ? load_global(p + row) + v : 0.0f;
          float sum = 0.0f;
          FUSEDMOE_CUDA_UNROLL
          for (int n = 0; n < Up::N * 2; n++) {
            const float each = g.at[m][n / 2][2 * half + n % 2];
            sum += each * y.at[m][n / 2][2 * half + n % 2];
            dy.at[m][n / 2][2 * half + n % 2] += w * each;
          }
          sum = sum_lanes<4>(sum);
          if (lane() % 4 == 0) parts[warp() / Up::down * ROWS + row] = sum;
        }
      sync_block();
      if (thread() < block.live) {
        float sum = 0.0f;
        FUSEDMOE_CUDA_UNROLL
        for (int part = 0; part < Up::across; part++) sum += parts[part * ROWS + thread()];
        store_global(dw(plan(reader + ReaderRecord::dw)) + thread(), sum);
      }
      g = next;
    }
  }
  // g of the first of `count` readers, or zeros of none.
  __device__ __forceinline__ void load_gradient(int reader, int count, const Columns& columns, Sums& g) const {
    Up::clear(g);
    if (count > 0)
      add_tile<Up>(block.rows_of(reader + ReaderRecord::place, call.of.below), columns, block.live, call.store_aligned,
                   g);
  }

  // dy x a'(z).
  __device__ __forceinline__ void slope(int linear, const Sums& z, Sums& dy) const {
    const float parameter = block.number(plan(linear + LinearRecord::parameter));
    const bool relu = Act(plan(linear + LinearRecord::activation)) == Act::relu;
    choose(plan(linear + LinearRecord::activation), [&](auto act) {
      FUSEDMOE_CUDA_UNROLL
      for (int m = 0; m < Up::M; m++)
        FUSEDMOE_CUDA_UNROLL
        for (int n = 0; n < Up::N; n++)
          FUSEDMOE_CUDA_UNROLL
          for (int k = 0; k < 4; k++) {
            const float at = z.at[m][n][k];
            // Chosen, not multiplied: an infinite dy must not turn into NaN where a ReLU is off.
            dy.at[m][n][k] = relu && at <= 0.0f ? 0.0f : dy.at[m][n][k] * act.slope(at, parameter);
          }
    });
  }

  __device__ __forceinline__ void source_tile(int record) const {
    const Columns columns = columns_of(plan(record + SourceTileRecord::column), plan(record + SourceTileRecord::width));
    const int uses = record + SourceTileRecord::size, count = plan(record + SourceTileRecord::uses);
    Sums d;
    Up::clear(d);
    add_uses(uses, count, columns, d);
    add_gates(uses + count * UseRecord::size, plan(record + SourceTileRecord::selections), columns, d);
    const Row<T> to = block.rows_of(record + SourceTileRecord::place, call.of.below);
    if (plan(record + SourceTileRecord::add) != 0) add_tile<Up>(to, columns, block.live, call.aligned, d);
    // Behind both products the block has read its stages.
    store_tile<Up>(shared(), d, to, columns, block.live, call.aligned);
  }

  // d += sum of W^T dz over linears, and of dz over copies.
  __device__ __forceinline__ void add_uses(int use, int count, const Columns& columns, Sums& d) const {
    UseTiles<T, Down> k_tiles{block, dz(), columns.first, columns.live, call.aligned, use, count};
    Ring<stages> ring;
    const auto fetch = [&](int at) { k_tiles(shared(at)); };
    ring.start(fetch);
    FUSEDMOE_CUDA_ROLLED
    for (int i = 0; i < count; i++, use += UseRecord::size) {
      if (plan(use + UseRecord::weight) < 0) {
        const Row<T> of = dz();
        add_tile<Up>(Row<T>{of.first + plan(use + UseRecord::dz), of.stride}, columns, block.live, call.aligned, d);
        continue;
      }
      FUSEDMOE_CUDA_ROLLED
      for (int left = plan(use + UseRecord::outputs); left > 0; left -= k_tile<T>) {
        const char* a = shared(ring.step(fetch));
        Down::multiply(a, a + Down::PanelA::bytes, d, call.allow_tf32, columns.live);
      }
    }
    ring.finish();
  }

  // d += sum of G^T dz over gates, so many reads at a time. Two stages take turns: while one is
  // multiplied the rows of G for the other are on their way.
  __device__ __forceinline__ void add_gates(int selection, int count, const Columns& columns, Sums& d) const {
    Softmax of{};
    int read = 0, to = 0, from = -1;
    while (count > 0 || from >= 0) {
      const bool some = count > 0;
      if (some) {
        if (read == 0) of = softmax_of(selection);
        char* a = shared(to);
        store_logits_gradient(selection, of, read, a, columns.first == 0);
        copy_gate(selection, read, columns, a + Choice::PanelA::bytes);
        read += reads_step;
        if (read >= plan(plan(selection + SelectionRecord::unit) + UnitRecord::reads))
          read = 0, count--, selection += SelectionRecord::size;
      }
      commit_copies();
      // A product wants the whole warp, whose lanes have each gone their way.
      sync_warp();
      if (from >= 0)
        Choice::multiply(shared(from), shared(from) + Choice::PanelA::bytes, d, call.allow_tf32, columns.live);
      wait_copies<0>();
      sync_block();
      from = some ? to : -1;
      to = 1 - to;
    }
  }

  // Rows of G in the order of the unit's reads; one that is not seen is zero.
  __device__ __forceinline__ void copy_gate(int selection, int read, const Columns& columns, char* to) const {
    const int unit = plan(selection + SelectionRecord::unit);
    const Rows rows{plan(unit + UnitRecord::reads) - read, plan(selection + SelectionRecord::reduction),
                    block.network.plan + plan(unit + UnitRecord::seen) + read};
    copy_panel<typename Choice::PanelB, THREADS>(
        to, block.parameter(plan(selection + SelectionRecord::weight)) + columns.first, columns.live, call.aligned,
        rows);
  }

  // What the softmax's backward of a gate takes off the d of its row: their mean under p, and what
  // its rounding left of it, the mean of what remains. With the mean off first, what is nearly the
  // mean keeps its digits.
  struct Softmax {
    float mean, rest;
  };
  // Each row has a few neighbouring lanes, of which each has every lanes-th read.
  static constexpr int lanes = THREADS / ROWS;
  __device__ __forceinline__ int my_row() const { return thread() / lanes; }
  __device__ __forceinline__ float probability(int selection, int read) const {
    return load_global(block.softmax(plan(selection + SelectionRecord::p) + read) + my_row());
  }
  __device__ __forceinline__ float weight_gradient(int selection, int read) const {
    float d = 0.0f;
    const int tiles = plan(selection + SelectionRecord::tiles), first = plan(selection + SelectionRecord::dw) + read,
              stride = plan(selection + SelectionRecord::stride);
    // Several on their way at a time.
    FUSEDMOE_CUDA_UNROLL_SOME
    for (int tile = 0; tile < tiles; tile++) d += load_global(dw(first + tile * stride) + my_row());
    const int columns =
        call.of.network.weights ? plan(plan(selection + SelectionRecord::unit) + UnitRecord::mixing) : -1;
    if (columns >= 0) {
      const T* given = static_cast<const T*>(call.of.network.weights) + (block.row + my_row()) * block.network.mixing;
      d += widened(load_global(given + plan(columns + read)));
    }
    return d;
  }
  __device__ __forceinline__ Softmax softmax_of(int selection) const {
    Softmax of{};
    of.mean = mean_gradient(selection, 0.0f);
    of.rest = mean_gradient(selection, of.mean);
    return of;
  }
  // The mean under p of d - off. What is not seen has p = 0, and may have a d that is not finite.
  __device__ __forceinline__ float mean_gradient(int selection, float off) const {
    const int reads = my_row() < block.live ? plan(plan(selection + SelectionRecord::unit) + UnitRecord::reads) : 0;
    float sum = 0.0f;
    FUSEDMOE_CUDA_ROLLED
    for (int read = thread() % lanes; read < reads; read += lanes) {
      // Neither waits for the other.
      const float p = probability(selection, read), d = weight_gradient(selection, read);
      sum += p != 0.0f ? p * (d - off) : 0.0f;
    }
    return sum_lanes<lanes>(sum);
  }
  // dz of a gate from one of its reads on: [ROWS, reads_step] to shared memory, and to dz where
  // this tile is the one to store it.
  __device__ __forceinline__ void store_logits_gradient(int selection, const Softmax& of, int first, char* panel,
                                                        bool storing) const {
    const int unit = plan(selection + SelectionRecord::unit),
              reads = my_row() < block.live ? plan(unit + UnitRecord::reads) - first : 0;
    FUSEDMOE_CUDA_ROLLED
    for (int i = thread() % lanes; i < reads_step; i += lanes) {
      T d_z = rounded<T>(0.0f);
      if (i < reads) {
        const float p = probability(selection, first + i);
        if (p != 0.0f) d_z = rounded<T>(p * (weight_gradient(selection, first + i) - of.mean - of.rest));
        const int seen = plan(plan(unit + UnitRecord::seen) + first + i);
        if (storing && seen >= 0 && plan(selection + SelectionRecord::store) != 0)
          store_global(dz().first + my_row() * call.of.dz_row + plan(selection + SelectionRecord::dz) + seen, d_z);
      }
      *reinterpret_cast<T*>(panel + my_row() * Choice::PanelA::pitch + i * int(sizeof(T))) = d_z;
    }
  }

  __device__ __forceinline__ void run() const {
    if (block_x() == 0 && block_y() == 0)
      for (int i = thread(); i < call.of.tasks; i += THREADS) store_global(call.of.arrived + i, 0);
    const int program = call.place + 2 * block_y(), first = plan(program), end = plan(program + 1);
    FUSEDMOE_CUDA_ROLLED
    for (int tile = first; tile < end; tile += BackwardTileRecord::size) {
      // The block has read its shared memory, and sees what the tiles before wrote.
      if (tile != first) sync_block();
      const int record = plan(tile + BackwardTileRecord::record);
      if (plan(tile + BackwardTileRecord::kind) == expert_kind) expert_tile(record);
      else source_tile(record);
    }
  }
};

template <class T, int ROWS, int COLUMNS, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) backward_rows_kernel(const __grid_constant__ RowsCall call) {
  const int64_t row = int64_t(block_x()) * ROWS, left = call.of.network.rows - row;
  RowsBackward<T, ROWS, COLUMNS, THREADS>{call, {call.of.network, row, int(left < ROWS ? left : ROWS)}}.run();
}

}  // namespace fusedmoe::cuda
