// What a stage does besides its linear map, on panels of ld lanes: LayerNorm, activation, PReLU; and
// what units do besides the mix. Formulas: fusedmoe/reference/operator.py.
#pragma once
#include "operands.h"
#include "philox.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// A block of backward: its panels of gradients.
template <class T>
struct BackwardBlock : Block<T> {
  T* d_panels;
  T* d_linears;

  T* d(int64_t offset) const { return d_panels + offset * this->ld; }
  T* d_z(const Stage& stage) const { return d_linears + stage.d * this->ld; }
  void clear(int64_t offset, int64_t width) const { memset(d(offset), 0, width * this->ld * sizeof(T)); }
  // Hand n rows of a panel to the chunk's buffer, from row `row` on.
  void store_rows(const T* panel, int64_t row, int64_t n) const {
    for (int64_t i = 0; i < n; i++) memcpy(this->chunk_row(row + i), panel + i * this->ld, this->rows * sizeof(T));
  }
};

// f(column n, lanes from v on) for every column of a panel of n columns.
template <class T, class F>
void each_vector(int64_t n, int64_t ld, F f) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t v = 0; v < ld; v += Lanes<T>::count) f(i, i * ld + v);
}

// The sum of term(n) over n columns, in four chains: their latencies overlap, and each errs less.
template <class T, class Term>
vec<T> column_sum(int64_t n, Term term) {
  constexpr int chains = 4;
  vec<T> sum[chains] = {};
  int64_t i = 0;
  for (; i + chains <= n; i += chains)
    for (int c = 0; c < chains; c++) sum[c] = sum[c] + term(i + c);
  for (; i < n; i++) sum[0] = sum[0] + term(i);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// z = in, plus a bias if there is one.
template <class T>
void copied(const Block<T>& b, const Stage& stage) {
  const T* in = b.at(stage.in);
  T* z = b.at(stage.z);
  if (stage.bias < 0) {
    memcpy(z, in, stage.n * b.ld * sizeof(T));
    return;
  }
  const T* bias = b.call.params[stage.bias];
  each_vector<T>(stage.n, b.ld, [&](int64_t n, int64_t at) { store<T>(z + at, load<T>(in + at) + bias[n]); });
}

// normal = (in - mean) r and z = gamma normal + beta, r = 1 / sqrt(variance + eps).
template <class T>
void layer_norm(const Block<T>& b, const Stage& stage) {
  const T *in = b.at(stage.in), *gamma = stage.weight >= 0 ? b.call.params[stage.weight] : nullptr,
          *beta = stage.bias >= 0 ? b.call.params[stage.bias] : nullptr;
  T *normal = b.at(stage.normal), *z = b.at(stage.z), *r = b.at(stage.r);
  const int64_t k = stage.k, ld = b.ld;
  for (int64_t v = 0; v < ld; v += Lanes<T>::count) {
    const vec<T> mean = column_sum<T>(k, [&](int64_t n) { return load<T>(in + n * ld + v); }) / T(k);
    const vec<T> square = column_sum<T>(k, [&](int64_t n) {
      const vec<T> off = load<T>(in + n * ld + v) - mean;
      return off * off;
    });
    T root[Lanes<T>::count];
    store<T>(root, square / T(k) + T(stage.eps));
    for (T& value : root) value = T(1) / __builtin_sqrt(value);
    const vec<T> scale = load<T>(root);
    store<T>(r + v, scale);
    for (int64_t n = 0; n < k; n++) {
      const vec<T> x = (load<T>(in + n * ld + v) - mean) * scale;
      store<T>(normal + n * ld + v, x);
      const vec<T> y = gamma ? gamma[n] * x : x;
      store<T>(z + n * ld + v, beta ? y + beta[n] : y);
    }
  }
}

// out = a(z), or PReLU of it, and dropout; `out` may be z.
template <class T>
void activated(const Block<T>& b, const Stage& stage, const T* z, T* out) {
  if (stage.slope < 0) {
    activate<T>(stage.act, T(stage.parameter), z, out, stage.n * b.ld);
  } else {
    const T* slope = b.call.params[stage.slope];
    each_vector<T>(stage.n, b.ld, [&](int64_t n, int64_t at) {
      const vec<T> x = load<T>(z + at);
      store<T>(out + at, x > T(0) ? x : slope[stage.slope_per_column ? n : 0] * x);
    });
  }
  drop_out(b, stage, out);
}

// dz from the gradient of the output, in place; of PReLU also the rows for its slope.
template <class T>
void differentiated(const BackwardBlock<T>& b, const Stage& stage, T* d) {
  const T* z = b.at(stage.z);
  drop_out<T>(b, stage, d);
  if (stage.slope < 0) return differentiate<T>(stage.act, T(stage.parameter), z, d, stage.n * b.ld);
  const T* slope = b.call.params[stage.slope];
  each_vector<T>(stage.n, b.ld, [&](int64_t n, int64_t at) {
    const vec<T> x = load<T>(z + at), g = load<T>(d + at);
    store<T>(b.workspace + at, x > T(0) ? splat<T>(0) : g * x);
    store<T>(d + at, x > T(0) ? g : slope[stage.slope_per_column ? n : 0] * g);
  });
  b.store_rows(b.workspace, stage.d_slope, stage.n);
}

// to = the gradient of a LayerNorm's input: r (dn - mean(dn) - normal mean(dn normal)), dn = gamma dz.
template <class T>
void layer_norm_backward(const BackwardBlock<T>& b, const Stage& stage, const T* d_z, T* to) {
  const T *normal = b.at(stage.normal), *r = b.at(stage.r),
          *gamma = stage.weight >= 0 ? b.call.params[stage.weight] : nullptr;
  const int64_t k = stage.k, ld = b.ld;
  if (stage.d_gamma >= 0) {
    each_vector<T>(k, ld, [&](int64_t, int64_t at) {
      store<T>(b.workspace + at, load<T>(d_z + at) * load<T>(normal + at));
    });
    b.store_rows(b.workspace, stage.d_gamma, k);
  }
  for (int64_t v = 0; v < ld; v += Lanes<T>::count) {
    const auto dn = [&](int64_t n) {
      const vec<T> d = load<T>(d_z + n * ld + v);
      return gamma ? gamma[n] * d : d;
    };
    const vec<T> mean = column_sum<T>(k, dn) / T(k);
    const vec<T> along =
        column_sum<T>(k, [&](int64_t n) { return dn(n) * load<T>(normal + n * ld + v); }) / T(k);
    for (int64_t n = 0; n < k; n++) {
      store<T>(to + n * ld + v, load<T>(r + v) * (dn(n) - mean - load<T>(normal + n * ld + v) * along));
    }
  }
}

// p of a gate, over what the call's route leaves of what it sees.
template <class T>
void softmax_of(const Block<T>& b, const UnitPlan& unit) {
  const T* z = b.at(unit.logits);
  T* p = b.at(unit.p);
  const int64_t size = b.ld * sizeof(T);
  if (!unit.open.count) return softmax(z, T(unit.factor), unit.p.width, b.ld, p);
  T* open = b.workspace;
  for (int64_t i = 0; i < unit.open.count; i++) memcpy(open + i * b.ld, z + unit.open[i] * b.ld, size);
  softmax(open, T(unit.factor), unit.open.count, b.ld, open);
  for (int64_t i = 0; i < unit.open.count; i++) memcpy(p + unit.open[i] * b.ld, open + i * b.ld, size);
}

// The logits of a gate that is no linear map: a parameter, or query . key of each expert.
template <class T>
void other_logits(const Block<T>& b, const UnitPlan& unit) {
  T* z = b.at(unit.logits);
  if (unit.free >= 0)
    each_vector<T>(unit.logits.width, b.ld,
                   [&](int64_t e, int64_t at) { store<T>(z + at, splat<T>(b.call.params[unit.free][e])); });
  for (int64_t j = 0; j < unit.keys.count; j++) {
    if (unit.keys[j].panel.id < 0) continue;
    const T *q = b.at(unit.query[0].panel), *key = b.at(unit.keys[j].panel);
    dot<T, 1>([&](int) { return q; }, key, unit.query[0].panel.width, b.ld, [&](int) { return z + j * b.ld; });
  }
}
template <class T>
void other_logits_backward(const BackwardBlock<T>& b, const UnitPlan& unit, const T* d_z) {
  if (unit.free >= 0) b.store_rows(d_z, unit.d_free, unit.logits.width);
  for (int64_t j = 0; j < unit.keys.count; j++) {
    const Attended &query = unit.query[0], &key = unit.keys[j];
    if (key.panel.id < 0) continue;
    const auto send = [&](const Attended& from, const Attended& to) {
      if (to.d < 0) return;
      each_vector<T>(from.panel.width, b.ld, [&](int64_t n, int64_t at) {
        T* d = b.d(to.d) + at;
        store<T>(d, load<T>(d) + load<T>(d_z + j * b.ld + at - n * b.ld) * load<T>(b.at(from.panel) + at));
      });
    };
    send(key, query);
    send(query, key);
  }
}

// Beside the mix: the product of two experts, and static weights one a column.
template <class T>
void beside_the_mix(const Block<T>& b, const Segment& segment, const UnitPlan& unit) {
  T* out = b.at(unit.out);
  const auto y = [&](int e) { return (const T*)b.at(segment.experts[e].out); };
  if (unit.product.count)
    each_vector<T>(unit.out.width, b.ld, [&](int64_t, int64_t at) {
      store<T>(out + at, load<T>(y(unit.product[0]) + at) * load<T>(y(unit.product[1]) + at));
    });
  for (const Channels& c : unit.channels)
    each_vector<T>(unit.out.width, b.ld, [&](int64_t n, int64_t at) {
      store<T>(out + at, load<T>(out + at) + b.call.params[c.parameter][c.element + n] * load<T>(y(c.expert) + at));
    });
}
template <class T>
void beside_the_mix_backward(const BackwardBlock<T>& b, const Segment& segment, const UnitPlan& unit) {
  const T* g = b.d(unit.d_out);
  const auto y = [&](int e) { return (const T*)b.at(segment.experts[e].out); };
  const auto send = [&](int e, auto term) {
    T* d = b.d(segment.d_expert[e]);
    each_vector<T>(unit.out.width, b.ld,
                   [&](int64_t n, int64_t at) { store<T>(d + at, load<T>(d + at) + term(n, at)); });
  };
  for (int i = 0; i < unit.product.count; i++)
    send(unit.product[i],
         [&](int64_t, int64_t at) { return load<T>(g + at) * load<T>(y(unit.product[1 - i]) + at); });
  for (const Channels& c : unit.channels) {
    send(c.expert, [&](int64_t n, int64_t at) { return b.call.params[c.parameter][c.element + n] * load<T>(g + at); });
    each_vector<T>(unit.out.width, b.ld, [&](int64_t, int64_t at) {
      store<T>(b.workspace + at, load<T>(g + at) * load<T>(y(c.expert) + at));
    });
    b.store_rows(b.workspace, c.d, unit.out.width);
  }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
