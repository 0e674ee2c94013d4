#include "tables.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace fusedmoe::test {

const std::vector<std::string> activations = {"identity", "relu",      "sigmoid",    "tanh", "silu",
                                              "gelu",     "gelu_tanh", "leaky_relu", "elu",  "softplus"};

std::vector<Case> read_cases(const std::string& path) {
  std::ifstream file(path);
  std::vector<Case> cases;
  for (std::string line; std::getline(file, line);) {
    std::istringstream stream(line);
    std::string name, seed, rows, expanded, table;
    for (std::string* field : {&name, &seed, &rows, &expanded, &table}) std::getline(stream, *field, '\t');
    if (!stream)
      throw std::invalid_argument(path + ": expected name, seed, rows, expanded and table, got '" + line + "'");
    cases.push_back({name, std::stoull(seed), decode(table), std::stoll(rows), expanded == "1"});
  }
  if (cases.empty()) throw std::invalid_argument(path + ": expected a file that tables.py has written, got none");
  return cases;
}

const Graph& alone(const std::vector<Case>& cases, Act act) {
  const std::string name = activations[int(act)] + " alone";
  const auto found = std::find_if(cases.begin(), cases.end(), [&](const Case& c) { return c.name == name; });
  if (found == cases.end()) throw std::invalid_argument("expected a case '" + name + "', got none");
  return found->graph;
}

}  // namespace fusedmoe::test
