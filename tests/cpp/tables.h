// The networks that the kernels are tried on: tables built here, written as words and read back by fusedmoe::decode.
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

// Every activation, width, row count and feature by itself, and random tables of all of them together.
std::vector<Case> cases();

// One expert of one neuron with weight `parameters[0]` and no bias; the network's output is that expert's: act(x) where the weight is 1.
Table single(Act act, double parameter);

}  // namespace fusedmoe::test
