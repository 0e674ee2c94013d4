// The product of bf16.h on AMX tiles: A is a tile of weights as PyTorch stores them, B one of a
// panel's words, C 16 x 16 of float32.
#pragma once
#include <immintrin.h>

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// Shapes of the tile registers: 0-3 hold C, 4-5 A, 6-7 B.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // `rows` of C and A in the lower half of a 32 x 32 block, and in the upper half.
  TileShapes(int64_t upper, int64_t lower) {
    for (int t = 0; t < 8; t++) bytes[t] = 64, rows[t] = 16;
    rows[0] = rows[1] = rows[4] = uint8_t(upper);
    rows[2] = rows[3] = rows[5] = uint8_t(lower);
  }
};

constexpr int64_t tile_side = 16, tile_k = 32;

// A and B of the last k, which fill no tile, with zeros behind.
struct LastK {
  alignas(64) uint16_t a[2][tile_side][tile_k];
  alignas(64) uint32_t b[2][tile_k / 2][tile_side];

  LastK(const Bf16Product& p, int64_t k, int64_t rows, int64_t halves) {
    memset(this, 0, sizeof(*this));
    const int64_t count = p.k - k;
    for (int64_t m = 0; m < rows; m++) memcpy(a[m / tile_side][m % tile_side], p.a + m * p.lda + k, count * 2);
    for (int64_t j = 0; j < (count + 1) / 2; j++)
      for (int64_t h = 0; h < halves; h++) memcpy(b[h][j], p.b + (k / 2 + j) * p.ldb + h * tile_side, sizeof(b[h][j]));
  }
};

// C (+)= one accumulator, `rows` of it, by the epilogue that all kernels share.
inline void finish_tile(const Bf16Product& p, const float (&c)[tile_side][tile_side], int64_t rows, int64_t at_row,
                        int64_t at_column) {
  Product<float> q = p.epilogue();
  if (p.columns && p.columns <= at_column) return;
  q.columns = p.columns && p.columns < at_column + tile_side ? p.columns - at_column : 0;
  for (int64_t m = 0; m < rows; m++) {
    floats_of row[1][1] = {{load<float>(c[m])}};
    q.c = p.c + (at_row + m) * p.ldc + at_column;
    q.bias = p.bias ? p.bias + at_row + m : nullptr;
    finish<float, 1, 1>(q, row);
  }
}

// Up to 32 rows and 32 columns of C.
template <bool LOWER, bool RIGHT>
__attribute__((noinline)) void tile_block(const Bf16Product& p, int64_t rows) {
  _tile_zero(0);
  if (RIGHT) _tile_zero(1);
  if (LOWER) _tile_zero(2);
  if (LOWER && RIGHT) _tile_zero(3);
  const auto step = [&](const uint16_t* a0, const uint16_t* a1, int64_t a_stride, const uint32_t* b0,
                        const uint32_t* b1, int64_t b_stride) {
    _tile_loadd(4, a0, a_stride);
    _tile_loadd(6, b0, b_stride);
    _tile_dpbf16ps(0, 4, 6);
    if (RIGHT) {
      _tile_loadd(7, b1, b_stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (LOWER) {
      _tile_loadd(5, a1, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      if (RIGHT) _tile_dpbf16ps(3, 5, 7);
    }
  };
  int64_t k = 0;
  const uint16_t* ahead = p.a + 2 * tile_side * p.lda;
  for (; k + tile_k <= p.k; k += tile_k) {
    // A line of each of the next block's rows, before it is asked for.
    FUSEDMOE_UNROLL
    for (int m = 0; m < 2 * tile_side; m++) __builtin_prefetch(ahead + m * p.lda + k, 0, 2);
    const uint16_t* a = p.a + k;
    const uint32_t* b = p.b + k / 2 * p.ldb;
    step(a, a + tile_side * p.lda, p.lda * 2, b, b + tile_side, p.ldb * 4);
  }
  if (k < p.k) {
    const LastK last(p, k, rows, RIGHT ? 2 : 1);
    step(last.a[0][0], last.a[1][0], tile_k * 2, last.b[0][0], last.b[1][0], tile_side * 4);
  }
  if (!p.add && !p.bias && !p.relu && !p.columns) {
    // Nothing is left to do with the sums: a weight's gradient, mostly.
    _tile_stored(0, p.c, p.ldc * 4);
    if (RIGHT) _tile_stored(1, p.c + tile_side, p.ldc * 4);
    if (LOWER) _tile_stored(2, p.c + tile_side * p.ldc, p.ldc * 4);
    if (LOWER && RIGHT) _tile_stored(3, p.c + tile_side * p.ldc + tile_side, p.ldc * 4);
    return;
  }
  alignas(64) float c[4][tile_side][tile_side];
  _tile_stored(0, c[0], 64);
  if (RIGHT) _tile_stored(1, c[1], 64);
  if (LOWER) _tile_stored(2, c[2], 64);
  if (LOWER && RIGHT) _tile_stored(3, c[3], 64);
  const int64_t upper = rows < tile_side ? rows : tile_side;
  finish_tile(p, c[0], upper, 0, 0);
  if (RIGHT) finish_tile(p, c[1], upper, 0, tile_side);
  if (LOWER) finish_tile(p, c[2], rows - tile_side, tile_side, 0);
  if (LOWER && RIGHT) finish_tile(p, c[3], rows - tile_side, tile_side, tile_side);
}

inline void multiply_tiles(const Bf16Product& whole, int64_t rows, int64_t columns) {
  const auto load_shapes = [](int64_t count) {
    const TileShapes shapes(count < tile_side ? count : tile_side, count > tile_side ? count - tile_side : 1);
    _tile_loadconfig(&shapes);
  };
  for (int64_t v = 0; v < columns; v += 2 * tile_side) {
    int64_t shaped = 0;
    for (int64_t m = 0; m < rows; m += 2 * tile_side) {
      const int64_t count = rows - m < 2 * tile_side ? rows - m : 2 * tile_side;
      Bf16Product p = whole;
      p.a += m * p.lda;
      p.b += v;
      p.c += m * p.ldc + v;
      if (p.bias) p.bias += m;
      p.columns = columns - v < 2 * tile_side && columns % tile_side ? columns - v : 0;
      if (shaped != count) load_shapes(shaped = count);
      const bool right = columns - v > tile_side;
      if (count > tile_side)
        right ? tile_block<true, true>(p, count) : tile_block<true, false>(p, count);
      else
        right ? tile_block<false, true>(p, count) : tile_block<false, false>(p, count);
    }
  }
  _tile_release();
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
