// What one comparison starts from and what it compares, and the random numbers both sides are
// given.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "table.h"

namespace fusedmoe::test {

// x [B, S, D], the parameters in the operator's order, and the upstream gradients of the outputs
// and of the mixing weights.
template <class T>
struct Problem {
  Graph graph;
  int64_t rows = 0;
  bool expanded = false;  // all slots of x hold the same numbers, and the kernels read them once
  bool bf16 = false;      // the operands of the linears are bfloat16; the weights are such numbers
  std::vector<T> x;
  std::vector<std::vector<T>> params;
  std::vector<T> d_out, d_weights;
};

// Of dropout, which is on in every run.
constexpr uint64_t dropout_seed = 0x9e3779b97f4a7c15;

// Gradients that were not asked for are empty.
template <class T>
struct Results {
  std::vector<T> out, weights, d_x;
  std::vector<std::vector<T>> grads;
};

inline bool is_linear(const graph::Stage& stage) { return stage.kind == graph::StageKind::linear; }

// Every MLP: of experts, gates and towers.
inline std::vector<const graph::Mlp*> mlps_of(const Graph& graph) {
  std::vector<const graph::Mlp*> all;
  for (const graph::Level& level : graph.levels) {
    for (const graph::Expert& expert : level.experts) all.push_back(&expert.mlp);
    for (const graph::Unit& unit : level.units)
      if (unit.gate)
        for (const graph::Mlp& mlp : unit.gate->mlps) all.push_back(&mlp);
  }
  for (const graph::Mlp& tower : graph.towers) all.push_back(&tower);
  return all;
}

inline bool drops(const Graph& graph) {
  for (const graph::Mlp* mlp : mlps_of(graph))
    for (const graph::Stage& stage : mlp->stages)
      if (stage.dropout > 0) return true;
  return false;
}

// Of each parameter, whether it is the weight of linear maps.
inline std::vector<bool> weights_of(const Graph& graph) {
  std::vector<bool> weights(graph.shapes.size(), false);
  for (const graph::Mlp* mlp : mlps_of(graph))
    for (const graph::Stage& stage : mlp->stages)
      if (is_linear(stage)) weights[stage.weight] = true;
  return weights;
}

// The same bits on every platform, which the distributions of <random> do not promise.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // splitmix64: Steele, Lea and Flood, OOPSLA 2014.
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int64_t below(int64_t count) { return int64_t(next() % uint64_t(count)); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }

 private:
  uint64_t state_;
};

// Operands of a linear: as they are, or rounded to bfloat16, ties to even.
struct NativeOperands {
  template <class Real>
  static Real round(Real x) { return x; }
};
struct Bf16Operands {
  static uint16_t bits(float x) {
    uint32_t whole;
    std::memcpy(&whole, &x, 4);
    return uint16_t(std::isnan(x) ? whole >> 16 | 0x40 : (whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
  static float round(float x) {
    const uint32_t whole = uint32_t(bits(x)) << 16;
    std::memcpy(&x, &whole, 4);
    return x;
  }
};

template <class To, class From>
std::vector<To> convert(const std::vector<From>& from) {
  return std::vector<To>(from.begin(), from.end());
}

template <class To, class From>
Problem<To> convert(const Problem<From>& from) {
  Problem<To> to{from.graph,          from.rows, from.expanded,           from.bf16,
                 convert<To>(from.x), {},        convert<To>(from.d_out), convert<To>(from.d_weights)};
  for (const auto& param : from.params) to.params.push_back(convert<To>(param));
  return to;
}

}  // namespace fusedmoe::test
