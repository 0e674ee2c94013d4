// A network as data, as fusedmoe/table.py defines it: what `decode` reads is the token stream that
// fusedmoe/encoding.py writes.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fusedmoe {

// The elements of a tensor of these sizes.
inline int64_t count_of(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

// The names and their order are those of fusedmoe/activation.py.
enum class Act { identity, relu, sigmoid, tanh, silu, gelu, gelu_tanh, leaky_relu, elu, softplus };

// A layer knows the numbers of its parameters in the operator's list; bias -1 is none.
struct Layer {
  int64_t width = 0;
  Act act = Act::identity;
  double parameter = 0;
  bool has_bias = false;
  int64_t k = 0;
  int weight = -1, bias = -1;
};

struct Expert {
  int slot = 0;
  std::vector<Layer> layers;
  bool live = false;
};

enum class SelectorKind { slot, root, expert };

struct Selector {
  SelectorKind kind = SelectorKind::slot;
  int index = 0;
};

// `hidden` and, after it, the last linear, whose width is the number of experts seen.
struct Gate {
  Selector selector;
  std::vector<int> sees;
  std::vector<Layer> layers;
};

struct Static {
  std::vector<int> experts;
  std::vector<double> values;  // fixed weights; empty where they are learned
  int parameter = -1;          // learned weights: elements offset.. of this parameter
  int64_t offset = 0;
};

struct Unit {
  std::optional<Gate> gate;
  std::optional<Static> static_weights;
  int64_t width = 0;
  bool live = false;
};

struct Level {
  std::vector<Expert> experts;
  std::vector<Unit> units;
};

struct Task {
  std::vector<int> units;
  std::vector<Layer> tower;
};

struct Table {
  int64_t slots = 0, width = 0;
  std::vector<Level> levels;
  std::vector<Task> tasks;
  int root = 0;
  bool has_towers = false;
  int64_t mixing = 0;                                                   // mixing weights of a row, all levels
  std::vector<std::vector<int64_t>> shapes;                             // of the parameters, in the operator's order
  std::vector<bool> live;                                               // of the parameters: some output depends on it
  size_t first_static = 0;  // number of the first static tensor among the parameters
  std::vector<int64_t> output;                                          // {T, width} with towers, {U, H} without
};

// Read a token stream; throws std::invalid_argument for text that `encode` did not write.
Table decode(const std::string& text);

}  // namespace fusedmoe
