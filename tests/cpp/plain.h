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
Real activated(const graph::Stage& stage, Real z) {
  const Real a = Real(stage.parameter);
  switch (stage.act) {
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
Real slope(const graph::Stage& stage, Real z) {
  const Real a = Real(stage.parameter), s = 1 / (1 + std::exp(-z)), rest = 1 / (1 + std::exp(z));
  switch (stage.act) {
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

  explicit Plain(const Problem<Real>& given) : given_(given), graph_(given.graph) {}

  // Outputs, mixing weights and the gradients of x and of every live parameter.
  Results<Real> run() {
    start();
    for (size_t i = 0; i < given_.params.size(); i++)
      results_.grads.emplace_back(graph_.live[i] ? given_.params[i].size() : 0, Real(0));
    for (int64_t row = 0; row < given_.rows; row++) {
      forward(row);
      backward(row);
    }
    return results_;
  }

  // loss = sum of out * d_out + sum of weights * d_weights, and the sum of the terms' sizes.
  // `held`: what detached reads give, as `detached` has it; null: what is there.
  std::pair<Real, Real> loss(const std::vector<Vector>* held = nullptr) {
    start();
    held_ = held;
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

  // What the detached reads of the last run gave, one after another.
  const std::vector<Vector>& detached() const { return detached_; }

  // The least |z| / sum over k of |w_k x_k| of any pre-activation of the row where a derivative
  // jumps.
  Real distance_from_kinks(int64_t row) {
    distance_ = std::numeric_limits<Real>::infinity();
    forward(row);
    return distance_;
  }

 private:
  // A vector of the row, and what its readers have sent of its gradient.
  struct Value {
    explicit Value(Vector values = {}) : y(std::move(values)), d(y.size(), 0) {}
    Vector y, d;
  };
  struct Trace {
    std::vector<Vector> in, z;
    Vector out;
  };
  struct UnitState {
    Trace gate;
    Vector p, w;  // by expert; p is 0 for what the gate does not see
    Value out;
  };
  // What is not computed is empty.
  struct LevelState {
    std::vector<Trace> mlps;
    std::vector<Value> experts;
    std::vector<UnitState> units;
  };

  void start() {
    results_ = {};
    detached_.clear();
    held_ = nullptr;
    results_.d_x.assign(given_.x.size(), 0);
  }

  // What a vector is some columns of, where it is read in this level.
  Value& whole(const graph::Vector& v, size_t level) {
    return v.kind == graph::VectorKind::input  ? inputs_.at(v.index)
           : v.kind == graph::VectorKind::unit ? levels_.at(v.place).units.at(v.index).out
                                               : levels_.at(level).experts.at(v.index);
  }

  // The concatenation of the sources.
  Vector read(const std::vector<graph::Vector>& sources, size_t level) {
    Vector all;
    for (const graph::Vector& v : sources) {
      const auto from = whole(v, level).y.begin() + v.first;
      Vector part(from, from + v.width);
      if (v.detached && held_) part = held_->at(detached_.size());
      if (v.detached) detached_.push_back(part);
      append(all, part);
    }
    return all;
  }

  // Adds the gradient of a concatenation to those of its sources.
  void send(const std::vector<graph::Vector>& sources, size_t level, const Vector& d) {
    auto from = d.begin();
    for (const graph::Vector& v : sources) {
      for (int64_t i = 0; i < v.width && !v.detached; i++) whole(v, level).d[v.first + i] += from[i];
      from += v.width;
    }
  }

  Trace mlp(const graph::Mlp& mlp, size_t level) {
    Trace trace;
    Vector in = read(mlp.sources, level);
    for (const graph::Stage& stage : mlp.stages) {
      Vector z(stage.width), out(stage.width);
      for (Real& x : in) x = Operands::round(x);
      for (int64_t n = 0; n < stage.width; n++) {
        const Real* w = given_.params[stage.weight].data() + n * stage.k;
        Real sum = 0, size = 0;
        for (int64_t k = 0; k < stage.k; k++) sum += w[k] * in[k];
        if (stage.bias >= 0) sum += given_.params[stage.bias][n];
        if (kinked(stage.act))
          for (int64_t k = 0; k < stage.k; k++) size += std::abs(w[k] * in[k]);
        if (size > 0) distance_ = std::min(distance_, std::abs(sum) / size);
        z[n] = sum;
        out[n] = activated(stage, sum);
      }
      trace.in.push_back(in);
      trace.z.push_back(z);
      in = out;
    }
    trace.out = in;
    return trace;
  }

  // Adds the gradients of the parameters and of the sources, given that of the output.
  void mlp_backward(const graph::Mlp& mlp, const Trace& trace, Vector d, size_t level) {
    for (size_t j = mlp.stages.size(); j-- > 0;) {
      const graph::Stage& stage = mlp.stages[j];
      Vector d_in(stage.k, 0);
      for (int64_t n = 0; n < stage.width; n++) {
        const Real d_z = Operands::round(d[n] * slope(stage, trace.z[j][n]));
        const Real* w = given_.params[stage.weight].data() + n * stage.k;
        Real* d_w = results_.grads[stage.weight].data() + n * stage.k;
        if (stage.bias >= 0) results_.grads[stage.bias][n] += d_z;
        for (int64_t k = 0; k < stage.k; k++) {
          d_w[k] += d_z * trace.in[j][k];
          d_in[k] += d_z * w[k];
        }
      }
      d = d_in;
    }
    send(mlp.sources, level, d);
  }

  void forward(int64_t row) {
    const graph::Input& input = graph_.inputs[0];
    inputs_.clear();
    levels_.clear();
    towers_.clear();
    for (int64_t s = 0; s < input.slots; s++) {
      const auto from = given_.x.begin() + (row * input.slots + s) * input.width;
      inputs_.emplace_back(Vector(from, from + input.width));
    }
    for (size_t l = 0; l < graph_.levels.size(); l++) {
      const graph::Level& level = graph_.levels[l];
      LevelState& state = levels_.emplace_back();
      for (const graph::Expert& e : level.experts) {
        state.mlps.push_back(e.computed ? mlp(e.mlp, l) : Trace{});
        state.experts.emplace_back(state.mlps.back().out);
      }
      for (const graph::Unit& unit : level.units) {
        state.units.push_back(mix(unit, l));
        append(results_.weights, state.units.back().w);
      }
    }
    for (const graph::Mlp& tower : graph_.towers) {
      towers_.push_back(mlp(tower, graph_.levels.size()));
      append(results_.out, towers_.back().out);
    }
    for (const UnitState& unit : levels_.back().units)
      if (graph_.towers.empty()) append(results_.out, unit.out.y);
  }

  static void append(Vector& to, const Vector& more) { to.insert(to.end(), more.begin(), more.end()); }

  UnitState mix(const graph::Unit& unit, size_t level) {
    const std::vector<Value>& experts = levels_[level].experts;
    UnitState state{{}, Vector(experts.size(), 0), Vector(experts.size(), 0), Value()};
    if (!unit.computed) return state;
    if (unit.gate && !unit.gate->sees.empty()) {
      const graph::Gate& gate = *unit.gate;
      state.gate = mlp(gate.mlps[0], level);
      Vector z = state.gate.out;
      for (Real& logit : z) logit *= Real(gate.factor);
      const Real most = *std::max_element(z.begin(), z.end());
      Real sum = 0;
      for (size_t j = 0; j < z.size(); j++) sum += state.p[gate.sees[j]] = std::exp(z[j] - most);
      for (int e : gate.sees) state.w[e] = state.p[e] /= sum;
    }
    if (unit.static_weights) {
      const graph::Static& s = *unit.static_weights;
      for (size_t j = 0; j < s.experts.size(); j++)
        state.w[s.experts[j]] +=
            s.parameter >= 0 ? given_.params[s.parameter][s.offset + int64_t(j)] : Real(s.values[j]);
    }
    Vector out(unit.width, 0);
    for (int e : unit.reads)
      for (int64_t n = 0; n < unit.width; n++) out[n] += state.w[e] * experts[e].y[n];
    state.out = Value(out);
    return state;
  }

  void backward(int64_t row) {
    const int64_t width = graph_.output[1];
    auto d = given_.d_out.begin() + row * graph_.output[0] * width;
    for (size_t t = 0; t < towers_.size(); t++, d += width)
      mlp_backward(graph_.towers[t], towers_[t], Vector(d, d + width), graph_.levels.size());
    for (UnitState& unit : levels_.back().units) {
      if (!towers_.empty()) break;
      unit.out.d.assign(d, d + width);
      d += width;
    }
    int64_t column = graph_.mixing;
    for (size_t l = graph_.levels.size(); l-- > 0;) {
      column -= int64_t(graph_.levels[l].experts.size() * graph_.levels[l].units.size());
      backward_level(l, given_.d_weights.data() + row * graph_.mixing + column);
    }
    auto to = results_.d_x.begin() + row * int64_t(inputs_.size()) * graph_.inputs[0].width;
    for (const Value& slot : inputs_) to = std::copy(slot.d.begin(), slot.d.end(), to);
  }

  void backward_level(size_t l, const Real* d_weights) {
    const graph::Level& level = graph_.levels[l];
    LevelState& state = levels_[l];
    for (size_t u = 0; u < level.units.size(); u++)
      if (level.units[u].computed) backward_unit(level.units[u], l, u, d_weights + u * level.experts.size());
    // An expert may read those before it.
    for (size_t e = level.experts.size(); e-- > 0;)
      if (level.experts[e].differentiated) mlp_backward(level.experts[e].mlp, state.mlps[e], state.experts[e].d, l);
  }

  void backward_unit(const graph::Unit& unit, size_t level, size_t u, const Real* d_weights) {
    std::vector<Value>& experts = levels_[level].experts;
    const UnitState& state = levels_[level].units[u];
    Vector dw(experts.size(), 0);
    Real sum = 0;
    for (int e : unit.reads) {
      for (int64_t n = 0; n < unit.width; n++) {
        dw[e] += state.out.d[n] * experts[e].y[n];
        experts[e].d[n] += state.w[e] * state.out.d[n];
      }
      dw[e] += d_weights[e];
      sum += state.p[e] * dw[e];
    }
    if (unit.static_weights && unit.static_weights->parameter >= 0) {
      const graph::Static& s = *unit.static_weights;
      for (size_t j = 0; j < s.experts.size(); j++)
        results_.grads[s.parameter][s.offset + int64_t(j)] += Operands::round(dw[s.experts[j]]);
    }
    if (!unit.gate || unit.gate->sees.empty()) return;
    Vector d_logits;
    for (int e : unit.gate->sees) d_logits.push_back(Real(unit.gate->factor) * (state.p[e] * (dw[e] - sum)));
    mlp_backward(unit.gate->mlps[0], state.gate, d_logits, level);
  }

  const Problem<Real>& given_;
  const Graph& graph_;
  Results<Real> results_;
  Real distance_ = 0;
  std::vector<Value> inputs_;
  std::vector<LevelState> levels_;
  std::vector<Trace> towers_;
  std::vector<Vector> detached_;
  const std::vector<Vector>* held_ = nullptr;
};

}  // namespace fusedmoe::test
