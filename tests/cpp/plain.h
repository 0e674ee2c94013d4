// The operator, slowly: loops over the sums of fusedmoe/reference/operator.py, one row at a time,
// in the number type `Real`. In double it is the truth of these tests; in float, with operands of
// linears and sums over rows as they are or in bfloat16, the plain rival by whose errors the
// kernels' are judged.
#pragma once
#include "scalars.h"

namespace fusedmoe::test {

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
  // Of every stage; `kept` is what dropout multiplies with, normal and r are a LayerNorm's.
  struct Trace {
    std::vector<Vector> in, z, kept, normal;
    std::vector<Real> r;
    Vector out;
  };
  struct UnitState {
    Trace gate;
    Vector query;
    std::vector<Vector> keys;
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

  const Real* parameter(int number) const { return number < 0 ? nullptr : given_.params[number].data(); }
  Real prelu(const graph::Stage& stage, int64_t n) const {
    const Vector& slopes = given_.params[stage.slope];
    return slopes[slopes.size() == 1 ? 0 : n];
  }

  // z of column n of a stage, and the sum of the sizes of its terms.
  std::pair<Real, Real> head(const graph::Stage& stage, const Vector& in, Trace& trace, int64_t n) {
    const Real *w = parameter(stage.weight), *bias = parameter(stage.bias);
    Real sum = 0, size = 0;
    for (int64_t k = 0; k < stage.k && is_linear(stage); k++) {
      sum += w[n * stage.k + k] * in[k];
      size += std::abs(w[n * stage.k + k] * in[k]);
    }
    if (stage.kind == graph::StageKind::copy) size = std::abs(sum = in[n]);
    if (stage.kind == graph::StageKind::norm) {
      sum = trace.normal.back()[n] * (w ? w[n] : 1);
      size = std::abs(sum) + 2 * std::abs(in[n] * trace.r.back() * (w ? w[n] : 1));
    }
    return {bias ? sum + bias[n] : sum, size};
  }

  void normalise(const graph::Stage& stage, const Vector& in, Trace& trace) {
    trace.normal.emplace_back();
    trace.r.push_back(0);
    if (stage.kind != graph::StageKind::norm) return;
    Real mean = 0, square = 0;
    for (Real x : in) mean += x / Real(stage.k);
    for (Real x : in) square += (x - mean) * (x - mean) / Real(stage.k);
    trace.r.back() = 1 / std::sqrt(square + Real(stage.eps));
    for (Real x : in) trace.normal.back().push_back((x - mean) * trace.r.back());
  }

  Trace mlp(const graph::Mlp& mlp, size_t level) {
    Trace trace;
    Vector in = read(mlp.sources, level);
    for (const graph::Stage& stage : mlp.stages) {
      Vector z(stage.width), out(stage.width), kept(stage.width);
      for (Real& x : in) x = is_linear(stage) ? Operands::round(x) : x;
      normalise(stage, in, trace);
      for (int64_t n = 0; n < stage.width; n++) {
        const auto [sum, size] = head(stage, in, trace, n);
        if (kinked(stage) && size > 0) distance_ = std::min(distance_, std::abs(sum) / size);
        z[n] = sum;
        kept[n] = Real(test::kept(stage, row_, n));
        out[n] = kept[n] * (stage.slope < 0 ? activated(stage, sum) : sum > 0 ? sum : prelu(stage, n) * sum);
      }
      trace.in.push_back(in);
      trace.z.push_back(z);
      trace.kept.push_back(kept);
      in = out;
    }
    trace.out = in;
    return trace;
  }

  // dz of column n from the gradient of the output.
  Real head_gradient(const graph::Stage& stage, const Trace& trace, size_t j, int64_t n, Real d) {
    d *= trace.kept[j][n];
    const Real z = trace.z[j][n];
    if (stage.slope < 0) return d * slope(stage, z);
    Vector& d_slope = results_.grads[stage.slope];
    if (z <= 0) d_slope[d_slope.size() == 1 ? 0 : n] += d * z;
    return z > 0 ? d : prelu(stage, n) * d;
  }

  // Adds the gradients of the parameters and of the sources, given that of the output.
  void mlp_backward(const graph::Mlp& mlp, const Trace& trace, Vector d, size_t level) {
    for (size_t j = mlp.stages.size(); j-- > 0;) {
      const graph::Stage& stage = mlp.stages[j];
      Vector d_in(stage.k, 0);
      for (int64_t n = 0; n < stage.width; n++) {
        Real d_z = head_gradient(stage, trace, j, n, d[n]);
        if (is_linear(stage)) d_z = Operands::round(d_z);
        if (stage.bias >= 0) results_.grads[stage.bias][n] += d_z;
        if (!is_linear(stage)) {
          d_in[n] = d_z;
          continue;
        }
        const Real* w = parameter(stage.weight) + n * stage.k;
        Real* d_w = results_.grads[stage.weight].data() + n * stage.k;
        for (int64_t k = 0; k < stage.k; k++) {
          d_w[k] += d_z * trace.in[j][k];
          d_in[k] += d_z * w[k];
        }
      }
      if (stage.kind == graph::StageKind::norm) norm_backward(stage, trace.normal[j], trace.r[j], d_in);
      d = d_in;
    }
    send(mlp.sources, level, d);
  }

  // d: that of the LayerNorm's output, and afterwards of its input.
  void norm_backward(const graph::Stage& stage, const Vector& normal, Real r, Vector& d) {
    Real mean = 0, along = 0;
    for (int64_t n = 0; n < stage.k; n++) {
      if (stage.weight >= 0) {
        results_.grads[stage.weight][n] += d[n] * normal[n];
        d[n] *= given_.params[stage.weight][n];
      }
      mean += d[n] / Real(stage.k);
      along += d[n] * normal[n] / Real(stage.k);
    }
    for (int64_t n = 0; n < stage.k; n++) d[n] = r * (d[n] - mean - normal[n] * along);
  }

  void forward(int64_t row) {
    const graph::Input& input = graph_.inputs[0];
    row_ = row;
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
    UnitState state;
    state.p = state.w = Vector(experts.size(), 0);
    if (!unit.computed) return state;
    if (unit.gate && !unit.gate->sees.empty()) {
      const graph::Gate& gate = *unit.gate;
      Vector z = logits(gate, state, level);
      for (Real& logit : z) logit *= Real(gate.factor);
      const Real most = *std::max_element(z.begin(), z.end());
      Real sum = 0;
      for (size_t j = 0; j < z.size(); j++) sum += state.p[gate.sees[j]] = std::exp(z[j] - most);
      for (int e : gate.sees) state.w[e] = state.p[e] /= sum;
    }
    if (unit.static_weights) {
      const graph::Static& s = *unit.static_weights;
      for (size_t j = 0; j < s.experts.size() && !s.channels; j++)
        state.w[s.experts[j]] +=
            s.parameter >= 0 ? given_.params[s.parameter][s.offset + int64_t(j)] : Real(s.values[j]);
    }
    Vector out(unit.width, 0);
    for (int e : unit.reads)
      for (int64_t n = 0; n < unit.width && unit.product.empty(); n++) out[n] += state.w[e] * experts[e].y[n];
    each_channel(unit, [&](int e, int64_t n, int64_t element) {
      out[n] += given_.params[unit.static_weights->parameter][element] * experts[e].y[n];
    });
    for (int64_t n = 0; n < unit.width && !unit.product.empty(); n++)
      out[n] = experts[unit.product[0]].y[n] * experts[unit.product[1]].y[n];
    state.out = Value(out);
    return state;
  }

  // Before `factor`.
  Vector logits(const graph::Gate& gate, UnitState& state, size_t level) {
    if (gate.free >= 0) return given_.params[gate.free];
    if (gate.query.empty()) {
      state.gate = mlp(gate.mlps[0], level);
      return state.gate.out;
    }
    Vector z;
    state.query = read(gate.query, level);
    for (const auto& sources : gate.keys) {
      state.keys.push_back(read(sources, level));
      Real sum = 0;
      for (size_t k = 0; k < state.query.size(); k++) sum += state.query[k] * state.keys.back()[k];
      z.push_back(sum);
    }
    return z;
  }

  // f(expert, column, element of the parameter) for static weights of one a column.
  template <class F>
  static void each_channel(const graph::Unit& unit, F f) {
    if (!unit.static_weights || !unit.static_weights->channels) return;
    const graph::Static& s = *unit.static_weights;
    for (size_t j = 0; j < s.experts.size(); j++)
      for (int64_t n = 0; n < unit.width; n++) f(s.experts[j], n, s.offset + int64_t(j) * unit.width + n);
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
    for (size_t i = 0; i < unit.product.size(); i++)
      for (int64_t n = 0; n < unit.width; n++)
        experts[unit.product[i]].d[n] += state.out.d[n] * experts[unit.product[1 - i]].y[n];
    if (unit.differentiated) each_channel(unit, [&](int e, int64_t n, int64_t element) {
      results_.grads[unit.static_weights->parameter][element] += state.out.d[n] * experts[e].y[n];
      experts[e].d[n] += given_.params[unit.static_weights->parameter][element] * state.out.d[n];
    });
    for (int e : unit.reads) {
      for (int64_t n = 0; n < unit.width; n++) {
        dw[e] += state.out.d[n] * experts[e].y[n];
        experts[e].d[n] += state.w[e] * state.out.d[n];
      }
      dw[e] += d_weights[e];
      sum += state.p[e] * dw[e];
    }
    if (unit.static_weights && unit.static_weights->parameter >= 0 && !unit.static_weights->channels) {
      const graph::Static& s = *unit.static_weights;
      for (size_t j = 0; j < s.experts.size(); j++)
        results_.grads[s.parameter][s.offset + int64_t(j)] += Operands::round(dw[s.experts[j]]);
    }
    if (!unit.gate || unit.gate->sees.empty()) return;
    Vector d_logits;
    for (int e : unit.gate->sees) d_logits.push_back(Real(unit.gate->factor) * (state.p[e] * (dw[e] - sum)));
    logits_backward(*unit.gate, state, d_logits, level);
  }

  void logits_backward(const graph::Gate& gate, const UnitState& state, const Vector& d, size_t level) {
    for (size_t j = 0; j < d.size() && gate.free >= 0; j++) results_.grads[gate.free][j] += d[j];
    if (!gate.mlps.empty()) mlp_backward(gate.mlps[0], state.gate, d, level);
    for (size_t j = 0; j < gate.keys.size(); j++) {
      Vector d_query = state.keys[j], d_key = state.query;
      for (Real& value : d_query) value *= d[j];
      for (Real& value : d_key) value *= d[j];
      send(gate.query, level, d_query);
      send(gate.keys[j], level, d_key);
    }
  }

  const Problem<Real>& given_;
  const Graph& graph_;
  Results<Real> results_;
  Real distance_ = 0;
  int64_t row_ = 0;
  std::vector<Value> inputs_;
  std::vector<LevelState> levels_;
  std::vector<Trace> towers_;
  std::vector<Vector> detached_;
  const std::vector<Vector>* held_ = nullptr;
};

}  // namespace fusedmoe::test
