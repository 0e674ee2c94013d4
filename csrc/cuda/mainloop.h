// A list of linears under way: the stages of shared memory, what fills them, and z = W h + b of the
// next linear.
#pragma once
#include "prefetch.h"

namespace fusedmoe::cuda {

struct Call {
  Network network;
  int place, resident, panels, units;
  bool aligned, store_aligned, allow_tf32;
};

template <class T, int ROWS>
__device__ __forceinline__ Block<T> block_of(const Call& call) {
  const int64_t row = int64_t(block_x()) * ROWS, left = call.network.rows - row;
  return {call.network, row, int(left < ROWS ? left : ROWS)};
}

// What a block has in shared memory: panels of sources in a circle, STAGES of weights, one of
// hidden outputs, and what is known of the k-tiles ahead.
template <class P, class Prefetch, int STAGES, bool HIDDEN>
struct Layout {
  using T = typename P::PanelA::Number;
  using A = typename P::PanelA;
  using B = typename P::PanelB;
  // The k-tile that is copied in this step, and the next one.
  static constexpr int known = 2;
  int panels;

  // Up to `resident` columns of a source stay while its linears are multiplied. In a circle of
  // STAGES or more, a copy that is STAGES - 1 steps ahead overwrites nothing that is still read.
  static __host__ __device__ __forceinline__ int panels_for(int resident) {
    const int k_tiles = resident / A::columns;
    return k_tiles > STAGES ? k_tiles : STAGES;
  }
  static __host__ __device__ __forceinline__ int bytes(int panels) {
    return (panels + int(HIDDEN)) * A::bytes + STAGES * B::bytes + known * int(sizeof(CopyDescriptor<T>)) +
           int(sizeof(Prefetch));
  }

  __device__ __forceinline__ char* b(int at) const { return shared_memory<char>() + at * B::bytes; }
  __device__ __forceinline__ char* hidden_panel() const { return b(STAGES); }
  __device__ __forceinline__ CopyDescriptor<T>& descriptor(int number) const {
    return reinterpret_cast<CopyDescriptor<T>*>(b(STAGES) + int(HIDDEN) * A::bytes)[number % known];
  }
  __device__ __forceinline__ Prefetch& ahead() const { return *reinterpret_cast<Prefetch*>(&descriptor(0) + known); }
  __device__ __forceinline__ char* a(int at) const { return reinterpret_cast<char*>(&ahead() + 1) + at * A::bytes; }
  __device__ __forceinline__ int next(int at, int by = 1) const {
    return at + by < panels ? at + by : at + by - panels;
  }
};

// The linears of one list after another, as P multiplies them.
template <class T, class P_, bool HIDDEN>
struct Mainloop {
  using P = P_;
  static constexpr int stages = 3;
  using Sums = typename P::Sums;
  using Prefetch = PrefetchIterator<T, P::columns, HIDDEN>;
  using Shared = Layout<P, Prefetch, stages, HIDDEN>;

  const Call& call;
  const Shared layout;
  // k-tiles that have been asked for, and where the panels of the source at hand begin.
  int asked = 0, base = 0;

  // Worked out wherever it is needed, from the number of the block: accumulators need the
  // registers.
  __device__ __forceinline__ Block<T> block() const { return block_of<T, P::rows>(call); }
  __device__ __forceinline__ int plan(int at) const { return load_global(call.network.plan + at); }

  // Begin with a list, where no other is under way.
  __device__ __forceinline__ void begin(const WorkList& list, const Columns& outputs) {
    if (thread() == 0) {
      Prefetch& ahead = layout.ahead();
      ahead.panels = layout.panels, ahead.resident = call.resident > 0, ahead.list = list, ahead.outputs = outputs;
      ahead.begin(block());
      ahead.next(block(), layout.descriptor(0));
    }
    asked = base = 0;
  }
  // Behind the last linear.
  __device__ __forceinline__ void finish() const { Ring<stages>{}.finish(); }
  // Behind the linears that read one source, of so many k-tiles.
  __device__ __forceinline__ void leave_source(int k_tiles) {
    if (call.resident > 0) base = layout.next(base, k_tiles);
  }

  // The next step: return the place of its weight. Until as many k-tiles have been asked for as
  // there are stages, nothing has arrived.
  __device__ __forceinline__ int step() {
    // `asked` modulo `stages` is the slot of the ring.
    Ring<stages> ring{int(unsigned(asked + 1) % stages)};
    const int place = ring.step([&](int later) { copy(later); });
    // Who read what stood there has met the block since.
    if (thread() == 0) layout.ahead().next(block(), layout.descriptor(asked));
    // A product wants the whole warp, which this thread has kept waiting.
    sync_warp();
    return place;
  }
  __device__ __forceinline__ void copy(int place) {
    const CopyDescriptor<T> next = layout.descriptor(asked++);
    if (!next.here) return;
    const int to = call.resident > 0 ? next.to : place;
    if (next.to >= 0)
      copy_panel<typename P::PanelA, P::threads>(layout.a(to), next.a, next.columns, call.aligned,
                                                 Rows{block().live, next.a_stride});
    const int* list = next.list < 0 ? nullptr : call.network.plan + next.list;
    copy_panel<typename P::PanelB, P::threads>(layout.b(place), next.b, next.columns, call.aligned,
                                               Rows{next.live, next.b_stride, list});
  }

  // z += W h of a linear without a hidden layer inside. Return the number of its k-tiles.
  __device__ __forceinline__ int multiply(int linear, Sums& z, int live) {
    int k_tiles = 0;
    FUSEDMOE_CUDA_ROLLED
    for (int source = 0; source < plan(linear + LinearRecord::sources); source++) {
      int left = plan(linear + LinearRecord::size + source * SourceRecord::size + SourceRecord::width);
      FUSEDMOE_CUDA_ROLLED
      for (;;) {
        const int place = step();
        if (asked < stages) continue;
        // Panels of a source that does not stay arrive in the same step as those of weights.
        P::multiply(layout.a(call.resident > 0 ? layout.next(base, k_tiles) : place), layout.b(place), z,
                    call.allow_tf32, live);
        k_tiles++;
        left -= k_tile<T>;
        if (left <= 0) break;
      }
    }
    return k_tiles;
  }

  // z = W h + b of the linear, the next of the list. Return the number of its source's k-tiles.
  // Where it has a hidden layer inside, that hidden layer goes through shared memory, as many
  // outputs at a time as the tile has columns.
  __device__ __forceinline__ int linear_forward(int linear, const Columns& outputs, Sums& z) {
    P::clear(z);
    int k_tiles = 0;
    if constexpr (HIDDEN) {
      const int hidden = plan(linear + LinearRecord::hidden),
                reduction = hidden < 0 ? 1 : plan(linear + LinearRecord::reduction);
      FUSEDMOE_CUDA_ROLLED
      for (int first = 0; first < reduction; first += P::columns) {
        Sums h;
        P::clear(h);
        k_tiles = multiply(hidden < 0 ? linear : hidden, h, hidden < 0 ? outputs.live : P::columns);
        if (hidden < 0) {
          z = h;
          continue;
        }
        hand_inside(hidden, {first, plan(hidden + LinearRecord::width) - first, -1}, h);
        const int place = step();
        P::multiply(layout.hidden_panel(), layout.b(place), z, call.allow_tf32, outputs.live);
      }
    } else {
      k_tiles = multiply(linear, z, outputs.live);
    }
    add_bias<P>(block(), linear, outputs, z);
    return k_tiles;
  }

  // act(z + b) of hidden outputs, in T, to their panel. The next step's barrier stands between this
  // and its readers, and the last step's between those of the outputs before and this.
  __device__ __forceinline__ void hand_inside(int hidden, const Columns& outputs, Sums& z) const {
    add_bias<P>(block(), hidden, outputs, z);
    activate<P>(block(), hidden, z);
    P::visit(z, [&](int row, int column, float low, float high) {
      // Beyond the layer stands 0 h, which is NaN where h is infinite, and NaN x 0 is NaN.
      const bool first_live = column < outputs.live, second_live = column + 1 < outputs.live;
      put<T>(layout.hidden_panel() + row * P::PanelA::pitch, column, first_live ? low : 0.0f,
             second_live ? high : 0.0f);
    });
  }

  // Of the panel of hidden outputs a product reads more columns than are ever written.
  __device__ __forceinline__ void clear_hidden() const {
    if constexpr (HIDDEN && P::columns < k_tile<T>)
      for (int i = thread() * 4; i < P::PanelA::bytes; i += P::threads * 4)
        *reinterpret_cast<uint32_t*>(layout.hidden_panel() + i) = 0;
  }
};

}  // namespace fusedmoe::cuda
