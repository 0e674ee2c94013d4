// Blocks transposed in registers, and the linears of few rows, whose lanes run over the outputs
// instead of the rows.
#pragma once
#include "gemm.h"
#if FUSEDMOE_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace fusedmoe::cpu::FUSEDMOE_ISA {

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
template <int LANES>
struct Floats {
  typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
};
template <int LANES>
using floats = typename Floats<LANES>::vec;

// Where row i + 4 l of a matrix stands, for i below 4.
struct Rows {
  const float* first;
  int64_t stride;

  auto operator()(int i) const {
    const float* row = first + i * stride;
    asm("" : "+r"(row));  // or GCC keeps a pointer for every row and runs out of registers
    return [row, step = 4 * stride](int l) { return *(const quad*)(row + l * step); };
  }
};

// Four numbers of one row a lane, transposed: t[j] lane (i + 4 l) = number j of row (i + 4 l).
// Blocks of 4 x 4 are transposed inside 128 bits; loading row i + 4 l into part l of vector i does
// the rest.
template <int LANES, class Source>
inline void transpose_tile(Source rows, floats<LANES>* t) {
  FUSEDMOE_UNROLL
  for (int i = 0; i < 4; i++) {
    auto part = rows(i);
    // Intrinsics, because GCC 12 makes a load and a shuffle of the portable form; these place what
    // they load.
#if FUSEDMOE_VECTOR_BYTES == 64
    if constexpr (LANES == 16) {
      __m512 row = _mm512_castps128_ps512((__m128)part(0));
      row = _mm512_mask_broadcast_f32x4(row, 0x00f0, (__m128)part(1));
      row = _mm512_mask_broadcast_f32x4(row, 0x0f00, (__m128)part(2));
      t[i] = (floats<LANES>)_mm512_mask_broadcast_f32x4(row, 0xf000, (__m128)part(3));
    }
#endif
#if FUSEDMOE_VECTOR_BYTES >= 32
    if constexpr (LANES == 8)
      t[i] = (floats<LANES>)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)part(0)), (__m128)part(1), 1);
#endif
    if constexpr (LANES == 4) t[i] = part(0);
  }
  [&]<int... I>(std::integer_sequence<int, I...>) {
    floats<LANES> a = __builtin_shufflevector(t[0], t[1], (I / 4 * 4 + I % 4 / 2 + I % 2 * LANES)...);
    floats<LANES> b = __builtin_shufflevector(t[0], t[1], (I / 4 * 4 + I % 4 / 2 + 2 + I % 2 * LANES)...);
    floats<LANES> c = __builtin_shufflevector(t[2], t[3], (I / 4 * 4 + I % 4 / 2 + I % 2 * LANES)...);
    floats<LANES> d = __builtin_shufflevector(t[2], t[3], (I / 4 * 4 + I % 4 / 2 + 2 + I % 2 * LANES)...);
    t[0] = __builtin_shufflevector(a, c, (I / 4 * 4 + I % 2 + I % 4 / 2 * LANES)...);
    t[1] = __builtin_shufflevector(a, c, (I / 4 * 4 + I % 2 + 2 + I % 4 / 2 * LANES)...);
    t[2] = __builtin_shufflevector(b, d, (I / 4 * 4 + I % 2 + I % 4 / 2 * LANES)...);
    t[3] = __builtin_shufflevector(b, d, (I / 4 * 4 + I % 2 + 2 + I % 4 / 2 * LANES)...);
  }(std::make_integer_sequence<int, LANES>());
}

// to[c * ld_to + r] = from[r * ld_from + c] for `rows` x `columns`; columns `rows` .. `fill` of
// `to` become 0.
template <class T>
void transpose(const T* from, int64_t ld_from, int64_t rows, int64_t columns, T* to, int64_t ld_to, int64_t fill) {
  constexpr int lanes = Lanes<T>::count;
  for (int64_t r = 0; r < fill; r += lanes) {
    int64_t c = 0;
    if constexpr (sizeof(T) == 4)
      if (r + lanes <= rows)
        for (; c + 4 <= columns; c += 4) {
          vec<float> t[4];
          transpose_tile<lanes>(Rows{from + r * ld_from + c, ld_from}, t);
          FUSEDMOE_UNROLL
          for (int j = 0; j < 4; j++) store<T>(to + (c + j) * ld_to + r, t[j]);
        }
    for (; c < columns; c++)
      for (int64_t i = r; i < fill && i < r + lanes; i++) to[c * ld_to + i] = i < rows ? from[i * ld_from + c] : T(0);
  }
}

// y = act(the chains' sum + bias), `width` outputs of each of G vectors.
template <int R, int LANES, int G>
inline void finish_few(const Product<float>& p, floats<LANES> (&sum)[G][R], floats<LANES> (&acc)[G][R], int64_t width) {
  FUSEDMOE_UNROLL
  for (int g = 0; g < G; g++)
    FUSEDMOE_UNROLL
    for (int r = 0; r < R; r++) {
      floats<LANES> y = sum[g][r] + acc[g][r], bias = floats<LANES>{};
      if (p.bias) memcpy(&bias, p.bias + g * LANES, width * sizeof(float));
      if (p.bias) y = y + bias;
      if (p.relu) y = y < 0.0f ? floats<LANES>{} : y;
      memcpy(p.c + r * p.ldc + g * LANES, &y, width * sizeof(float));
    }
}

// Few rows: the lanes run over the outputs, blocks of W are transposed in registers, and W is
// streamed once. y[r * ldy + i] = act(sum of w[i * k + j] x[r * ldx + j] + bias[i]) for G vectors
// of outputs, or for `n` below one vector (EDGE).
template <int R, int LANES, int G, bool EDGE>
__attribute__((noinline)) void few_tile(const Product<float>& p, int64_t n) {
  typedef floats<LANES> lane_vec;
  const int64_t k_count = p.k, stride = p.lda;
  const float* w = p.a;
  const float* ahead = w + G * LANES * stride;  // the next tile
  lane_vec acc[G][R], sum[G][R] = {};
  const float* row_of[LANES];
  if (EDGE)
    for (int i = 0; i < LANES; i++)
      row_of[i] = w + (i < n ? i : n - 1) * stride;  // rows repeated here are dropped below
  FUSEDMOE_UNROLL
  for (int g = 0; g < G; g++)
    FUSEDMOE_UNROLL
    for (int r = 0; r < R; r++) acc[g][r] = lane_vec{};
  // Multiply `words` columns from k on, with the rows that `source(g)` gives.
  auto step = [&](int64_t k, int words, auto source) {
    lane_vec t[G][4];
    FUSEDMOE_UNROLL
    for (int g = 0; g < G; g++) transpose_tile<LANES>(source(g), t[g]);
    FUSEDMOE_UNROLL
    for (int j = 0; j < 4; j++)
      if (j < words)
        FUSEDMOE_UNROLL
        for (int r = 0; r < R; r++) {
          float x = p.b[r * p.ldb + k + j];
          FUSEDMOE_UNROLL
          for (int g = 0; g < G; g++) acc[g][r] = acc[g][r] + x * t[g][j];
        }
  };
  int64_t k = 0;
  // The end of a chain, where another one follows: `sum` is exact at 0, so the first chain passes
  // unchanged.
  auto full = [&] {
    FUSEDMOE_UNROLL
    for (int g = 0; g < G; g++)
      FUSEDMOE_UNROLL
      for (int r = 0; r < R; r++) {
        sum[g][r] = sum[g][r] + acc[g][r];
        acc[g][r] = lane_vec{};
      }
  };
  for (; k + 4 <= k_count; k += 4) {
    if (k > 0 && k % k_block == 0) full();
    FUSEDMOE_UNROLL
    for (int i = 0; i < G * LANES / 4; i++, ahead += 16) __builtin_prefetch(ahead);
    if constexpr (EDGE)
      step(k, 4,
           [&](int) { return [&](int i) { return [&, i](int l) { return *(const quad*)(row_of[i + 4 * l] + k); }; }; });
    else
      step(k, 4, [&](int g) { return Rows{w + g * LANES * stride + k, stride}; });
  }
  if (k < k_count) {
    if (k > 0 && k % k_block == 0) full();
    float last[G * LANES][4] = {};
    for (int i = 0; i < G * LANES; i++)
      memcpy(last[i], (EDGE ? row_of[i] : w + i * stride) + k, (k_count - k) * sizeof(float));
    step(k, int(k_count - k), [&](int g) { return Rows{last[g * LANES], 4}; });
  }
  finish_few<R, LANES, G>(p, sum, acc, EDGE ? n : LANES);
}

// A = W [n, k] with lda = k, B = X [R, k] row-major, C = Y [R, n] row-major.
template <int R>
inline void few(Product<float> p, int64_t n) {
  // Case "AdaTT T3m2, inference, B = 1" of bench/: with 32-byte vectors, which a Zen 4 transposes as
  // fast, a Zen 5 takes 49 us and not 34; with the next tile fetched into L2 instead of L1, 50.
  constexpr int LANES = Lanes<float>::count;
  auto advance = [&](int64_t by) {
    p.a += by * p.lda;
    p.c += by;
    if (p.bias) p.bias += by;
    n -= by;
  };
  for (; n >= 2 * LANES; advance(2 * LANES)) few_tile<R, LANES, 2, false>(p, 0);
  for (; n > 0; advance(n < LANES ? n : LANES)) few_tile<R, LANES, 1, true>(p, n < LANES ? n : LANES);
}

// C of few rows by the register tile, as wide as the registers allow, so that B is read in long
// pieces.
template <int M>
inline void multiply_few(Product<float> p, int64_t columns) {
  constexpr int lanes = Lanes<float>::count, budget = 2 * tile_rows / M;
  constexpr int widest = budget > 4 ? budget : tile_vectors;
  for (; columns >= widest * lanes; columns -= widest * lanes) {
    multiply_columns<float, widest, false, M>(p, M);
    p.b += widest * lanes;
    p.c += widest * lanes;
  }
  for (; columns > 0; columns -= lanes) {
    multiply_columns<float, 1, false, M>(p, M);
    p.b += lanes;
    p.c += lanes;
  }
}
inline void multiply_few(const Product<float>& p, int64_t rows, int64_t columns) {
  switch (rows) {
    case 1: return multiply_few<1>(p, columns);
    case 2: return multiply_few<2>(p, columns);
    case 3: return multiply_few<3>(p, columns);
    case 4: return multiply_few<4>(p, columns);
    default: multiply<float, false>(p, rows, columns);
  }
}

// run(R) with the number of rows, 1, 2, 4 or 8, that the kernels have a form for: as a constant, so
// that it can be a template's argument.
template <class Run>
inline int64_t with_few_rows(int64_t rows, Run run) {
  if (rows == 1) return run(std::integral_constant<int, 1>()), 1;
  if (rows == 2) return run(std::integral_constant<int, 2>()), 2;
  if (rows <= 4) return run(std::integral_constant<int, 4>()), 4;
  return run(std::integral_constant<int, 8>()), 8;
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
