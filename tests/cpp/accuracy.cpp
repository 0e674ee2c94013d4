#include "accuracy.h"

#include "expectation.h"
#include "kernels.h"

namespace fusedmoe::test {
namespace {

// Every binade of both signs from the smallest that matters to where the functions are straight,
// `each` points in each, and 0.
template <class T>
std::vector<T> grid(int each) {
  std::vector<T> points = {0};
  for (int exponent = -30; exponent < 8; exponent++)
    for (int i = 0; i < each; i++)
      for (T sign : {T(-1), T(1)}) points.push_back(sign * std::ldexp(T(1) + T(i) / T(each), exponent));
  return points;
}

// A network that is the activation alone: its output and, from an upstream gradient of 1, its
// derivative.
template <class T>
Results<T> through_network(const Graph& graph, const std::vector<T>& x) {
  const std::vector<T> ones(x.size(), T(1)), zeros(x.size(), T(0));
  return run(Problem<T>{graph, int64_t(x.size()), false, false, x, {{T(1)}}, ones, zeros});
}
graph::Stage stage_of(const Graph& graph) { return graph.levels[0].experts[0].mlp.stages[0]; }

// The kernels take the derivative of these from the output, whose rounding is not small beside a
// derivative near 0.
bool from_output(Act act) { return act == Act::sigmoid || act == Act::tanh; }

// The worst error in units of what a change of x and of the result by one roundoff each would
// cause: roundoff (|f| + |x f'|).
template <class T>
Accuracy measure(const Graph& graph, int each) {
  using Wide = long double;
  const std::vector<T> x = grid<T>(each);
  graph::Stage stage = stage_of(graph);
  // As the kernels have it.
  stage.parameter = double(T(stage.parameter));
  const Results<T> ours = through_network(graph, x);
  Accuracy worst;
  for (size_t i = 0; i < x.size(); i++) {
    const Wide z = x[i], f = activated(stage, z), d = slope(stage, z), step = 1e-6L;
    const Wide turn = (slope(stage, z * (1 + step)) - slope(stage, z * (1 - step))) / (2 * step);
    // Below the normal numbers a result has fewer digits, or is 0.
    const Wide least = std::numeric_limits<T>::min() * std::max(Wide(1), std::abs(z));
    const auto units = [&](T value, Wide truth, Wide size) {
      const Wide error = std::abs(Wide(value) - truth);
      return error <= least ? 0.0 : double(error / (roundoff<T> * size));
    };
    const auto raise = [](double& most, double value) { most = value <= most ? most : value; };
    raise(worst.value, units(ours.out[i], f, std::abs(f) + std::abs(z * d)));
    raise(worst.slope, units(ours.d_x[i], d, from_output(stage.act) ? Wide(1) : std::abs(d) + std::abs(turn)));
  }
  return worst;
}

}  // namespace

template <class T>
std::vector<Accuracy> accuracy(const std::vector<Case>& cases, int each) {
  std::vector<Accuracy> all;
  for (size_t act = 0; act < activations.size(); act++) all.push_back(measure<T>(alone(cases, Act(act)), each));
  return all;
}
template std::vector<Accuracy> accuracy<float>(const std::vector<Case>&, int);
template std::vector<Accuracy> accuracy<double>(const std::vector<Case>&, int);

template <class T>
std::string special_values(const std::vector<Case>& cases) {
  const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN(),
          largest = std::numeric_limits<T>::max();
  const std::vector<T> x = {infinity, -infinity, nan, largest, -largest, T(-0.0)};
  for (size_t act = 0; act < activations.size(); act++) {
    const std::vector<T> ours = through_network(alone(cases, Act(act)), x).out;
    for (size_t i = 0; i < x.size(); i++) {
      const T plain = activated(stage_of(alone(cases, Act(act))), x[i]);
      if (!(ours[i] == plain || (std::isnan(ours[i]) && std::isnan(plain))))
        return activations[act] + " of " + std::to_string(x[i]) + ": expected " + std::to_string(plain) + ", got " +
               std::to_string(ours[i]);
    }
  }
  return "";
}
template std::string special_values<float>(const std::vector<Case>&);
template std::string special_values<double>(const std::vector<Case>&);

}  // namespace fusedmoe::test
