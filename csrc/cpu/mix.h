// Softmax, mixing weights and the mix, on panels of ld lanes; and their backward. Formulas: fusedmoe/reference/operator.py.
#pragma once
#include "few.h"
#include "isa.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// A block of rows in one call, and where its panels are.
template <class T>
struct Block {
  const Plan& plan;
  const Call<T>& call;
  int64_t row, rows;
  int64_t ld;  // lanes of a panel
  T* kept;
  T* scratch;
  T* spare;    // two panels of plan.widest

  // This block's lanes of a row of the chunk's buffer (backward).
  T* chunk_row(int64_t n) const { return call.d_z + n * call.chunk + row % chunk_rows; }
  T* at(const Panel& p) const { return (p.kept ? kept : scratch) + p.offset * ld; }
};

// p[e] = softmax over e of z[e], ascending, one row a lane.
template <class T>
void softmax(const T* z, int64_t n, int64_t ld, T* p) {
  for (int64_t v = 0; v < ld; v += Lanes<T>::count) {
    vec<T> most = load<T>(z + v);
    for (int64_t e = 1; e < n; e++) {
      vec<T> x = load<T>(z + e * ld + v);
      most = x > most ? x : most;
    }
    vec<T> sum = splat<T>(0);
    for (int64_t e = 0; e < n; e++) {
      vec<T> x = exp<T>(load<T>(z + e * ld + v) - most);
      store<T>(p + e * ld + v, x);
      sum = sum + x;
    }
    for (int64_t e = 0; e < n; e++) store<T>(p + e * ld + v, load<T>(p + e * ld + v) / sum);
  }
}

// w[i] = p[seen(i)] + v(i) for the experts that a unit reads.
template <class T>
void mixing_weights(const Span<Read>& reads, const T* const* params, const T* p, int64_t ld, T* w) {
  for (int64_t i = 0; i < reads.count; i++) {
    const Read& read = reads[i];
    T v = read.parameter >= 0 ? params[read.parameter][read.element] : T(read.value);
    for (int64_t l = 0; l < ld; l += Lanes<T>::count) store<T>(w + i * ld + l, (read.seen >= 0 ? load<T>(p + read.seen * ld + l) : splat<T>(0)) + v);
  }
}

// out[n] = start[n] + sum over i, ascending, of weight(i) * source(i)[n]; `start` may be null. Four outputs share the loads of a weight.
template <class T, class Weight, class Source>
void mix(int64_t count, Weight weight, Source source, const T* start, int64_t n, int64_t ld, T* out) {
  constexpr int group = 4;
  for (int64_t j = 0; j < n; j += group)
    for (int64_t v = 0; v < ld; v += Lanes<T>::count) {
      const int64_t width = n - j < group ? n - j : group, at = j * ld + v;
      vec<T> sum[group] = {};
      for (int g = 0; g < width && start; g++) sum[g] = load<T>(start + at + g * ld);
      for (int64_t i = 0; i < count; i++) {
        vec<T> w = load<T>(weight(i) + v);
        const T* from = source(i) + at;
        if (width == group) {
          FUSEDMOE_UNROLL
          for (int g = 0; g < group; g++) sum[g] = sum[g] + w * load<T>(from + g * ld);
        } else {
          for (int g = 0; g < width; g++) sum[g] = sum[g] + w * load<T>(from + g * ld);
        }
      }
      for (int g = 0; g < width; g++) store<T>(out + at + g * ld, sum[g]);
    }
}

// dw = sum over n of g[n] * y[n], in four chains so that their latencies overlap.
template <class T>
void dot(const T* g, const T* y, int64_t n, int64_t ld, T* dw) {
  constexpr int chains = 4;
  for (int64_t v = 0; v < ld; v += Lanes<T>::count) {
    vec<T> sum[chains] = {};
    int64_t j = 0;
    for (; j + chains <= n; j += chains)
      FUSEDMOE_UNROLL
      for (int c = 0; c < chains; c++) sum[c] = sum[c] + load<T>(g + (j + c) * ld + v) * load<T>(y + (j + c) * ld + v);
    for (; j < n; j++) sum[0] = sum[0] + load<T>(g + j * ld + v) * load<T>(y + j * ld + v);
    store<T>(dw + v, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// dz[e] = p[e] * (dw[e] - sum over e' of p[e'] dw[e']), with dw at the place of expert e among the unit's reads.
template <class T>
void softmax_backward(const Span<Read>& reads, const T* p, const T* dw, int64_t ld, T* dz) {
  for (int64_t v = 0; v < ld; v += Lanes<T>::count) {
    vec<T> sum = splat<T>(0);
    for (int64_t i = 0; i < reads.count; i++)
      if (reads[i].seen >= 0) sum = sum + load<T>(p + reads[i].seen * ld + v) * load<T>(dw + i * ld + v);
    for (int64_t i = 0; i < reads.count; i++)
      if (reads[i].seen >= 0) store<T>(dz + reads[i].seen * ld + v, load<T>(p + reads[i].seen * ld + v) * (load<T>(dw + i * ld + v) - sum));
  }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
