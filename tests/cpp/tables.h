// The networks that the kernels are tried on, which tables.py writes.
#pragma once
#include <string>
#include <vector>

#include "table.h"

namespace fusedmoe::test {

struct Case {
  std::string name;
  uint64_t seed;
  Graph graph;
  int64_t rows;  // 0: it is there for accuracy.h alone
  bool expanded = false;
};

// The cases of a file that tables.py has written; throws std::invalid_argument for another.
std::vector<Case> read_cases(const std::string& path);

// Names of the activations, in the order of Act.
extern const std::vector<std::string> activations;

// Among the cases, one expert of one neuron without bias, whose output is the network's: act(x)
// where its one weight is 1.
const Graph& alone(const std::vector<Case>& cases, Act act);

}  // namespace fusedmoe::test
