// A list of maps under way: the stages of shared memory, what fills them, and z = W h + b of the next map.
#pragma once
#include "walk.h"

namespace fusedmoe::cuda {

struct Call {
  Network network;
  int place, keep, panels, units;
  bool aligned, stored, once;
};

template <class T, int ROWS>
__device__ __forceinline__ Block<T> block_of(const Call& call) {
  const int64_t row = int64_t(block_x()) * ROWS, left = call.network.rows - row;
  return {call.network, row, int(left < ROWS ? left : ROWS)};
}

// What a block has in shared memory: panels of sources in a circle, STAGES of weights, one of hidden outputs, and what is known of the pieces ahead.
template <class P, class Ahead, int STAGES, bool INNER>
struct Layout {
  using T = typename P::PanelA::Number;
  using A = typename P::PanelA;
  using B = typename P::PanelB;
  // The piece that is copied in this step, and the next one.
  static constexpr int known = 2;
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

// The maps of one list after another, as P multiplies them.
template <class T, class P_, bool INNER>
struct Series {
  using P = P_;
  static constexpr int stages = 3;
  using Sums = typename P::Sums;
  using Ahead = Walk<T, P::columns, INNER>;
  using Where = Layout<P, Ahead, stages, INNER>;

  const Call& call;
  const Where layout;
  // Pieces that have been asked for, and where the panels of the source at hand begin.
  int asked = 0, base = 0;

  // Worked out wherever it is needed, from the number of the block: accumulators need the registers.
  __device__ __forceinline__ Block<T> block() const { return block_of<T, P::rows>(call); }
  __device__ __forceinline__ int plan(int at) const { return load_global(call.network.plan + at); }

  // Begin with a list, where no other is under way.
  __device__ __forceinline__ void begin(const List& list, const Columns& outputs) {
    if (thread() == 0) {
      Ahead& ahead = layout.ahead();
      ahead.panels = layout.panels, ahead.keep = call.keep > 0, ahead.list = list, ahead.outputs = outputs;
      ahead.begin(block());
      ahead.next(block(), layout.known_piece(0));
    }
    asked = base = 0;
  }
  // Behind the last map.
  __device__ __forceinline__ void finish() const { Ring<stages>{}.finish(); }
  // Behind the maps that read one source, of so many pieces.
  __device__ __forceinline__ void leave_source(int pieces) {
    if (call.keep > 0) base = layout.next(base, pieces);
  }

  // The next step: return the place of its weight. Until as many pieces have been asked for as there are stages, nothing has arrived.
  __device__ __forceinline__ int step() {
    // How many have been asked for says whose turn it is, too.
    Ring<stages> ring{int(unsigned(asked + 1) % stages)};
    const int place = ring.step([&](int later) { copy(later); });
    // Who read what stood there has met the block since.
    if (thread() == 0) layout.ahead().next(block(), layout.known_piece(asked));
    // A product wants the whole warp, which this thread has kept waiting.
    sync_warp();
    return place;
  }
  __device__ __forceinline__ void copy(int place) {
    const Piece<T> next = layout.known_piece(asked++);
    if (!next.here) return;
    const int to = call.keep > 0 ? next.to : place;
    if (next.to >= 0) copy_panel<typename P::PanelA, P::threads>(layout.a(to), next.a, next.columns, call.aligned, Rows{block().live, next.a_distance});
    const int* list = next.list < 0 ? nullptr : call.network.plan + next.list;
    copy_panel<typename P::PanelB, P::threads>(layout.b(place), next.b, next.columns, call.aligned, Rows{next.live, next.b_distance, list});
  }

  // z += W h of a map without one inside. Return the number of its pieces.
  __device__ __forceinline__ int multiply(int one, Sums& z, int live) {
    int pieces = 0;
    FUSEDMOE_CUDA_ROLLED
    for (int source = 0; source < plan(one + LinearRecord::sources); source++) {
      int left = plan(one + LinearRecord::size + source * SourceRecord::size + SourceRecord::width);
      FUSEDMOE_CUDA_ROLLED
      for (;;) {
        const int place = step();
        if (asked < stages) continue;
        // Panels of a source that does not stay come in the same turn as those of weights.
        P::multiply(layout.a(call.keep > 0 ? layout.next(base, pieces) : place), layout.b(place), z, call.once, live);
        pieces++;
        left -= piece<T>;
        if (left <= 0) break;
      }
    }
    return pieces;
  }

  // z = W h + b of the map `one`, the next of the list. Return the number of its source's pieces. Where it has a map inside, that hidden layer goes
  // through shared memory, as many outputs at a time as the tile has columns.
  __device__ __forceinline__ int linear(int one, const Columns& outputs, Sums& z) {
    P::clear(z);
    int pieces = 0;
    if constexpr (INNER) {
      const int inner = plan(one + LinearRecord::hidden), reduction = inner < 0 ? 1 : plan(one + LinearRecord::reduction);
      FUSEDMOE_CUDA_ROLLED
      for (int first = 0; first < reduction; first += P::columns) {
        Sums h;
        P::clear(h);
        pieces = multiply(inner < 0 ? one : inner, h, inner < 0 ? outputs.live : P::columns);
        if (inner < 0) {
          z = h;
          continue;
        }
        hand_inside(inner, {first, plan(inner + LinearRecord::width) - first, -1}, h);
        const int place = step();
        P::multiply(layout.hidden(), layout.b(place), z, call.once, outputs.live);
      }
    } else {
      pieces = multiply(one, z, outputs.live);
    }
    add_bias<P>(block(), one, outputs, z);
    return pieces;
  }

  // act(z + b) of hidden outputs, in T, to their panel. The next step's barrier stands between this and its readers, and the last step's between
  // those of the outputs before and this.
  __device__ __forceinline__ void hand_inside(int inner, const Columns& outputs, Sums& z) const {
    add_bias<P>(block(), inner, outputs, z);
    activate<P>(block(), inner, z);
    P::visit(z, [&](int row, int column, float low, float high) {
      // Beyond the layer stands 0 h, which is NaN where h is infinite, and NaN x 0 is NaN.
      const bool both = column + 1 < outputs.live, one = column < outputs.live;
      put<T>(layout.hidden() + row * P::PanelA::pitch, column, one ? low : 0.0f, both ? high : 0.0f);
    });
  }

  // Of the panel of hidden outputs a product reads more columns than are ever written.
  __device__ __forceinline__ void clear_hidden() const {
    if constexpr (INNER && P::columns < piece<T>)
      for (int i = thread() * 4; i < P::PanelA::bytes; i += P::threads * 4) *reinterpret_cast<uint32_t*>(layout.hidden() + i) = 0;
  }
};

}  // namespace fusedmoe::cuda
