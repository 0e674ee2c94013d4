#include "support.h"

#include <algorithm>
#include <stdexcept>

namespace fusedmoe::cpu {

void require_kernels(const Graph& graph) {
  const auto linear = [](const graph::Mlp& mlp) {
    return std::all_of(mlp.stages.begin(), mlp.stages.end(), [](const graph::Stage& stage) {
      return stage.kind == graph::StageKind::linear && stage.slope < 0 && stage.dropout == 0;
    });
  };
  bool known = graph.inputs.size() == 1 && std::all_of(graph.towers.begin(), graph.towers.end(), linear);
  for (const graph::Level& level : graph.levels) {
    for (const graph::Expert& expert : level.experts) known = known && linear(expert.mlp);
    for (const graph::Unit& unit : level.units) {
      known = known && unit.product.empty() && !(unit.static_weights && unit.static_weights->channels);
      if (unit.gate) known = known && unit.gate->mlps.size() == 1 && linear(unit.gate->mlps[0]);
    }
  }
  if (!known) throw std::invalid_argument("table: expected one that the cpu kernels can run, got another");
}

}  // namespace fusedmoe::cpu
