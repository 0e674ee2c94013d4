// Inputs of a case, and how near to the truth a result must come: the rule of fusedmoe/testing/,
//   error(ours, truth) <= 2 error(plain loop in that type, truth) + 8 roundoff max |truth|,
// with the largest absolute difference as error, a plain loop in double as truth, and the plain
// loop's error as the largest of seventeen runs, on the problem and on neighbours a rounding or two
// away, because a single one may be small by luck. For double, where the loop is the truth itself,
// its error is measured in float and scaled by the ratio of the roundoffs; it enters once more, for
// the truth errs as much.
#pragma once
#include <map>
#include <string>

#include "plain.h"
#include "tables.h"

namespace fusedmoe::test {

constexpr int neighbours = 16, kink_roundoffs = 8;

template <class T>
constexpr double roundoff = std::numeric_limits<T>::epsilon() / 2.0;

// Results by name, in double.
using Named = std::map<std::string, std::vector<double>>;

template <class T>
Named named(const Results<T>& results) {
  Named all = {{"out", convert<double>(results.out)},
               {"weights", convert<double>(results.weights)},
               {"d_x", convert<double>(results.d_x)}};
  for (size_t i = 0; i < results.grads.size(); i++)
    all["gradient of parameter " + std::to_string(i)] = convert<double>(results.grads[i]);
  return all;
}

// The size of an error or of a truth: its largest number or, where a z that falls on the other side
// of a kink is to be expected, its norm.
enum class Size { largest, norm };

// Infinite where a number is NaN.
inline double size_of(const std::vector<double>& values, Size kind) {
  double most = 0, squares = 0;
  for (double value : values) {
    most = std::abs(value) <= most ? most
           : std::isnan(value)     ? std::numeric_limits<double>::infinity()
                                   : std::abs(value);
    squares += value * value;
  }
  return kind == Size::largest ? most
         : std::isnan(squares) ? std::numeric_limits<double>::infinity()
                               : std::sqrt(squares);
}
inline double error(std::vector<double> value, const std::vector<double>& truth, Size kind) {
  if (value.size() != truth.size()) return std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < value.size(); i++) value[i] -= truth[i];
  return size_of(value, kind);
}

// Random numbers of the size that keeps a network's outputs near 1. A row whose z comes so near to
// a kink that another order of summation may fall on its other side is drawn again; float's margin
// serves double too, because the plain loop is measured in float on the same rows.
inline Problem<double> problem(const Case& c) {
  const Graph& g = c.graph;
  const graph::Input& input = g.inputs[0];
  Random random(c.seed);
  const auto draw = [&](int64_t count, double scale = 1) {
    std::vector<double> values;
    while (count-- > 0) values.push_back(scale * random.normal());
    return values;
  };
  Problem<double> given{
      g, c.rows, c.expanded, false, {}, {}, draw(c.rows * count_of(g.output)), draw(c.rows * g.mixing)};
  for (const auto& shape : g.shapes)
    given.params.push_back(draw(count_of(shape), shape.size() > 1 ? 1 / std::sqrt(double(shape.back())) : 0.5));
  Problem<double> one = given;
  one.rows = 1;
  Plain<double> plain(one);
  for (int64_t row = 0; row < c.rows; row++) {
    do {
      one.x = draw(input.width);
      for (int64_t s = 1; s < input.slots; s++) {
        const std::vector<double> slot =
            c.expanded ? std::vector<double>(one.x.begin(), one.x.begin() + input.width) : draw(input.width);
        one.x.insert(one.x.end(), slot.begin(), slot.end());
      }
    } while (plain.distance_from_kinks(0) < kink_roundoffs * roundoff<float>);
    given.x.insert(given.x.end(), one.x.begin(), one.x.end());
  }
  return given;
}

// The weights of the linears rounded to bfloat16.
inline Problem<float> halved(Problem<float> given) {
  given.bf16 = true;
  const std::vector<bool> weights = weights_of(given.graph);
  for (size_t i = 0; i < given.params.size(); i++)
    if (weights[i])
      for (float& value : given.params[i]) value = Bf16Operands::round(value);
  return given;
}

// The roundoff of a problem's type.
template <class T>
double roundoff_of(const Problem<T>& given) {
  return given.bf16 ? 0x1p-9 : roundoff<T>;
}

// Every number moved up or down by a rounding or two: another draw of the rounding errors.
inline Problem<float> neighbour(Problem<float> given, uint64_t seed) {
  Random random(seed);
  const auto move = [&](std::vector<float>& values) {
    for (float& value : values) value = float(value * (1 + 2 * roundoff_of(given) * (random.chance(50) ? 1 : -1)));
  };
  move(given.x);
  for (auto& param : given.params) move(param);
  move(given.d_out);
  move(given.d_weights);
  return given.bf16 ? halved(given) : given;
}

// In bfloat16 nearly every row has a z within rounding of 0.
inline Size size_kind(const Graph& graph, bool bf16) {
  bool found = false;
  for (const graph::Mlp* mlp : mlps_of(graph))
    for (const graph::Stage& stage : mlp->stages) found = found || kinked(stage);
  return bf16 && found ? Size::norm : Size::largest;
}

// The largest error of the plain loop in float or bfloat16, by name.
inline std::map<std::string, double> plain_errors(const Problem<float>& given) {
  std::map<std::string, double> worst;
  for (int i = 0; i <= neighbours; i++) {
    const Problem<float> drawn = i ? neighbour(given, uint64_t(i)) : given;
    const Problem<double> exact = convert<double>(drawn);
    const Named truth = named(Plain<double>(exact).run()),
                plain = named(given.bf16 ? Plain<float, Bf16Operands>(drawn).run() : Plain<float>(drawn).run());
    for (const auto& [name, values] : plain)
      worst[name] = std::max(worst[name], error(values, truth.at(name), size_kind(given.graph, given.bf16)));
  }
  return worst;
}

struct Expected {
  std::vector<double> truth;
  double allowed;
};

template <class T>
std::map<std::string, Expected> expectation(const Problem<T>& given, const std::map<std::string, double>& plain) {
  const double scale = roundoff<T> / roundoff<float>;
  std::map<std::string, Expected> all;
  const Problem<double> exact = convert<double>(given);
  for (const auto& [name, truth] : named(Plain<double>(exact).run()))
    all[name] = {truth, (scale == 1 ? 2 : 3) * scale * plain.at(name) +
                            8 * roundoff_of(given) * size_of(truth, size_kind(given.graph, given.bf16))};
  return all;
}

}  // namespace fusedmoe::test
