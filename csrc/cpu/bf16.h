// bfloat16: the operands of the linears are rounded to it, everything else is float32. A word of 32
// bits is two neighbours of a reduction, the first one in the low half: two weights of one row as
// PyTorch stores them, or two rows of a panel, joined.
#pragma once
#include <type_traits>

#include "few.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fusedmoe::cpu::FUSEDMOE_ISA {

typedef Lanes<float>::vec floats_of;
typedef uint32_t words __attribute__((vector_size(FUSEDMOE_VECTOR_BYTES), aligned(4), may_alias));

inline words load_words(const uint32_t* p) { return *(const words*)p; }
inline floats_of low(words w) { return (floats_of)(w << 16); }
inline floats_of high(words w) { return (floats_of)(w & 0xffff0000u); }

// x to the nearest bfloat16, ties to even, in the upper half of each lane; NaN stays NaN.
inline words rounded(floats_of x) {
  words bits = (words)x;
  words up = (bits + (0x7fffu + (bits >> 16 & 1u))) & 0xffff0000u;
  return x == x ? up : (bits | 0x00400000u) & 0xffff0000u;
}
inline words join(floats_of first, floats_of second) {
#if defined(__AVX512BF16__)
  words at;
  for (int i = 0; i < 16; i++) at[i] = uint32_t(i | (i + 16) << 16);
  return (words)_mm512_permutexvar_epi16((__m512i)at, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
  return rounded(first) >> 16 | rounded(second);
#endif
}

// Rows in pairs: to[i] = words of rows 2 i and 2 i + 1; a last row alone gets zeros beside it. `n`
// rows of `columns` numbers.
inline void pair_rows(const float* from, int64_t n, int64_t ld, int64_t columns, uint32_t* to, int64_t ld_to) {
  constexpr int lanes = Lanes<float>::count;
  for (int64_t i = 0; i < n; i += 2, to += ld_to) {
    const float *first = from + i * ld, *second = first + ld;
    const bool two = i + 1 < n;
    int64_t v = 0;
    for (; v + lanes <= columns; v += lanes)
      *(words*)(to + v) = join(load<float>(first + v), two ? load<float>(second + v) : floats_of{});
    for (; v < columns; v++) to[v] = join(splat(first[v]), splat(two ? second[v] : 0.0f))[0];
  }
}
inline float widened(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// `n` numbers to bfloat16, one after another; pairs of them are words.
inline void round_row(const float* from, int64_t n, uint16_t* to) {
  constexpr int lanes = Lanes<float>::count;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    words r = rounded(load<float>(from + i)) >> 16;
    typedef uint16_t shorts __attribute__((vector_size(FUSEDMOE_VECTOR_BYTES / 2), aligned(2), may_alias));
    *(shorts*)(to + i) = __builtin_convertvector(r, shorts);
  }
  for (; i < n; i++) {
    floats_of x = splat(from[i]);
    to[i] = uint16_t(rounded(x)[0] >> 16);
  }
}

inline void widen_row(const uint16_t* from, int64_t n, float* to) {
  constexpr int lanes = Lanes<float>::count;
  typedef uint16_t shorts __attribute__((vector_size(FUSEDMOE_VECTOR_BYTES / 2), aligned(2), may_alias));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    store<float>(to + i, (floats_of)(__builtin_convertvector(*(const shorts*)(from + i), words) << 16));
  for (; i < n; i++) to[i] = widened(from[i]);
}

// acc + the products of two words.
inline floats_of multiply_add(floats_of acc, uint32_t w, words x) {
#if defined(__AVX512BF16__)
  return (floats_of)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(w)), (__m512bh)x);
#else
  words broadcast = words{} + w;
  acc = acc + low(broadcast) * low(x);
  return acc + high(broadcast) * high(x);
#endif
}

// C[m][v] (+)= sum over k of A(m, k) B(k, v): A(m, k) = a[m * lda + k], bfloat16; B(2 j, v) and B(2
// j + 1, v) share the word b[j * ldb + v].
struct Bf16Product {
  const uint16_t* a;
  int64_t lda;
  const uint32_t* b;
  int64_t ldb, k;
  float* c;
  int64_t ldc;
  const float* bias = nullptr;
  bool relu = false, add = false;
  int64_t columns = 0;

  Product<float> epilogue() const { return {nullptr, 0, nullptr, 0, 0, c, ldc, bias, relu, add, columns}; }
};

template <int M, int V>
__attribute__((noinline)) void bf16_tile(const Bf16Product& p) {
  constexpr int lanes = Lanes<float>::count;
  const uint32_t* b = p.b;
  floats_of c[M][V] = {};
  const auto step = [&](auto word) {
    words x[V];
    FUSEDMOE_UNROLL
    for (int v = 0; v < V; v++) x[v] = load_words(b + v * lanes);
    FUSEDMOE_UNROLL
    for (int m = 0; m < M; m++) {
      const uint32_t w = word(m);
      FUSEDMOE_UNROLL
      for (int v = 0; v < V; v++) c[m][v] = multiply_add(c[m][v], w, x[v]);
    }
    b += p.ldb;
  };
  const uint16_t* ahead = p.a + M * p.lda;
  for (int64_t k = 0; k + 2 <= p.k; k += 2, ahead += 2 * M) {
    __builtin_prefetch(ahead);
    step([&](int m) {
      uint32_t w;
      memcpy(&w, p.a + m * p.lda + k, 4);
      return w;
    });
  }
  if (p.k % 2) step([&](int m) { return uint32_t(p.a[m * p.lda + p.k - 1]); });
  finish<float, M, V>(p.epilogue(), c);
}

template <int V, int M>
inline void bf16_rows(Bf16Product p, int64_t rows) {
  for (; rows >= M; rows -= M) {
    bf16_tile<M, V>(p);
    p.a += M * p.lda;
    p.c += M * p.ldc;
    if (p.bias) p.bias += M;
  }
  if constexpr (M > 1)
    if (rows) bf16_rows<V, M / 2>(p, rows);
}

// The words of a chain: as many bytes of B as in float32 (gemm.h), so that they stay in L1 for all
// rows.
constexpr int64_t bf16_k_block = 2 * k_block;

inline void bf16_columns(const Bf16Product& whole, int64_t rows, int64_t columns) {
  constexpr int lanes = Lanes<float>::count;
  Bf16Product p = whole;
  while (columns > 0) {
    const int64_t width = columns > lanes ? 2 * lanes : lanes;
    p.columns = columns < width ? columns : 0;
    if (width > lanes)
      bf16_rows<2, 8>(p, rows);
    else
      bf16_rows<1, 8>(p, rows);
    p.b += width;
    p.c += width;
    columns -= width;
  }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA

#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// `columns` of C; B has them up to the next full vector.
inline void multiply(const Bf16Product& whole, int64_t rows, int64_t columns) {
#if defined(__AMX_BF16__)
  // Below, a tile would be mostly padding: the gradient of a weight over few rows.
  if (whole.k >= tile_k) return multiply_tiles(whole, rows, columns);
#endif
  for (int64_t k = 0; k < whole.k; k += bf16_k_block) {
    Bf16Product p = whole;
    const bool last = k + bf16_k_block >= whole.k;
    p.k = last ? whole.k - k : bf16_k_block;
    p.a += k;
    p.b += k / 2 * p.ldb;
    p.add = whole.add || k > 0;
    if (!last) p.bias = nullptr, p.relu = false;
    bf16_columns(p, rows, columns);
  }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
