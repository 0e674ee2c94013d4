// Dense linears straight from PyTorch's row-major weights: nothing is packed, so nothing can go
// stale.
//
// Activations of a block of rows stand transposed, X[k * ld + row]: the rows are the vector lanes,
// a weight is broadcast. Every output is a sum, in order, of chains fma(a, b, acc) of `k_block`
// products each, the reduction index ascending; then comes the bias. So its bits depend neither on
// the batch a row came in nor on the kernel. (Needs a * b + c to be contracted: the default of GCC,
// -ffp-contract=fast for Clang.)
#pragma once
#include <bit>
#include <utility>

#include "activation.h"
#include "plan.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// One chain over the whole reduction would err by its length, where libraries add several shorter
// ones; at 128 the extra additions cost 1 / 128 of the multiply-adds.
constexpr int64_t k_block = 128;

// C[m][v] (+)= sum over k of A(m, k) B[k * ldb + v].
template <class T>
struct Product {
  const T* a;       // A(m, k) = a[m * lda + k], or transposed: a[k * lda + m]
  int64_t lda;
  const T* b;
  int64_t ldb;
  int64_t k;
  T* c;
  int64_t ldc;
  const T* bias = nullptr;   // [m], added last
  bool relu = false;
  bool add = false;          // to C
  int64_t columns = 0;       // of C, the last tile may reach beyond; 0: it does not
  int64_t span = 0, jump = 0;  // A's rows stand in groups of `span`, `jump` apart; 0: in one
};

// The register tile. Each broadcast of A feeds `tile_vectors` multiply-adds, each load of B
// `tile_rows`, and the chains cover latency x ports (4 x 2): 8 x 3 accumulators of 32 registers
// (AVX-512, NEON), where 11 loads feed 24 multiply-adds and not 10 feed 16; 6 x 2 of 16 registers
// (AVX2, SSE2).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int tile_rows = 8, tile_vectors = 3, narrow_rows = 16;
#else
constexpr int tile_rows = 6, tile_vectors = 2, narrow_rows = 8;
#endif

// C (+)= the sums of one tile's chains; bias and ReLU with the last.
template <class T, int M, int V>
inline void finish(const Product<T>& p, vec<T> (&c)[M][V]) {
  constexpr int lanes = Lanes<T>::count;
  if (p.columns) {
    for (int m = 0; m < M; m++)
      for (int64_t i = 0; i < p.columns; i++) {
        T* to = p.c + m * p.ldc + i;
        *to = p.add ? *to + c[m][i / lanes][i % lanes] : c[m][i / lanes][i % lanes];
      }
    return;
  }
  if (p.add)
    FUSEDMOE_UNROLL
    for (int m = 0; m < M; m++)
      FUSEDMOE_UNROLL
      for (int v = 0; v < V; v++) c[m][v] = load<T>(p.c + m * p.ldc + v * lanes) + c[m][v];
  if (p.bias)
    FUSEDMOE_UNROLL
    for (int m = 0; m < M; m++)
      FUSEDMOE_UNROLL
      for (int v = 0; v < V; v++) c[m][v] = c[m][v] + p.bias[m];
  if (p.relu)
    FUSEDMOE_UNROLL
    for (int m = 0; m < M; m++)
      FUSEDMOE_UNROLL
      for (int v = 0; v < V; v++) c[m][v] = relu<T>(c[m][v]);
  FUSEDMOE_UNROLL
  for (int m = 0; m < M; m++)
    FUSEDMOE_UNROLL
    for (int v = 0; v < V; v++) store<T>(p.c + m * p.ldc + v * lanes, c[m][v]);
}

// An operand of inline assembly in a vector register, read and written.
#if defined(__aarch64__)
#define FUSEDMOE_VECTOR(x) "+w"(x)
#elif defined(__AVX512F__)
#define FUSEDMOE_VECTOR(x) "+v"(x)
#else
#define FUSEDMOE_VECTOR(x) "+x"(x)
#endif

template <class T, int M, int V, bool TRANSPOSED>
__attribute__((noinline)) void tile(const Product<T>& p) {
  constexpr int lanes = Lanes<T>::count, thirds = (M + 2) / 3, line = 64 / sizeof(T);
  const T* a[thirds];  // x86 addresses reach lda and 2 lda from a pointer: a third of the pointers suffice
  const T* b = p.b;
  // What the next tile reads: of its rows, line after line; where A is transposed, the next line of
  // each row, into L2 alone, because rows of 1 KB fall into a few sets of L1.
  const T* ahead = p.a + (TRANSPOSED ? line : M * p.lda);
  const int64_t lda = p.lda, ldb = p.ldb;
  FUSEDMOE_UNROLL
  for (int i = 0; i < thirds; i++) a[i] = p.a + 3 * i * lda;
  vec<T> c[M][V] = {};
  const auto step = [&](int64_t k) {
    vec<T> x[V];
    FUSEDMOE_UNROLL
    for (int v = 0; v < V; v++) x[v] = load<T>(b + v * lanes);
    FUSEDMOE_UNROLL
    for (int m = 0; m < M; m++) {
      T w = TRANSPOSED ? a[0][m] : a[m / 3][m % 3 * lda + k];
      FUSEDMOE_UNROLL
      for (int v = 0; v < V; v++) c[m][v] = c[m][v] + w * x[v];
      // Hold the next words back, or GCC loads all of a step's first and runs out of registers.
      if (m % 3 == 2 && m + 1 < M) {
        const T* next = a[TRANSPOSED ? 0 : m / 3 + 1];
        vec<T> sum = c[m][V - 1];
        asm volatile("" : "+r"(next), FUSEDMOE_VECTOR(sum));
        a[TRANSPOSED ? 0 : m / 3 + 1] = next;
        c[m][V - 1] = sum;
      }
    }
    b += ldb;
    if (TRANSPOSED) a[0] += lda;
  };
  int64_t k = 0;
  if constexpr (TRANSPOSED) {
    for (; k < p.k; k++, ahead += lda) {
      __builtin_prefetch(ahead, 0, 2);
      step(0);
    }
  } else {
    // M prefetches a line of k, or some more: one every second k for eight rows of floats. A
    // divisor of the line.
    constexpr int every = M < line ? std::bit_floor(unsigned(line / M)) : 1;
    for (; k + line <= p.k; k += line, ahead += line) {
      const T* row = ahead;
      for (int j = 0; j < line; j += every, row += lda) {
        __builtin_prefetch(row);
        FUSEDMOE_UNROLL
        for (int i = 0; i < every; i++) step(j + i);
      }
      FUSEDMOE_UNROLL
      for (int i = 0; i < thirds; i++) a[i] += line;
    }
    for (int64_t j = 0; k < p.k; k++, j++) step(j);
  }
  finish<T, M, V>(p, c);
}

// The rows that are left over, in one tile of their number.
template <class T, int V, bool TRANSPOSED, int M>
inline void last_rows(const Product<T>& p, int64_t rows) {
  if (rows == M) return tile<T, M, V, TRANSPOSED>(p);
  if constexpr (M > 1) last_rows<T, V, TRANSPOSED, M - 1>(p, rows);
}

// All `rows` of C for V vectors of columns: chain by chain, so that a chain's part of B stays in L1
// for all rows.
template <class T, int V, bool TRANSPOSED, int M>
inline void multiply_columns(const Product<T>& whole, int64_t rows) {
  for (int64_t k = 0; k < whole.k; k += k_block) {
    Product<T> p = whole;
    const bool last = k + k_block >= whole.k;
    p.k = last ? whole.k - k : k_block;
    p.a += TRANSPOSED ? k * p.lda : k;
    p.b += k * p.ldb;
    p.add = whole.add || k > 0;
    if (!last) p.bias = nullptr, p.relu = false;
    const int64_t span = p.span ? p.span : rows;
    for (int64_t first = 0; first < rows; first += span) {
      const T* a = p.a;
      int64_t left = rows - first < span ? rows - first : span;
      for (; left > 0; left -= M) {
        if constexpr (M > 1)
          if (left < M) {
            last_rows<T, V, TRANSPOSED, M - 1>(p, left);
            p.c += left * p.ldc;
            if (p.bias) p.bias += left;
            break;
          }
        tile<T, M, V, TRANSPOSED>(p);
        p.a += TRANSPOSED ? M : M * p.lda;
        p.c += M * p.ldc;
        if (p.bias) p.bias += M;
      }
      p.a = a + p.jump;
    }
  }
}

// `columns` of C; B has them up to the next full vector.
template <class T, bool TRANSPOSED>
inline void multiply(Product<T> p, int64_t rows, int64_t columns) {
  constexpr int lanes = Lanes<T>::count;
  // Sixteen weight rows at a stride of 4 KB would fall into one set of an L1 cache, which has 8 to
  // 12 ways.
  const bool tall = TRANSPOSED || p.lda * int64_t(sizeof(T)) % 4096 != 0;
  while (columns > 0) {
    const int64_t vectors = (columns + lanes - 1) / lanes;
    // Four vectors are two and two: a tile of one vector has a load of A for every multiply-add.
    const int64_t take = vectors >= tile_vectors && vectors != 4 ? tile_vectors : vectors >= 2 ? 2 : 1;
    const int64_t width = take * lanes;
    p.columns = columns < width ? columns : 0;
    if constexpr (tile_vectors > 2)
      if (take == 3) multiply_columns<T, 3, TRANSPOSED, tile_rows>(p, rows);
    if (take == 2)
      multiply_columns<T, 2, TRANSPOSED, tile_rows>(p, rows);
    else if (take == 1 && tall)
      multiply_columns<T, 1, TRANSPOSED, narrow_rows>(p, rows);
    else if (take == 1)
      multiply_columns<T, 1, TRANSPOSED, tile_rows>(p, rows);
    p.b += width;
    p.c += width;
    columns -= width;
  }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
