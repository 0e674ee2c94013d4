// The forward of any stages in one launch. Formulas: fusedmoe/reference/operator.py; its twin in Triton, which reads the same plans: kernels/forward.py.
//
// Grid: (row blocks, programs of a block). Each program runs a list of tiles; a tile is some columns of a group of units:
//
//   softmax   p [reads, rows of the block] of each unit of the group, to scratch: logits by products with the gates' rows
//   mix       for every expert of the group: y = act(W h + b), and for every unit that reads it out += (p + v) y
#pragma once
#include "activation.h"
#include "walk.h"

namespace fusedmoe::cuda {

enum What { write_softmax = 1, write_weights = 2 };
// Numbers of a tile, and of a group before its units.
constexpr int tile_size = 5, group_head = 5;

struct Call {
  Network network;
  int place, keep, units;
  bool aligned, stored, once;
};

// What a block has in shared memory: panels of sources in a circle, STAGES of weights, one of hidden outputs, and what is known of the pieces ahead.
template <class P, class Ahead, int STAGES, bool INNER>
struct Layout {
  using T = typename P::PanelA::Number;
  using A = typename P::PanelA;
  using B = typename P::PanelB;
  // Pieces that are known and not yet copied, or copied in this step.
  static constexpr int known = 4;
  static_assert(known > STAGES);
  int panels;

  // Up to `keep` columns of a source stay while its maps are multiplied. In a circle of STAGES or more, a copy that is STAGES - 1 steps ahead
  // overwrites nothing that is still read.
  static __host__ __device__ __forceinline__ int panels_for(int keep) {
    const int pieces = keep / A::columns;
    return pieces > STAGES ? pieces : STAGES;
  }
  static __host__ __device__ __forceinline__ int bytes(int panels) {
    return (panels + int(INNER)) * A::bytes + STAGES * B::bytes + known * int(sizeof(Piece<T>)) + int(sizeof(Ahead));
  }

  __device__ __forceinline__ char* b(int at) const { return shared_memory<char>() + at * B::bytes; }
  __device__ __forceinline__ char* hidden() const { return b(STAGES); }
  __device__ __forceinline__ Piece<T>& known_piece(int number) const {
    return reinterpret_cast<Piece<T>*>(b(STAGES) + int(INNER) * A::bytes)[number % known];
  }
  __device__ __forceinline__ Ahead& ahead() const { return *reinterpret_cast<Ahead*>(&known_piece(0) + known); }
  __device__ __forceinline__ char* a(int at) const { return reinterpret_cast<char*>(&ahead() + 1) + at * A::bytes; }
  __device__ __forceinline__ int next(int at, int by = 1) const { return at + by < panels ? at + by : at + by - panels; }
};

// The tiles of one instance: at most UNITS units are mixed at a time.
template <class T, int ROWS, int COLUMNS, int UNITS, int THREADS, bool INNER>
struct Forward {
  static constexpr int stages = 3;
  using P = Product<T, ROWS, COLUMNS, THREADS>;
  using Sums = typename P::Sums;
  using Ahead = Walk<T, COLUMNS, INNER>;
  using Where = Layout<P, Ahead, stages, INNER>;

  const Call& call;
  const Block<T> block;
  const Where layout;

  __device__ __forceinline__ int plan(int at) const { return block.plan(at); }

  // A list under way: whose turn it is, how many pieces have been asked for, and where the panels of the source at hand begin.
  struct Stream {
    Ring<stages> ring;
    int asked = 0, base = 0;
  };

  // Begin to copy what a list needs.
  __device__ __forceinline__ Stream stream(const List& list, const Outputs& outputs) const {
    Stream of;
    if (thread() == 0) {
      Ahead& ahead = layout.ahead();
      ahead.panels = layout.panels, ahead.keep = call.keep > 0, ahead.list = list, ahead.outputs = outputs;
      ahead.begin(block);
      FUSEDMOE_CUDA_ROLLED
      for (int i = 0; i < stages - 1; i++) ahead.next(block, layout.known_piece(i));
    }
    sync_block();
    of.ring.start([&](int place) { copy(of, place); });
    if (thread() == 0) layout.ahead().next(block, layout.known_piece(stages - 1));
    return of;
  }
  // The next step of a list: return the place of its weight.
  __device__ __forceinline__ int step(Stream& of) const {
    const int place = of.ring.step([&](int later) { copy(of, later); });
    // The one after those that were asked for: who read it before has met the block since.
    if (thread() == 0) layout.ahead().next(block, layout.known_piece(of.asked));
    return place;
  }
  __device__ __forceinline__ void copy(Stream& of, int place) const {
    const Piece<T> next = layout.known_piece(of.asked++);
    if (!next.here) return;
    if (next.to >= 0) copy_panel<typename P::PanelA, THREADS>(layout.a(next.to), next.a, next.columns, call.aligned, Rows{block.live, next.a_distance});
    const int* list = next.list < 0 ? nullptr : block.network.plan + next.list;
    copy_panel<typename P::PanelB, THREADS>(layout.b(place), next.b, next.columns, call.aligned, Rows{next.live, next.b_distance, list});
  }

  // z += W h of a map without one inside. Return the number of its pieces.
  __device__ __forceinline__ int multiply(Stream& of, int one, Sums& z, int live) const {
    int pieces = 0;
    FUSEDMOE_CUDA_ROLLED
    for (int source = 0; source < plan(one + 7); source++) {
      int left = plan(one + map_head + source * source_size + 4);
      do {
        const int place = step(of);
        P::multiply(layout.a(layout.next(of.base, call.keep > 0 ? pieces : 0)), layout.b(place), z, call.once, live);
        pieces++;
        if (call.keep == 0) of.base = layout.next(of.base);
        left -= piece<T>;
      } while (left > 0);
    }
    return pieces;
  }

  // z = W h + b of the map `one`, whose outputs `walk` was told too. Where it has one inside, that hidden layer goes through shared memory,
  // COLUMNS outputs at a time.
  __device__ __forceinline__ int linear(Stream& of, int one, const Outputs& outputs, Sums& z) const {
    P::clear(z);
    int pieces = 0;
    const int inner = INNER ? plan(one + 6) : -1;
    if (inner < 0) {
      pieces = multiply(of, one, z, outputs.live);
    } else {
      const int reduction = plan(one + 3);
      FUSEDMOE_CUDA_ROLLED
      for (int first = 0; first < reduction; first += COLUMNS) {
        Sums h;
        P::clear(h);
        pieces = multiply(of, inner, h, COLUMNS);
        hand_inside(inner, {first, plan(inner + 2) - first, -1}, h);
        const int place = step(of);
        P::multiply(layout.hidden(), layout.b(place), z, call.once, outputs.live);
      }
    }
    add_bias(one, outputs, z);
    return pieces;
  }

  __device__ __forceinline__ void add_bias(int one, const Outputs& outputs, Sums& z) const {
    const int number = plan(one + 1);
    if (number < 0) return;
    const T* bias = block.parameter(number) + outputs.first;
    const auto term = [&](int column) {
      if (column >= outputs.live) return 0.0f;
      const int at = outputs.list < 0 ? column : plan(outputs.list + column);
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

  __device__ __forceinline__ void activate(int one, Sums& z) const {
    const float parameter = block.number(plan(one + 5));
    choose(plan(one + 4), [&](auto act) {
      P::visit(z, [&](int, int, float& low, float& high) {
        low = act.value(low, parameter);
        high = act.value(high, parameter);
      });
    });
  }

  // act(z + b) of hidden outputs, in T, to their panel. The next step's barrier stands between this and its readers, and the last step's between
  // those of the outputs before and this.
  __device__ __forceinline__ void hand_inside(int inner, const Outputs& outputs, Sums& z) const {
    add_bias(inner, outputs, z);
    activate(inner, z);
    P::visit(z, [&](int row, int column, float low, float high) {
      // Beyond the layer stands 0 h, which is NaN where h is infinite, and NaN x 0 is NaN.
      const bool both = column + 1 < outputs.live, one = column < outputs.live;
      put(layout.hidden() + row * P::PanelA::pitch, column, one ? low : 0.0f, both ? high : 0.0f);
    });
  }
  // Two neighbours of a row in shared memory.
  static __device__ __forceinline__ void put(char* row, int column, float low, float high) {
    if constexpr (sizeof(T) == 2) *reinterpret_cast<uint32_t*>(row + column * 2) = rounded_pair<T>(low, high);
    else *reinterpret_cast<Vector<float, 2>*>(row + column * 4) = {low, high};
  }

  // One map of a list under way, for a group: a gate's logits to scratch, or an expert into what its units mix.
  __device__ __forceinline__ int gate(Stream& of, int record, int64_t first) const {
    const int unit = plan(record), one = plan(unit), reads = plan(unit + 1);
    int pieces = 0;
    FUSEDMOE_CUDA_ROLLED
    for (int read = 0; one >= 0 && read < reads; read += COLUMNS) {
      Sums z;
      const Outputs outputs{0, reads - read, plan(unit + 2) + read};
      pieces = linear(of, one, outputs, z);
      store_logits(outputs, block.softmax(first + plan(record + 1) + read), z);
    }
    return pieces;
  }

  // The softmax of every unit of a group: logits of all of them first, so that the block waits for its own stores once.
  __device__ __forceinline__ void softmaxes(int group, int64_t first) const {
    const int list = plan(group + 4), runs = plan(list);
    Stream of = stream({list + 1, runs, 2, true}, {});
    int record = list + 1;
    FUSEDMOE_CUDA_ROLLED
    for (int run = 0; run < runs; run++) {
      int pieces = 0, count = plan(record + source_size);
      record += source_size + 1;
      FUSEDMOE_CUDA_ROLLED
      for (; count > 0; count--, record += 2) {
        // A unit without a gate reads nothing, as all others of its run.
        pieces = gate(of, record, first);
      }
      if (call.keep > 0) of.base = layout.next(of.base, pieces);
    }
    of.ring.finish();
    FUSEDMOE_CUDA_ROLLED
    for (int u = 0; u < plan(group); u++)
      normalize(plan(group + group_head + u), block.softmax(first + plan(group + group_head + call.units + u)));
    sync_block();
  }
  __device__ __forceinline__ void store_logits(const Outputs& outputs, float* p, Sums& z) const {
    P::visit(z, [&](int row, int column, float low, float high) {
      const auto store = [&](int read, float value) {
        if (row < block.live && read < outputs.live)
          store_global(p + read * block.network.rows + row, plan(outputs.list + read) < 0 ? -INFINITY : value);
      };
      store(column, low);
      store(column + 1, high);
    });
  }
  // exp(z) / sum of exp(z) over a unit's reads, each row by a few neighbouring lanes; 0 without a gate.
  __device__ __forceinline__ void normalize(int unit, float* p) const {
    constexpr int lanes = THREADS / ROWS;
    const int row = thread() / lanes, begin = thread() % lanes;
    const bool live = row < block.live, gated = plan(unit) >= 0;
    const int reads = live ? plan(unit + 1) : 0;
    const auto at = [&](int read) { return p + read * block.network.rows + row; };
    float largest = -INFINITY, sum = 0.0f;
    if (gated)
      for (int read = begin; read < reads; read += lanes) largest = fmaxf(largest, load_global(at(read)));
    largest = max_lanes<lanes>(largest);
    if (gated)
      for (int read = begin; read < reads; read += lanes) sum += expf(load_global(at(read)) - largest);
    sum = sum_lanes<lanes>(sum);
    for (int read = begin; read < reads; read += lanes) store_global(at(read), gated ? expf(load_global(at(read)) - largest) / sum : 0.0f);
  }

  // weights[row, column of a read] = p + v.
  __device__ __forceinline__ void store_weights(int unit, const float* p) const {
    const int columns = plan(unit + 10), reads = columns < 0 ? 0 : plan(unit + 1);
    FUSEDMOE_CUDA_ROLLED
    for (int i = thread(); i < reads * ROWS; i += THREADS) {
      const int row = i % ROWS, read = i / ROWS;
      if (row >= block.live) continue;
      T* weights = static_cast<T*>(block.network.weights) + (block.row + row) * block.network.mixing + plan(columns + read);
      store_global(weights, rounded<T>(load_global(p + read * block.network.rows + row) + block.static_weight(unit, read)));
    }
  }

  // Columns `column`.. of every unit of a group: out[u] = sum over e of (p + v) y[e].
  __device__ __forceinline__ void mix(int group, int column, int64_t first) const {
    const int units = group + group_head, live = plan(group + 1) - column, runs = plan(group + 2);
    Sums mixed[UNITS];
    FUSEDMOE_CUDA_UNROLL
    for (int u = 0; u < UNITS; u++) P::clear(mixed[u]);
    int record = units + 2 * call.units;
    const Outputs outputs{column, live, -1};
    Stream of = stream({record, runs, 1 + call.units, false}, outputs);
    FUSEDMOE_CUDA_ROLLED
    for (int run = 0; run < runs; run++) {
      const int count = plan(record + source_size);
      record += source_size + 1;
      int pieces = 0;
      FUSEDMOE_CUDA_ROLLED
      for (int i = 0; i < count; i++, record += 1 + call.units) {
        Sums z;
        const int one = plan(record);
        pieces = linear(of, one, outputs, z);
        activate(one, z);
        add(units, record, first, z, mixed);
      }
      if (call.keep > 0) of.base = layout.next(of.base, pieces);
    }
    of.ring.finish();
    FUSEDMOE_CUDA_ROLLED
    for (int i = plan(group + 3); i > 0; i--, record += 1 + call.units) {
      Sums z;
      read_copy(plan(record), outputs, z);
      add(units, record, first, z, mixed);
    }
    FUSEDMOE_CUDA_UNROLL
    for (int u = 0; u < UNITS; u++)
      if (u < call.units && plan(units + u) >= 0) store(plan(units + u), outputs, mixed[u]);
  }

  // mixed[u] += (p + v) y in every unit that reads this expert.
  __device__ __forceinline__ void add(int units, int record, int64_t first, const Sums& y, Sums (&mixed)[UNITS]) const {
    FUSEDMOE_CUDA_UNROLL
    for (int u = 0; u < UNITS; u++) {
      const int read = u < call.units ? plan(record + 1 + u) : -1;
      if (read < 0) continue;
      const float v = block.static_weight(plan(units + u), read);
      const float* p = block.softmax(first + plan(units + call.units + u) + read);
      FUSEDMOE_CUDA_UNROLL
      for (int i = 0; i < P::M; i++)
        FUSEDMOE_CUDA_UNROLL
        for (int half = 0; half < 2; half++) {
          const int row = P::row(i, half);
          const float w = (row < block.live ? load_global(p + row) : 0.0f) + v;
          FUSEDMOE_CUDA_UNROLL
          for (int j = 0; j < P::N; j++) {
            mixed[u].at[i][j][2 * half] += w * y.at[i][j][2 * half];
            mixed[u].at[i][j][2 * half + 1] += w * y.at[i][j][2 * half + 1];
          }
        }
    }
  }

  // z = the columns of a map that is a copy of its source.
  __device__ __forceinline__ void read_copy(int one, const Outputs& outputs, Sums& z) const {
    const Row<T> h = block.rows_of(one + map_head);
    P::visit(z, [&](int row, int column, float& low, float& high) {
      const T* at = h.first + row * h.distance + outputs.first + column;
      low = row < block.live && column < outputs.live ? widened(load_global(at)) : 0.0f;
      high = row < block.live && column + 1 < outputs.live ? widened(load_global(at + 1)) : 0.0f;
    });
  }

  // A unit's columns, rounded, to where it goes. A warp's part passes through shared memory, so that 16 bytes are written at a time.
  __device__ __forceinline__ void store(int unit, const Outputs& outputs, Sums& from) const {
    constexpr int columns = P::N * 8, rows = P::M * 16, pitch = columns * int(sizeof(T)) + 16, numbers = 16 / int(sizeof(T)), vectors = columns / numbers;
    static_assert(rows * pitch * P::warps <= stages * P::PanelA::bytes);
    char* part = layout.a(0) + warp() * rows * pitch;
    const int first_row = warp() % P::down * rows, first_column = P::first_column();
    // Of the unit before, all have been read.
    sync_warp();
    P::visit(from, [&](int row, int column, float low, float high) { put(part + (row - first_row) * pitch, column - first_column, low, high); });
    sync_warp();
    const Row<T> to = block.rows_of(unit + 6);
    const auto each = [&](auto number, int across) {
      using Stored = decltype(number);
      FUSEDMOE_CUDA_ROLLED
      for (int i = lane(); i < rows * across; i += 32) {
        const int row = i / across, column = i % across * (columns / across);
        if (first_row + row >= block.live || first_column + column >= outputs.live) continue;
        T* at = to.first + (first_row + row) * to.distance + outputs.first + first_column + column;
        store_global(reinterpret_cast<Stored*>(at), *reinterpret_cast<const Stored*>(part + row * pitch + column * int(sizeof(T))));
      }
    };
    if (call.stored) each(Vector<T, numbers>{}, vectors);
    else each(T{}, columns);
  }

  __device__ __forceinline__ void run() const {
    const int program = call.place + 2 * block_y(), first = plan(program), end = plan(program + 1);
    if constexpr (INNER) clear_hidden();
    FUSEDMOE_CUDA_ROLLED
    for (int tile = first; tile < end; tile += tile_size) {
      const int group = plan(tile), scratch = plan(tile + 2), what = plan(tile + 3);
      // The block has read its shared memory, and sees what the tiles before wrote.
      if (tile != first) sync_block();
      if (what >= write_softmax) softmaxes(group, scratch);
      if (what == write_weights && call.network.weights)
        for (int u = 0; u < plan(group); u++)
          store_weights(plan(group + group_head + u), block.softmax(scratch + plan(group + group_head + call.units + u)));
      mix(group, plan(tile + 1), scratch);
    }
  }
  // Of the panel of hidden outputs a product reads more columns than are ever written.
  __device__ __forceinline__ void clear_hidden() const {
    if constexpr (COLUMNS < piece<T>)
      for (int i = thread() * 4; i < P::PanelA::bytes; i += THREADS * 4) *reinterpret_cast<uint32_t*>(layout.hidden() + i) = 0;
  }
};

template <class T, int ROWS, int COLUMNS, int UNITS, int THREADS, int BLOCKS, bool INNER>
__global__ void __launch_bounds__(THREADS, BLOCKS) forward_kernel(const __grid_constant__ Call call) {
  using Of = Forward<T, ROWS, COLUMNS, UNITS, THREADS, INNER>;
  const int64_t row = int64_t(block_x()) * ROWS, left = call.network.rows - row;
  const Of of{call, {call.network, row, int(left < ROWS ? left : ROWS)}, {Of::Where::panels_for(call.keep)}};
  of.run();
}

}  // namespace fusedmoe::cuda
