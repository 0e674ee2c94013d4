// A network as data: a table's graph, as fusedmoe/graph.py defines it and fusedmoe/encoding.py
// writes it. Every parameter has its number there, and what some output depends on is marked.
#pragma once
#include <algorithm>
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

namespace graph {

// Columns first .. first + width of a slot of an input, a unit of a level below (`place`), or an
// expert of the level that reads.
enum class VectorKind { input, unit, expert };
struct Vector {
  VectorKind kind = VectorKind::input;
  int place = 0, index = 0;
  int64_t first = 0, width = 0;
  bool whole = false, detached = false;
};

// dropout(act(head)); parameters by number, -1 is none. `slope` is PReLU's.
enum class StageKind { copy, linear, norm };
struct Stage {
  StageKind kind = StageKind::copy;
  int64_t k = 0, width = 0;
  int weight = -1, bias = -1;
  Act act = Act::identity;
  double parameter = 0;
  int slope = -1;
  double eps = 0, dropout = 0;
  int stream = -1;
};

struct Mlp {
  std::vector<Vector> sources;
  std::vector<Stage> stages;
  int64_t width = 0;
};

struct Expert {
  Mlp mlp;
  bool computed = false, differentiated = false;
};

// Logits: of number `choice` of `mlps`, the parameter `free`, or query . keys; times `factor`. The
// softmax leaves out what stands at the places `closed` of `sees`.
struct Gate {
  std::vector<int> sees;
  std::vector<Mlp> mlps;
  int free = -1;
  std::vector<Vector> query;
  std::vector<std::vector<Vector>> keys;
  double factor = 1;
  int choice = 0;
  std::vector<int> closed;

  bool closes(int place) const { return std::find(closed.begin(), closed.end(), place) != closed.end(); }
};

// Fixed weights, or elements of a parameter from `offset` on: one an expert, or one a column of it.
struct Static {
  std::vector<int> experts;
  std::vector<double> values;
  int parameter = -1;
  int64_t offset = 0;
  bool channels = false;
};

struct Unit {
  std::optional<Gate> gate;
  std::optional<Static> static_weights;
  std::vector<int> product, reads;
  int64_t width = 0;
  bool computed = false, differentiated = false;

  bool reads_expert(int e) const { return std::find(reads.begin(), reads.end(), e) != reads.end(); }
};

struct Level {
  std::vector<Expert> experts;
  std::vector<Unit> units;
};

struct Input {
  int64_t slots = 0, width = 0;
};

}  // namespace graph

struct Graph {
  std::vector<graph::Input> inputs;
  std::vector<graph::Level> levels;
  std::vector<graph::Mlp> towers;
  std::vector<std::vector<int64_t>> shapes;  // of the parameters, in the operator's order
  std::vector<bool> live;                    // of the parameters: some output's gradient reaches it
  std::vector<int64_t> output;               // {T, width} with towers, {U, H} without
  int64_t mixing = 0;                        // mixing weights of a row, all levels
};

// Of the encoded tables that `decode` reads.
constexpr int table_version = 3;

// Read the text of a table; throws std::invalid_argument for text that fusedmoe/codec.py did not
// write.
Graph decode(const std::string& text);

// Cut a graph down to a call's route, by the words of fusedmoe/route.py. Throws as `decode`.
void take_route(Graph& graph, const std::string& words);

}  // namespace fusedmoe
