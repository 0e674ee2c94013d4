#include "support.h"

#include <algorithm>
#include <stdexcept>

namespace fusedmoe::cpu {

void require_kernels(const Graph& graph) {
  const auto known = [](const graph::Mlp& mlp) {
    return std::all_of(mlp.stages.begin(), mlp.stages.end(), [](const graph::Stage& s) { return s.dropout == 0; });
  };
  bool all = graph.inputs.size() == 1 && std::all_of(graph.towers.begin(), graph.towers.end(), known);
  for (const graph::Level& level : graph.levels) {
    for (const graph::Expert& expert : level.experts) all = all && known(expert.mlp);
    for (const graph::Unit& unit : level.units)
      if (unit.gate)
        all = all && unit.gate->mlps.size() <= 1 && std::all_of(unit.gate->mlps.begin(), unit.gate->mlps.end(), known);
  }
  if (!all)
    throw std::invalid_argument("table: expected one input, one selector a gate and no Dropout, got one with others");
}

}  // namespace fusedmoe::cpu
