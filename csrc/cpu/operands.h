// What the linears read and how they multiply: `NativeOperands` takes panels as they are,
// `Bf16Operands` rounds both operands to bfloat16 and sums in float32. One walk through the plan,
// forward or backward, serves both.
#pragma once
#include "bf16.h"
#include "mix.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// z = W in + bias, and relu; the strides of in and z are the layout's.
template <class T>
Product<T> product(const Block<T>& b, const Stage& linear) {
  Product<T> p{};
  p.a = b.call.params[linear.weight];
  p.lda = p.k = linear.k;
  p.b = b.at(linear.in);
  p.c = b.at(linear.z);
  p.bias = linear.bias >= 0 ? b.call.params[linear.bias] : nullptr;
  p.relu = linear.act == Act::relu;
  return p;
}

// A row of a panel's numbers side by side, for the few rows of a small batch: to[r * ld_to + i] =
// panel[i * ld + r].
inline void gather_rows(const float* panel, int64_t ld, int64_t n, int64_t rows, float* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < n; i++) to[r * ld_to + i] = panel[i * ld + r];
}

// z = W in + bias for at most few_rows rows of a training step: W is streamed once, in the order of
// memory (few.h), where one vector of rows would be lanes that idle. The same sums, so the
// same bits.
inline void linear_few(const Block<float>& b, const Stage& linear) {
  float *x = b.workspace, *y = x + b.plan.widest * b.ld, *z = b.at(linear.z);
  Product<float> p = product(b, linear);
  p.b = x;
  p.c = y;
  p.ldb = linear.k;
  p.ldc = linear.n;
  const int64_t rows = with_few_rows(b.rows, [&](auto r) {
    gather_rows(b.at(linear.in), b.ld, linear.k, r, x, linear.k);
    few<r>(p, linear.n);
  });
  for (int64_t n = 0; n < linear.n; n++)
    for (int64_t r = 0; r < b.ld; r++) z[n * b.ld + r] = r < rows ? y[r * linear.n + n] : 0.0f;
}

// to (+)= W^T dz for as few: the rows of W are added up as they stand in memory, the lanes running
// over its columns.
inline void d_input_few(const Block<float>& b, const Stage& linear, const float* d_z, float* to, bool add) {
  float *rows = b.workspace, *sums = rows + b.plan.widest * b.ld;
  gather_rows(d_z, b.ld, linear.n, b.rows, rows, linear.n);
  // Chain by chain, as `multiply` adds them.
  for (int64_t n = 0; n < linear.n; n += k_block) {
    const int64_t count = linear.n - n < k_block ? linear.n - n : k_block;
    multiply_few({rows + n, linear.n, b.call.params[linear.weight] + n * linear.k, linear.k, count, sums, linear.k},
                 b.rows, linear.k);
    for (int64_t k = 0; k < linear.k; k++)
      for (int64_t r = 0; r < b.rows; r++) {
        float* at = to + k * b.ld + r;
        *at = add || n > 0 ? *at + sums[r * linear.k + k] : sums[r * linear.k + k];
      }
  }
}

struct NativeOperands {
  template <class T>
  static void input(const Block<T>&, int64_t) {}

  template <class T>
  static void linear(const Block<T>& b, const Stage& linear) {
    if constexpr (sizeof(T) == 4)
      if (b.rows <= few_rows) return linear_few(b, linear);
    Product<T> p = product(b, linear);
    p.ldb = p.ldc = b.ld;
    multiply<T, false>(p, linear.n, padded(b.rows));
  }
  // to (+)= W^T dz.
  template <class T>
  static void d_input(const Block<T>& b, const Stage& linear, const T* d_z, T* to, bool add) {
    // The last vector of a row of W must not reach beyond its end.
    if constexpr (sizeof(T) == 4)
      if (b.rows <= few_rows && linear.k % lane_multiple == 0) return d_input_few(b, linear, d_z, to, add);
    Product<T> p{};
    p.a = b.call.params[linear.weight];
    p.lda = linear.k;
    p.b = d_z;
    p.c = to;
    p.ldb = p.ldc = b.ld;
    p.k = linear.n;
    p.add = add;
    multiply<T, true>(p, linear.k, padded(b.rows));
  }
  // Hand a dz to the chunk's buffer, where dW and db find it.
  template <class T>
  static void store_dz(const Block<T>& b, const T* d_z, const Stage& linear) {
    for (int64_t n = 0; n < linear.n; n++) memcpy(b.chunk_row(linear.d_z + n), d_z + n * b.ld, b.rows * sizeof(T));
  }
  // The x of a dW, from rows of the network's input or from a panel.
  template <class T>
  static void transpose_rows(const Block<T>& b, const T* x, int64_t width, T* to) {
    const int64_t stride = leading(width);
    to += b.row % chunk_rows * stride;
    for (int64_t r = 0; r < b.rows; r++) {
      memcpy(to + r * stride, x + r * b.call.row_stride, width * sizeof(T));
      for (int64_t k = width; k < padded(width); k++) to[r * stride + k] = 0;
    }
  }
  template <class T>
  static void transpose_panel(const Block<T>& b, T* panel, int64_t width, T* to) {
    const int64_t stride = leading(width);
    transpose(panel, b.ld, width, b.rows, to + b.row % chunk_rows * stride, stride, padded(width));
  }
  // dW (+)= dz x for rows of dW from `first` on.
  template <class T>
  static void weight_gradient(const Call<T>& call, const Stage& linear, int64_t first, int64_t count, int64_t chunk,
                              T* d_weight, bool add) {
    Product<T> p{};
    p.a = call.d_z + (linear.d_z + first) * call.chunk;
    p.lda = call.chunk;
    p.k = chunk;
    p.b = call.transposed + linear.transposed * call.transposed_rows;
    p.ldb = leading(linear.k);
    p.c = d_weight + first * linear.k;
    p.ldc = linear.k;
    p.add = add;
    multiply<T, false>(p, count, linear.k);
  }
  // The sum of a row of the chunk's dz: several vectors of lanes side by side, then folded in half
  // until one number is left. A chunk's 256 numbers are chains of 4 to 16 numbers and 4 to 6 folds;
  // all lanes one after another would be 16 more additions of what is nearly the sum.
  template <class T>
  static T sum(const T* row, int64_t chunk) {
    constexpr int lanes = Lanes<T>::count, vectors = 4;
    vec<T> sums[vectors] = {};
    int64_t r = 0;
    for (; r + vectors * lanes <= chunk; r += vectors * lanes)
      FUSEDMOE_UNROLL
      for (int v = 0; v < vectors; v++) sums[v] = sums[v] + load<T>(row + r + v * lanes);
    for (int v = 0; r + lanes <= chunk; r += lanes, v++) sums[v] = sums[v] + load<T>(row + r);
    T parts[lanes];
    store<T>(parts, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int i = 0; r + i < chunk; i++) parts[i] += row[r + i];
    for (int span = lanes / 2; span > 0; span /= 2)
      for (int i = 0; i < span; i++) parts[i] += parts[i + span];
    return parts[0];
  }
};

struct Bf16Operands {
  static uint32_t* operand(const Block<float>& b, int64_t offset) { return (uint32_t*)(b.scratch + offset * b.ld); }

  static void input(const Block<float>& b, int64_t slot) {
    const Panel& from = b.plan.inputs[slot];
    pair_rows(b.at(from), from.width, b.ld, padded(b.rows), operand(b, b.plan.input_operands[slot]), b.ld);
  }
  static void linear(const Block<float>& b, const Stage& linear) {
    uint32_t* in = operand(b, linear.operand);
    if (linear.convert) pair_rows(b.at(linear.in), linear.k, b.ld, padded(b.rows), in, b.ld);
    Bf16Product p{b.call.bf16_weights[linear.weight], linear.k, in, b.ld, linear.k, b.at(linear.z), b.ld};
    p.bias = linear.bias >= 0 ? b.call.params[linear.bias] : nullptr;
    p.relu = linear.act == Act::relu;
    multiply(p, linear.n, padded(b.rows));
  }
  static void d_input(const Block<float>& b, const Stage& linear, const float* d_z, float* to, bool add) {
    uint32_t* pairs = (uint32_t*)b.workspace;
    pair_rows(d_z, linear.n, b.ld, padded(b.rows), pairs, b.ld);
    Bf16Product p{
        b.call.transposed_weights + linear.transposed_weight, linear.n + linear.n % 2, pairs, b.ld, linear.n, to, b.ld};
    p.add = add;
    multiply(p, linear.k, padded(b.rows));
  }
  // Rounded, two rows of the batch a word; a last row alone has a zero beside it.
  static void store_dz(const Block<float>& b, const float* d_z, const Stage& linear) {
    for (int64_t n = 0; n < linear.n; n++) {
      uint16_t* to = (uint16_t*)(b.call.d_z + (linear.d_z + n) * b.call.chunk) + b.row % chunk_rows;
      round_row(d_z + n * b.ld, b.rows, to);
      if (b.rows % 2) to[b.rows] = 0;
    }
  }
  static void transpose_rows(const Block<float>& b, const float* x, int64_t width, float* to) {
    const int64_t stride = leading(width);
    uint32_t* words = (uint32_t*)to + b.row % chunk_rows / 2 * stride;
    for (int64_t r = 0; r < (b.rows + 1) / 2; r++) memset(words + r * stride + width, 0, (padded(width) - width) * 4);
    pair_rows(x, b.rows, b.call.row_stride, width, words, stride);
  }
  static void transpose_panel(const Block<float>& b, float* panel, int64_t width, float* to) {
    const int64_t stride = leading(width);
    uint16_t* plain = (uint16_t*)(b.workspace + b.plan.widest * b.ld);
    for (int64_t w = 0; w < width; w++) {
      round_row(panel + w * b.ld, b.rows, plain + w * b.ld);
      if (b.rows % 2) plain[w * b.ld + b.rows] = 0;
    }
    transpose((const float*)plain, b.ld / 2, width, (b.rows + 1) / 2, to + b.row % chunk_rows / 2 * stride, stride,
              padded(width));
  }
  static void weight_gradient(const Call<float>& call, const Stage& linear, int64_t first, int64_t count,
                              int64_t chunk, float* d_weight, bool add) {
    Bf16Product p{(const uint16_t*)(call.d_z + (linear.d_z + first) * call.chunk),
                  2 * call.chunk,
                  (const uint32_t*)(call.transposed + linear.transposed * call.transposed_rows),
                  leading(linear.k),
                  chunk,
                  d_weight + first * linear.k,
                  linear.k};
    p.add = add;
    multiply(p, count, linear.k);
  }
  static float sum(const float* row, int64_t chunk) {
    float wide[chunk_rows];
    widen_row((const uint16_t*)row, chunk, wide);
    return NativeOperands::sum((const float*)wide, chunk);
  }
};

// W [n, k] of a linear to [k, n], rows of an even length: the A of its d_input.
inline void transpose_weight(const Plan&, const Call<float>& call, const Stage& linear) {
  constexpr int64_t lanes = Lanes<float>::count;
  typedef uint16_t shorts __attribute__((vector_size(FUSEDMOE_VECTOR_BYTES / 2), aligned(2), may_alias));
  const int64_t n = linear.n, k = linear.k, even_n = n + n % 2;
  const uint16_t* w = call.bf16_weights[linear.weight];
  uint16_t* to = call.transposed_weights + linear.transposed_weight;
  const int64_t whole = k % 2 ? 0 : n / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
    // Two columns of W are one of words: transposed, and then taken apart.
    int64_t j = 0;
    for (; j + 8 <= k; j += 8) {
      vec<float> t[4];
      transpose_tile<lanes>(Rows{(const float*)(w + i * k + j), k / 2}, t);
      FUSEDMOE_UNROLL
      for (int c = 0; c < 4; c++) {
        *(shorts*)(to + (j + 2 * c) * even_n + i) = __builtin_convertvector((words)t[c], shorts);
        *(shorts*)(to + (j + 2 * c + 1) * even_n + i) = __builtin_convertvector((words)t[c] >> 16, shorts);
      }
    }
    for (; j < k; j++)
      for (int64_t a = i; a < i + lanes; a++) to[j * even_n + a] = w[a * k + j];
  }
  for (int64_t j = 0; j < k; j++) {
    for (int64_t a = whole; a < n; a++) to[j * even_n + a] = w[a * k + j];
    if (n % 2) to[j * even_n + n] = 0;
  }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
