// The networks that the kernels are tried on: tables built here, written as words and read back by
// fusedmoe::decode.
#pragma once
#include <string>
#include <vector>

#include "table.h"

namespace fusedmoe::test {

struct Case {
  std::string name;
  Table table;
  int64_t rows;
  bool expanded = false;
};

// Every activation, width, row count and feature by itself, and random tables of all of them
// together.
std::vector<Case> cases();

// Names of the activations, in the order of Act.
extern const std::vector<std::string> activations;

// One expert of one neuron without bias, whose output is the network's: act(x) where its one weight
// is 1.
Table single(Act act);

}  // namespace fusedmoe::test
