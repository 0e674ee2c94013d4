// Softmax, mixing weights and the mix, on panels of ld lanes; and their backward. Formulas:
// fusedmoe/reference/operator.py.
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
  T* saved;
  T* scratch;
  T* workspace;    // two panels of plan.widest

  // This block's lanes of a row of the chunk's buffer (backward).
  T* chunk_row(int64_t n) const { return call.d_z + n * call.chunk + row % chunk_rows; }
  T* at(const Panel& p) const { return (p.saved ? saved : scratch) + p.offset * ld; }
};

// p[e] = softmax over e of factor * z[e], ascending, one row a lane.
template <class T>
void softmax(const T* z, T factor, int64_t n, int64_t ld, T* p) {
  for (int64_t v = 0; v < ld; v += Lanes<T>::count) {
    vec<T> most = factor * load<T>(z + v);
    for (int64_t e = 1; e < n; e++) {
      vec<T> x = factor * load<T>(z + e * ld + v);
      most = x > most ? x : most;
    }
    vec<T> sum = splat<T>(0);
    for (int64_t e = 0; e < n; e++) {
      vec<T> x = exp<T>(factor * load<T>(z + e * ld + v) - most);
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
    for (int64_t l = 0; l < ld; l += Lanes<T>::count)
      store<T>(w + i * ld + l, (read.seen >= 0 ? load<T>(p + read.seen * ld + l) : splat<T>(0)) + v);
  }
}

// Numbers of an output that share the loads of a weight: with `mixed_units` outputs 16
// accumulators, or half of the registers.
constexpr int shared_numbers = tile_vectors > 2 ? 4 : 2;

// Hand the outputs from `first` on to run(first, number) in groups of at most U, their number a
// constant.
template <int U, class Run>
inline void in_groups(int64_t first, int64_t count, Run run) {
  for (; count - first >= U; first += U) run(first, std::integral_constant<int, U>());
  if constexpr (U > 1) in_groups<U - 1>(first, count, run);
}

// out(u)[n] = start[n] + sum over i, ascending, of weight(u, i) * source(i)[n] for U outputs;
// `start` may be null, and so may a weight: then u does not read i. What is read for one output
// serves them all: a panel is 64 KB or more, and comes from the L2 cache.
template <class T, int U, class Weight, class Source, class Out>
void mix(int64_t count, Weight weight, Source source, const T* start, int64_t n, int64_t ld, Out out) {
  const auto columns = [&](int64_t at, int64_t v, auto numbers) {
    constexpr int width = numbers;
    vec<T> sum[U][width] = {};
    if (start)
      for (int u = 0; u < U; u++)
        for (int g = 0; g < width; g++) sum[u][g] = load<T>(start + at + g * ld);
    for (int64_t i = 0; i < count; i++) {
      const T* from = source(i) + at;
      vec<T> x[width];
      FUSEDMOE_UNROLL
      for (int g = 0; g < width; g++) x[g] = load<T>(from + g * ld);
      FUSEDMOE_UNROLL
      for (int u = 0; u < U; u++) {
        const T* w = weight(u, i);
        if (!w) continue;
        FUSEDMOE_UNROLL
        for (int g = 0; g < width; g++) sum[u][g] = sum[u][g] + load<T>(w + v) * x[g];
      }
    }
    FUSEDMOE_UNROLL
    for (int u = 0; u < U; u++)
      FUSEDMOE_UNROLL
      for (int g = 0; g < width; g++) store<T>(out(u) + at + g * ld, sum[u][g]);
  };
  int64_t j = 0;
  for (; j + shared_numbers <= n; j += shared_numbers)
    for (int64_t v = 0; v < ld; v += Lanes<T>::count)
      columns(j * ld + v, v, std::integral_constant<int, shared_numbers>());
  for (; j < n; j++)
    for (int64_t v = 0; v < ld; v += Lanes<T>::count) columns(j * ld + v, v, std::integral_constant<int, 1>());
}

// dw(u) = sum over n of g(u)[n] * y[n] for U outputs, each in four chains so that their latencies
// overlap.
template <class T, int U, class Gradient, class To>
void dot(Gradient g, const T* y, int64_t n, int64_t ld, To dw) {
  constexpr int chains = 4;
  for (int64_t v = 0; v < ld; v += Lanes<T>::count) {
    vec<T> sum[U][chains] = {};
    int64_t j = 0;
    for (; j + chains <= n; j += chains)
      FUSEDMOE_UNROLL
      for (int c = 0; c < chains; c++) {
        const int64_t at = (j + c) * ld + v;
        const vec<T> x = load<T>(y + at);
        FUSEDMOE_UNROLL
        for (int u = 0; u < U; u++) sum[u][c] = sum[u][c] + load<T>(g(u) + at) * x;
      }
    for (; j < n; j++)
      for (int u = 0; u < U; u++) sum[u][0] = sum[u][0] + load<T>(g(u) + j * ld + v) * load<T>(y + j * ld + v);
    FUSEDMOE_UNROLL
    for (int u = 0; u < U; u++) store<T>(dw(u) + v, (sum[u][0] + sum[u][1]) + (sum[u][2] + sum[u][3]));
  }
}

// dz[e] = factor * p[e] * (dw[e] - c - sum over e' of p[e'] (dw[e'] - c)) with c the sum of p dw, so
// that one p near 1 costs no digits; dw stands at the place of expert e among the unit's reads.
template <class T>
void softmax_backward(const Span<Read>& reads, const T* p, const T* dw, T factor, int64_t ld, T* dz) {
  for (int64_t v = 0; v < ld; v += Lanes<T>::count) {
    // Of one term a read, those of the experts that the gate does not see left out.
    const auto total = [&](auto term) {
      vec<T> sum = splat<T>(0);
      for (int64_t i = 0; i < reads.count; i++)
        if (reads[i].seen >= 0) sum = sum + load<T>(p + reads[i].seen * ld + v) * term(i);
      return sum;
    };
    const vec<T> mean = total([&](int64_t i) { return load<T>(dw + i * ld + v); });
    const auto off_mean = [&](int64_t i) { return load<T>(dw + i * ld + v) - mean; };
    const vec<T> rest = total(off_mean);
    for (int64_t i = 0; i < reads.count; i++)
      if (reads[i].seen >= 0)
        store<T>(dz + reads[i].seen * ld + v, factor * (load<T>(p + reads[i].seen * ld + v) * (off_mean(i) - rest)));
  }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
