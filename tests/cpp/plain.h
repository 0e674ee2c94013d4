// The operator, slowly: loops over the sums of fusedmoe/reference/operator.py, one row at a time,
// in the number type `Real`. In double it is the truth of these tests; in float, with operands of
// linears and sums over rows as they are or in bfloat16, the plain rival by whose errors the
// kernels' are judged.
#pragma once
#include <algorithm>
#include <limits>

#include "problem.h"

namespace fusedmoe::test {

inline bool kinked(Act act) { return act == Act::relu || act == Act::leaky_relu || act == Act::elu; }

template <class Real>
Real gelu_tanh_exponent(Real z) {
  return 2 * Real(0.79788456080286535588L) * (z + Real(0.044715L) * z * z * z);
}

template <class Real>
Real activated(const Layer& layer, Real z) {
  const Real a = Real(layer.parameter);
  switch (layer.act) {
    case Act::identity: return z;
    case Act::relu: return z < 0 ? Real(0) : z;
    case Act::sigmoid: return 1 / (1 + std::exp(-z));
    case Act::tanh: return std::tanh(z);
    case Act::silu: return z / (1 + std::exp(-z));
    // In forms that keep their digits at negative z: 1 + erf(z) = erfc(-z), and 1 + tanh(u) = 2 /
    // (1 + exp(-2 u)).
    case Act::gelu: return z / 2 * std::erfc(-z * Real(0.70710678118654752440L));
    case Act::gelu_tanh: return z / (1 + std::exp(-gelu_tanh_exponent(z)));
    case Act::leaky_relu: return z > 0 ? z : a * z;
    case Act::elu: return z > 0 ? z : a * std::expm1(z);
    case Act::softplus: return z > 20 ? z : std::log1p(std::exp(z));
  }
  return std::numeric_limits<Real>::quiet_NaN();
}

template <class Real>
Real slope(const Layer& layer, Real z) {
  const Real a = Real(layer.parameter), s = 1 / (1 + std::exp(-z)), rest = 1 / (1 + std::exp(z));
  switch (layer.act) {
    case Act::identity: return 1;
    case Act::relu: return z <= 0 ? 0 : 1;
    case Act::sigmoid: return s * rest;
    case Act::tanh: return 1 / (std::cosh(z) * std::cosh(z));
    case Act::silu: return s * (1 + z * rest);
    case Act::gelu:
      return std::erfc(-z * Real(0.70710678118654752440L)) / 2 +
             z * Real(0.39894228040143267794L) * std::exp(-z * z / 2);
    case Act::gelu_tanh: {
      const Real share = 1 / (1 + std::exp(-gelu_tanh_exponent(z))), other = 1 / (1 + std::exp(gelu_tanh_exponent(z)));
      return share + z * share * other * 2 * Real(0.79788456080286535588L) * (1 + 3 * Real(0.044715L) * z * z);
    }
    case Act::leaky_relu: return z > 0 ? 1 : a;
    case Act::elu: return z > 0 ? 1 : a * std::exp(z);
    case Act::softplus: return z > 20 ? 1 : s;
  }
  return std::numeric_limits<Real>::quiet_NaN();
}

template <class Real, class Operands = NativeOperands>
class Plain {
 public:
  using Vector = std::vector<Real>;

  explicit Plain(const Problem<Real>& given) : given_(given), table_(given.table) {}

  // Outputs, mixing weights and the gradients of x and of every live parameter.
  Results<Real> run() {
    results_ = {};
    results_.d_x.assign(given_.x.size(), 0);
    for (size_t i = 0; i < given_.params.size(); i++)
      results_.grads.emplace_back(table_.live[i] ? given_.params[i].size() : 0, Real(0));
    for (int64_t row = 0; row < given_.rows; row++) {
      forward(row);
      backward(row);
    }
    return results_;
  }

  // loss = sum of out * d_out + sum of weights * d_weights, and the sum of the terms' sizes.
  std::pair<Real, Real> loss() {
    results_ = {};
    for (int64_t row = 0; row < given_.rows; row++) forward(row);
    Real sum = 0, size = 0;
    const auto add = [&](const Vector& values, const Vector& d) {
      for (size_t i = 0; i < values.size(); i++) {
        sum += values[i] * d[i];
        size += std::abs(values[i] * d[i]);
      }
    };
    add(results_.out, given_.d_out);
    add(results_.weights, given_.d_weights);
    return {sum, size};
  }

  // The least |z| / sum over k of |w_k x_k| of any pre-activation of the row where a derivative
  // jumps.
  Real distance_from_kinks(int64_t row) {
    distance_ = std::numeric_limits<Real>::infinity();
    forward(row);
    return distance_;
  }

 private:
  struct Mlp {
    std::vector<Vector> in, z;
    Vector out;
  };
  struct LevelState {
    std::vector<Vector> slots;
    std::vector<Mlp> experts, gates;
    std::vector<Vector> p, w;  // by expert; p is 0 for what the gate does not see
    std::vector<std::vector<int>> reads;
    std::vector<Vector> out;
  };

  Mlp mlp(const std::vector<Layer>& layers, Vector in) {
    Mlp m;
    for (const Layer& layer : layers) {
      Vector z(layer.width), out(layer.width);
      for (Real& x : in) x = Operands::round(x);
      for (int64_t n = 0; n < layer.width; n++) {
        const Real* w = given_.params[layer.weight].data() + n * layer.k;
        Real sum = 0, size = 0;
        for (int64_t k = 0; k < layer.k; k++) sum += w[k] * in[k];
        if (layer.bias >= 0) sum += given_.params[layer.bias][n];
        if (kinked(layer.act))
          for (int64_t k = 0; k < layer.k; k++) size += std::abs(w[k] * in[k]);
        if (size > 0) distance_ = std::min(distance_, std::abs(sum) / size);
        z[n] = sum;
        out[n] = activated(layer, sum);
      }
      m.in.push_back(in);
      m.z.push_back(z);
      in = out;
    }
    m.out = in;
    return m;
  }

  // Adds the parameters' gradients and returns that of the input.
  Vector mlp_backward(const std::vector<Layer>& layers, const Mlp& m, Vector d) {
    for (size_t j = layers.size(); j-- > 0;) {
      const Layer& layer = layers[j];
      Vector d_in(layer.k, 0);
      for (int64_t n = 0; n < layer.width; n++) {
        const Real d_z = Operands::round(d[n] * slope(layer, m.z[j][n]));
        const Real* w = given_.params[layer.weight].data() + n * layer.k;
        Real* d_w = results_.grads[layer.weight].data() + n * layer.k;
        if (layer.bias >= 0) results_.grads[layer.bias][n] += d_z;
        for (int64_t k = 0; k < layer.k; k++) {
          d_w[k] += d_z * m.in[j][k];
          d_in[k] += d_z * w[k];
        }
      }
      d = d_in;
    }
    return d;
  }

  void forward(int64_t row) {
    states_.clear();
    inputs_.clear();
    for (int64_t s = 0; s < table_.slots; s++) {
      const auto from = given_.x.begin() + (row * table_.slots + s) * table_.width;
      inputs_.emplace_back(from, from + table_.width);
    }
    std::vector<Vector> slots = inputs_;
    for (const Level& level : table_.levels) {
      LevelState state;
      state.slots = slots;
      for (const Expert& e : level.experts) state.experts.push_back(e.live ? mlp(e.layers, slots[e.slot]) : Mlp{});
      for (const Unit& unit : level.units) mix(level, unit, state);
      slots = state.out;
      states_.push_back(std::move(state));
    }
    towers_.clear();
    if (!table_.has_towers)
      for (const Vector& out : slots) append(results_.out, out);
    for (const Task& task : table_.tasks) {
      if (!table_.has_towers) break;
      Vector in;
      for (int u : task.units) append(in, slots[u]);
      towers_.push_back(mlp(task.tower, in));
      append(results_.out, towers_.back().out);
    }
  }

  static void append(Vector& to, const Vector& more) { to.insert(to.end(), more.begin(), more.end()); }

  const Vector& selected(const LevelState& state, const Selector& s) const {
    return s.kind == SelectorKind::root   ? inputs_[table_.root]
           : s.kind == SelectorKind::slot ? state.slots[s.index]
                                          : state.experts[s.index].out;
  }

  void mix(const Level& level, const Unit& unit, LevelState& state) {
    Vector p(level.experts.size(), 0), w(level.experts.size(), 0), out(unit.width, 0);
    std::vector<char> read(level.experts.size(), 0);
    Mlp gate;
    if (unit.live && unit.gate && !unit.gate->sees.empty()) {
      gate = mlp(unit.gate->layers, selected(state, unit.gate->selector));
      const Real most = *std::max_element(gate.out.begin(), gate.out.end());
      Real sum = 0;
      for (size_t j = 0; j < gate.out.size(); j++) sum += p[unit.gate->sees[j]] = std::exp(gate.out[j] - most);
      for (int e : unit.gate->sees) {
        w[e] = p[e] /= sum;
        read[e] = 1;
      }
    }
    if (unit.live && unit.static_weights)
      for (size_t j = 0; j < unit.static_weights->experts.size(); j++) {
        const Static& s = *unit.static_weights;
        w[s.experts[j]] += s.parameter >= 0 ? given_.params[s.parameter][s.offset + int64_t(j)] : Real(s.values[j]);
        read[s.experts[j]] = 1;
      }
    std::vector<int> reads;
    for (size_t e = 0; e < read.size(); e++)
      if (read[e]) {
        reads.push_back(int(e));
        for (int64_t n = 0; n < unit.width; n++) out[n] += w[e] * state.experts[e].out[n];
      }
    append(results_.weights, w);
    state.gates.push_back(gate);
    state.p.push_back(p);
    state.w.push_back(w);
    state.reads.push_back(reads);
    state.out.push_back(out);
  }

  static void add(Vector& to, const Vector& more) {
    for (size_t i = 0; i < more.size(); i++) to[i] += more[i];
  }

  void backward(int64_t row) {
    std::vector<Vector> d_inputs(table_.slots, Vector(table_.width, 0)), d_units;
    for (const Unit& unit : table_.levels.back().units) d_units.emplace_back(unit.width, 0);
    const int64_t width = table_.output[1];
    auto d = given_.d_out.begin() + row * table_.output[0] * width;
    for (size_t u = 0; u < d_units.size() && !table_.has_towers; u++, d += width) d_units[u].assign(d, d + width);
    for (size_t t = 0; t < towers_.size(); t++, d += width) {
      const Vector d_in = mlp_backward(table_.tasks[t].tower, towers_[t], Vector(d, d + width));
      auto from = d_in.begin();
      for (int u : table_.tasks[t].units)
        for (Real& to : d_units[u]) to += *from++;
    }
    int64_t column = table_.mixing;
    for (size_t l = table_.levels.size(); l-- > 0;) {
      column -= int64_t(table_.levels[l].experts.size() * table_.levels[l].units.size());
      d_units = backward_level(l, d_units, given_.d_weights.data() + row * table_.mixing + column, d_inputs);
    }
    for (int64_t s = 0; s < table_.slots; s++) {
      add(d_inputs[s], d_units[s]);
      std::copy(d_inputs[s].begin(), d_inputs[s].end(), results_.d_x.begin() + (row * table_.slots + s) * table_.width);
    }
  }

  // Returns the gradients of the level's slots; what root selectors send goes to d_inputs.
  std::vector<Vector> backward_level(size_t l, const std::vector<Vector>& d_units, const Real* d_weights,
                                     std::vector<Vector>& d_inputs) {
    const Level& level = table_.levels[l];
    const LevelState& state = states_[l];
    const size_t experts = level.experts.size();
    std::vector<Vector> d_slots, d_experts;
    for (const Vector& slot : state.slots) d_slots.emplace_back(slot.size(), 0);
    for (const Mlp& expert : state.experts) d_experts.emplace_back(expert.out.size(), 0);
    for (size_t u = 0; u < level.units.size(); u++) {
      const Unit& unit = level.units[u];
      if (!unit.live) continue;
      Vector dw(experts, 0);
      Real sum = 0;
      for (int e : state.reads[u]) {
        for (int64_t n = 0; n < unit.width; n++) {
          dw[e] += d_units[u][n] * state.experts[e].out[n];
          d_experts[e][n] += state.w[u][e] * d_units[u][n];
        }
        dw[e] += d_weights[u * experts + e];
        sum += state.p[u][e] * dw[e];
      }
      if (unit.static_weights && unit.static_weights->parameter >= 0)
        for (size_t j = 0; j < unit.static_weights->experts.size(); j++)
          results_.grads[unit.static_weights->parameter][unit.static_weights->offset + int64_t(j)] +=
              Operands::round(dw[unit.static_weights->experts[j]]);
      if (!unit.gate || unit.gate->sees.empty()) continue;
      Vector d_logits;
      for (int e : unit.gate->sees) d_logits.push_back(state.p[u][e] * (dw[e] - sum));
      const Selector& s = unit.gate->selector;
      Vector& d_q = s.kind == SelectorKind::root   ? d_inputs[table_.root]
                    : s.kind == SelectorKind::slot ? d_slots[s.index]
                                                   : d_experts[s.index];
      add(d_q, mlp_backward(unit.gate->layers, state.gates[u], d_logits));
    }
    for (size_t e = 0; e < experts; e++)
      if (level.experts[e].live)
        add(d_slots[level.experts[e].slot], mlp_backward(level.experts[e].layers, state.experts[e], d_experts[e]));
    return d_slots;
  }

  const Problem<Real>& given_;
  const Table& table_;
  Results<Real> results_;
  Real distance_ = 0;
  std::vector<Vector> inputs_;
  std::vector<LevelState> states_;
  std::vector<Mlp> towers_;
};

}  // namespace fusedmoe::test
