// Linear maps of packed weights (packing.h): the same sums as gemm.h's, so the same bits, without
// transposing blocks of W.
#pragma once
#include "forward.h"
#include "packing.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// Any number of rows: a group of outputs is a transposed A of the register tile.
struct Packed : NativeOperands {
  template <class T>
  static void linear(const Block<T>& b, const Stage& linear) {
    Product<T> p = product(b, linear);
    p.lda = packed_group;
    p.ldb = p.ldc = b.ld;
    p.span = packed_group;
    p.jump = packed_group * p.k;
    multiply<T, true>(p, linear.n, padded(b.rows));
  }
};

// Accumulators of one tile: half of the registers, so that weights and inputs never spill them.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int packed_accumulators = 16;
#else
constexpr int packed_accumulators = 8;
#endif

// sum[r][v] += C whole chains side by side (or `count` products of one), added in order; their
// latencies overlap.
template <int R, int V, int C>
__attribute__((always_inline)) inline void packed_k_blocks(const Product<float>& p, int64_t k, int64_t count,
                                                           vec<float> (&sum)[R][V]) {
  constexpr int lanes = Lanes<float>::count;
  const int64_t group = p.k * packed_group;
  const float* w = p.a + k * packed_group;
  const float* x = p.b + k;
  vec<float> acc[C][R][V] = {};
  for (int64_t j = 0; j < count; j++, w += packed_group, x++) {
    FUSEDMOE_UNROLL
    for (int c = 0; c < C; c++) {
      const float* at = w + c * k_block * packed_group;
      FUSEDMOE_UNROLL
      for (int v = 0; v < V; v++) {
        const vec<float> weight = load<float>(at + v * lanes / packed_group * group + v * lanes % packed_group);
        FUSEDMOE_UNROLL
        for (int r = 0; r < R; r++) acc[c][r][v] = acc[c][r][v] + x[r * p.ldb + c * k_block] * weight;
      }
    }
  }
  FUSEDMOE_UNROLL
  for (int c = 0; c < C; c++)
    FUSEDMOE_UNROLL
    for (int r = 0; r < R; r++)
      FUSEDMOE_UNROLL
      for (int v = 0; v < V; v++) sum[r][v] = sum[r][v] + acc[c][r][v];
}

// y = act(sum of w x + bias) for R rows and V vectors of outputs.
template <int R, int V, int C>
__attribute__((noinline)) void packed_tile(const Product<float>& p) {
  constexpr int lanes = Lanes<float>::count;
  vec<float> sum[R][V] = {};
  int64_t k = 0;
  if constexpr (C >= 4)
    for (; k + 4 * k_block <= p.k; k += 4 * k_block) packed_k_blocks<R, V, 4>(p, k, k_block, sum);
  if constexpr (C >= 2)
    for (; k + 2 * k_block <= p.k; k += 2 * k_block) packed_k_blocks<R, V, 2>(p, k, k_block, sum);
  for (; k < p.k; k += k_block) packed_k_blocks<R, V, 1>(p, k, p.k - k < k_block ? p.k - k : k_block, sum);
  FUSEDMOE_UNROLL
  for (int r = 0; r < R; r++)
    FUSEDMOE_UNROLL
    for (int v = 0; v < V; v++) {
      vec<float> y = sum[r][v];
      if (p.bias) y = y + load<float>(p.bias + v * lanes);
      store<float>(p.c + r * p.ldc + v * lanes, p.relu ? relu<float>(y) : y);
    }
}

// All outputs of R rows, up to the next full group: weights and biases are zero there, and the
// panel has the room.
template <int R>
void packed_few(Product<float> p, int64_t n) {
  constexpr int lanes = Lanes<float>::count, budget = packed_accumulators / R;
  // Four groups at most: enough independent sums to cover a multiply-add's latency.
  constexpr int wide = budget < 64 / lanes ? budget : 64 / lanes, narrow = wide < 16 / lanes ? wide : 16 / lanes;
  constexpr int chains = budget / narrow < 4 ? budget / narrow : 4;
  const float *a = p.a, *bias = p.bias;
  float* c = p.c;
  n = padded(n);
  for (int64_t done = 0, width = 0; done < n; done += width) {
    width = wide * lanes <= n - done ? wide * lanes : narrow * lanes;
    p.a = a + done / packed_group * packed_group * p.k + done % packed_group;
    p.c = c + done;
    if (bias) p.bias = bias + done;
    if (width == wide * lanes)
      packed_tile<R, wide, wide == narrow ? chains : 1>(p);
    else
      packed_tile<R, narrow, chains>(p);
  }
}

// The few rows of online serving: each k is one load of 16 outputs' weights.
struct PackedRowByRow : RowByRow {
  static void stage(const Block<float>& b, const Stage& linear) {
    Product<float> p = product(b, linear);
    p.ldb = padded(linear.in.width);
    p.ldc = padded(linear.n);
    const int64_t rows = with_few_rows(b.rows, [&](auto r) { packed_few<r>(p, linear.n); });
    if (!p.relu && linear.act != Act::identity)
      activate<float>(linear.act, float(linear.parameter), p.c, p.c, rows * p.ldc);
  }
};

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
