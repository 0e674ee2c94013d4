// The forward of any segments in one launch. Formulas: fusedmoe/reference/operator.py; its twin in
// Triton, which reads the same plans: kernels/triton/forward.py.
//
// Grid: (row blocks, programs of a block). Each program runs a list of tiles; a tile is some
// columns of a group of units:
//
//   softmax   p [reads, rows of the block] of each unit of the group, to scratch: logits by
//             products with the gates' rows
//   mix       for every expert of the group: y = act(W h + b), and for every unit that reads it out += (p + v) y
#pragma once
#include "mainloop.h"

namespace fusedmoe::cuda {

// The tiles of one instance: at most UNITS units are mixed at a time.
template <class T, int ROWS, int COLUMNS, int UNITS, int THREADS, bool HIDDEN>
struct Forward {
  using P = Product<T, ROWS, COLUMNS, THREADS>;
  using Sums = typename P::Sums;
  using Loop = Mainloop<T, P, HIDDEN>;
  using Shared = typename Loop::Shared;
  static_assert(store_bytes<P, T> <= Loop::stages * P::PanelA::bytes);
  // Shared memory of a launch: that of the linears, and the weights w [UNITS, ROWS] of this expert
  // and of the next one.
  static __host__ __device__ __forceinline__ int bytes(int resident) {
    return Shared::bytes(Shared::panels_for(resident)) + 2 * UNITS * ROWS * int(sizeof(float));
  }

  const Call& call;
  const Shared layout;

  __device__ __forceinline__ Block<T> block() const { return block_of<T, ROWS>(call); }
  __device__ __forceinline__ int plan(int at) const { return load_global(call.network.plan + at); }

  // What the plan says of a tile is read where it is needed, each time: accumulators need the
  // registers. Its group's units, and the rows of their softmax, or of one of their reads.
  __device__ __forceinline__ int group(int tile) const { return plan(tile + TileRecord::group); }
  __device__ __forceinline__ int unit(int tile, int u) const { return plan(group(tile) + GroupRecord::size + u); }
  __device__ __forceinline__ float* softmax(int tile, int u, int read = 0) const {
    return block().softmax(plan(tile + TileRecord::softmax) + plan(group(tile) + GroupRecord::size + call.units + u) +
                           read);
  }

  // Integers of an expert in a run: its record, and its place among the reads of each unit.
  __device__ __forceinline__ int expert_size() const { return ExpertReadRecord::size + call.units; }

  // A tile: the logits of its gates and what its units mix come from one loop over linears, so that
  // its code is there once.
  __device__ __forceinline__ void run(int tile) const {
    Sums mixed[UNITS];
    Loop loop{call, layout};
    int record = 0, parity = 0;
    FUSEDMOE_CUDA_ROLLED
    for (bool gates = plan(tile + TileRecord::task) >= write_softmax;; gates = false) {
      if (!gates)
        FUSEDMOE_CUDA_UNROLL
        for (int u = 0; u < UNITS; u++) P::clear(mixed[u]);
        record =
            gates ? plan(group(tile) + GroupRecord::selectors) + 1 : group(tile) + GroupRecord::size + 2 * call.units;
        int runs = plan(gates ? record - 1 : group(tile) + GroupRecord::runs);
        loop.begin({record, runs, gates ? GateReadRecord::size : expert_size(), gates}, columns(tile));
        if (!gates && runs > 0) put_weights(parity ^= 1, weights_of(tile, record + RunRecord::size));
        FUSEDMOE_CUDA_ROLLED
        for (; runs > 0; runs--) {
          int k_tiles = 0, count = plan(record + RunRecord::count);
          record += RunRecord::size;
          FUSEDMOE_CUDA_ROLLED
          for (; count > 0; count--, record += gates ? GateReadRecord::size : expert_size()) {
            Columns outputs = gates ? reads(plan(record + GateReadRecord::unit)) : columns(tile);
            // The next expert's weights are loaded while this one is multiplied.
            const int after = gates ? -1 : next_expert(record, count, runs);
            Part next;
            if (after >= 0) next = weights_of(tile, after);
            FUSEDMOE_CUDA_ROLLED
            for (; outputs.live > 0; outputs.live -= COLUMNS, outputs.list += COLUMNS) {
              Sums z;
              const int linear = gates ? plan(plan(record + GateReadRecord::unit) + UnitRecord::gate)
                                       : plan(record + ExpertReadRecord::linear);
              k_tiles = loop.linear_forward(linear, outputs, z);
              if (gates) {
                store_logits(tile, record, outputs, z);
                continue;
              }
              activate<P>(block(), linear, z);
              add(record, parity, z, mixed);
              if (after >= 0) put_weights(parity ^= 1, next);
              break;
            }
          }
          loop.leave_source(k_tiles);
        }
      loop.finish();
      if (!gates) break;
      normalize(tile);
      if (plan(tile + TileRecord::task) == write_weights) store_weights(tile);
    }
    add_copies(tile, record, parity, mixed);
    store(tile, mixed);
  }

  // The record of the expert behind one of a run, or -1.
  __device__ __forceinline__ int next_expert(int record, int count, int runs) const {
    if (count > 1) return record + expert_size();
    return runs > 1 ? record + expert_size() + RunRecord::size : -1;
  }

  // The copies of a group, whose records begin at `record`.
  __device__ __forceinline__ void add_copies(int tile, int record, int parity, Sums (&mixed)[UNITS]) const {
    FUSEDMOE_CUDA_ROLLED
    for (int i = plan(group(tile) + GroupRecord::copies); i > 0; i--, record += expert_size()) {
      Sums z;
      put_weights(parity ^= 1, weights_of(tile, record));
      sync_block();
      P::clear(z);
      add_tile<P>(block().rows_of(plan(record + ExpertReadRecord::linear) + LinearRecord::size), columns(tile),
                  block().live, call.aligned, z);
      add(record, parity, z, mixed);
    }
  }

  __device__ __forceinline__ void store(int tile, Sums (&mixed)[UNITS]) const {
    FUSEDMOE_CUDA_UNROLL
    for (int u = 0; u < UNITS; u++)
      if (u < call.units && unit(tile, u) >= 0)
        store_tile<P>(layout.a(0), mixed[u], block().rows_of(unit(tile, u) + UnitRecord::place), columns(tile),
                      block().live, call.store_aligned);
  }

  __device__ __forceinline__ Columns columns(int tile) const {
    return {plan(tile + TileRecord::column), plan(group(tile) + GroupRecord::width) - plan(tile + TileRecord::column),
            -1};
  }
  // The rows of a unit's gate in the order of its reads; none without a gate.
  __device__ __forceinline__ Columns reads(int unit) const {
    return {0, plan(unit + UnitRecord::gate) < 0 ? 0 : plan(unit + UnitRecord::reads), plan(unit + UnitRecord::seen)};
  }
  __device__ __forceinline__ void store_logits(int tile, int record, const Columns& outputs, Sums& z) const {
    const int first = plan(tile + TileRecord::softmax) + plan(record + GateReadRecord::row) + outputs.list -
                      plan(plan(record + GateReadRecord::unit) + UnitRecord::seen);
    float* p = block().softmax(first);
    P::visit(z, [&](int row, int column, float low, float high) {
      const auto store = [&](int read, float value) {
        if (row < block().live && read < outputs.live)
          store_global(p + read * call.network.rows + row, plan(outputs.list + read) < 0 ? -INFINITY : value);
      };
      store(column, low);
      store(column + 1, high);
    });
  }
  // p of every unit, from the logits that the block has stored.
  __device__ __forceinline__ void normalize(int tile) const {
    FUSEDMOE_CUDA_ROLLED
    for (int u = 0; u < plan(group(tile) + GroupRecord::units); u++) normalize(unit(tile, u), softmax(tile, u));
    sync_block();
  }
  // exp(z) / sum of exp(z) over a unit's reads, each row by a few neighbouring lanes; 0 without a
  // gate.
  __device__ __forceinline__ void normalize(int unit, float* p) const {
    constexpr int lanes = THREADS / ROWS;
    const int row = thread() / lanes, begin = thread() % lanes;
    const bool live = row < block().live, gated = plan(unit + UnitRecord::gate) >= 0;
    const int reads = live ? plan(unit + UnitRecord::reads) : 0;
    const auto at = [&](int read) { return p + read * call.network.rows + row; };
    float largest = -INFINITY, sum = 0.0f;
    if (gated)
      for (int read = begin; read < reads; read += lanes) largest = fmaxf(largest, load_global(at(read)));
    largest = max_lanes<lanes>(largest);
    if (gated)
      for (int read = begin; read < reads; read += lanes) sum += expf(load_global(at(read)) - largest);
    sum = sum_lanes<lanes>(sum);
    for (int read = begin; read < reads; read += lanes)
      store_global(at(read), gated ? expf(load_global(at(read)) - largest) / sum : 0.0f);
  }

  // weights[row, column of a read] = p + v, if somebody asked for them.
  __device__ __forceinline__ void store_weights(int tile) const {
    FUSEDMOE_CUDA_ROLLED
    for (int u = 0; call.network.weights && u < plan(group(tile) + GroupRecord::units); u++)
      store_weights(unit(tile, u), softmax(tile, u));
  }
  __device__ __forceinline__ void store_weights(int unit, const float* p) const {
    const int columns = plan(unit + UnitRecord::mixing), reads = columns < 0 ? 0 : plan(unit + UnitRecord::reads);
    FUSEDMOE_CUDA_ROLLED
    for (int i = thread(); i < reads * ROWS; i += THREADS) {
      const int row = i % ROWS, read = i / ROWS;
      if (row >= block().live) continue;
      T* weights =
          static_cast<T*>(call.network.weights) + (block().row + row) * call.network.mixing + plan(columns + read);
      store_global(weights,
                   rounded<T>(load_global(p + read * call.network.rows + row) + block().static_weight(unit, read)));
    }
  }

  // w [UNITS, ROWS] = p + v of one expert in every unit that reads it: what each thread brings of
  // it. Added later: who adds must wait for both.
  static constexpr int turns = (UNITS * ROWS + THREADS - 1) / THREADS;
  struct Part {
    float p[turns], v[turns];
  };
  __device__ __forceinline__ Part weights_of(int tile, int record) const {
    Part part;
    FUSEDMOE_CUDA_UNROLL
    for (int turn = 0; turn < turns; turn++) {
      const int i = turn * THREADS + thread(), u = i / ROWS, row = i % ROWS,
                read = u < call.units ? plan(record + ExpertReadRecord::size + u) : -1;
      part.p[turn] = part.v[turn] = 0.0f;
      if (read < 0 || row >= block().live) continue;
      part.p[turn] = load_global(softmax(tile, u, read) + row);
      part.v[turn] = block().static_weight(unit(tile, u), read);
    }
    return part;
  }
  // To shared memory, where the next barrier lets others see it. What was there is of the expert
  // before the last one: it is not read any more.
  __device__ __forceinline__ void put_weights(int parity, const Part& part) const {
    FUSEDMOE_CUDA_UNROLL
    for (int turn = 0; turn < turns; turn++)
      if (const int i = turn * THREADS + thread(); i < UNITS * ROWS) weights(parity)[i] = part.p[turn] + part.v[turn];
  }
  __device__ __forceinline__ float* weights(int parity) const {
    return reinterpret_cast<float*>(layout.a(layout.panels)) + parity * UNITS * ROWS;
  }

  // mixed[u] += (p + v) y in every unit that reads this expert.
  __device__ __forceinline__ void add(int record, int parity, const Sums& y, Sums (&mixed)[UNITS]) const {
    FUSEDMOE_CUDA_UNROLL
    for (int u = 0; u < UNITS; u++) {
      if (u >= call.units || plan(record + ExpertReadRecord::size + u) < 0) continue;
      FUSEDMOE_CUDA_UNROLL
      for (int i = 0; i < P::M; i++)
        FUSEDMOE_CUDA_UNROLL
        for (int half = 0; half < 2; half++) {
          const float w = weights(parity)[u * ROWS + P::row(i, half)];
          FUSEDMOE_CUDA_UNROLL
          for (int j = 0; j < P::N; j++) {
            mixed[u].at[i][j][2 * half] += w * y.at[i][j][2 * half];
            mixed[u].at[i][j][2 * half + 1] += w * y.at[i][j][2 * half + 1];
          }
        }
    }
  }
};

template <class T, int ROWS, int COLUMNS, int UNITS, int THREADS, int BLOCKS, bool HIDDEN>
__global__ void __launch_bounds__(THREADS, BLOCKS) forward_kernel(const __grid_constant__ Call call) {
  using Of = Forward<T, ROWS, COLUMNS, UNITS, THREADS, HIDDEN>;
  const Of of{call, {call.panels}};
  const int program = call.place + 2 * block_y();
  typename Of::Loop{call, of.layout}.clear_hidden();
  FUSEDMOE_CUDA_ROLLED
  for (int tile = of.plan(program); tile < of.plan(program + 1); tile += TileRecord::size) {
    of.run(tile);
    // The block has read its shared memory, and will see what this tile wrote.
    sync_block();
  }
}

}  // namespace fusedmoe::cuda
