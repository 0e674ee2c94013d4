#include "groups.h"

#include <algorithm>
#include <map>
#include <set>

namespace fusedmoe::cpu {

std::vector<Mixed> mixed_together(const std::vector<UnitPlan>& units) {
  std::vector<Mixed> result;
  for (size_t first = 0, next = 0; first < units.size(); first = next) {
    Mixed mixed;
    std::set<int> experts;
    for (next = first; next < units.size() && mixed.units.size() < mixed_units; next++) {
      if (units[next].reads.count < 0 || units[next].product.count) continue;
      if (!mixed.units.empty() && units[next].out.width != units[mixed.units[0]].out.width) break;
      mixed.units.push_back(int(next));
      for (const Read& read : units[next].reads) experts.insert(read.expert);
    }
    if (mixed.units.empty()) continue;
    for (int u : mixed.units)
      for (int e : experts) {
        const Span<Read>& reads = units[u].reads;
        const Read* at = std::find_if(reads.begin(), reads.end(), [&](const Read& read) { return read.expert == e; });
        mixed.reads.push_back(at == reads.end() ? -1 : int(at - reads.begin()));
      }
    mixed.experts.assign(experts.begin(), experts.end());
    result.push_back(std::move(mixed));
  }
  return result;
}

std::vector<std::vector<const Stage*>> sharing(const std::vector<Stage*>& linears) {
  std::vector<std::vector<const Stage*>> groups;
  std::map<int, size_t> group_of;  // by parameter
  for (Stage* stage : linears) {
    stage->first_of_weight = !group_of.count(stage->weight);
    stage->first_of_bias = stage->bias < 0 || !group_of.count(stage->bias);
    std::set<size_t> joined;
    for (int parameter : {stage->weight, stage->bias})
      if (auto at = group_of.find(parameter); parameter >= 0 && at != group_of.end()) joined.insert(at->second);
    const size_t to = joined.empty() ? groups.size() : *joined.begin();
    if (joined.empty()) groups.emplace_back();
    for (size_t other : joined) {
      if (other == to) continue;
      groups[to].insert(groups[to].end(), groups[other].begin(), groups[other].end());
      groups[other].clear();
    }
    groups[to].push_back(stage);
    for (const Stage* member : groups[to])
      for (int parameter : {member->weight, member->bias})
        if (parameter >= 0) group_of[parameter] = to;
  }
  std::erase_if(groups, [](const auto& group) { return group.empty(); });
  return groups;
}

bool from_output(Act act) {
  return act == Act::identity || act == Act::relu || act == Act::sigmoid || act == Act::tanh;
}

std::vector<graph::Stage> dropout_apart(const std::vector<graph::Stage>& stages) {
  std::vector<graph::Stage> result;
  for (const graph::Stage& stage : stages) {
    result.push_back(stage);
    if (stage.dropout == 0 || stage.slope >= 0 ||
        !from_output(stage.act) || stage.act == Act::identity || stage.act == Act::relu)
      continue;
    result.back().dropout = 0;
    graph::Stage alone;
    alone.k = alone.width = stage.width;
    alone.dropout = stage.dropout;
    alone.stream = stage.stream;
    result.push_back(alone);
  }
  return result;
}

std::set<int> read_beside_the_mix(const graph::Level& level) {
  std::set<int> result;
  const auto add = [&](const std::vector<graph::Vector>& sources) {
    for (const graph::Vector& v : sources)
      if (v.kind == graph::VectorKind::expert && !v.detached) result.insert(v.index);
  };
  for (const graph::Expert& expert : level.experts)
    if (expert.differentiated) add(expert.mlp.sources);
  for (const graph::Unit& unit : level.units)
    if (unit.computed) {
      if (unit.gate && !unit.gate->sees.empty()) {
        const graph::Gate& gate = *unit.gate;
        if (!gate.mlps.empty()) add(gate.mlps[gate.choice].sources);
        add(gate.query);
        for (size_t j = 0; j < gate.keys.size(); j++)
          if (!gate.closes(int(j))) add(gate.keys[j]);
      }
      result.insert(unit.product.begin(), unit.product.end());
      if (unit.static_weights && unit.static_weights->channels)
        for (int e : unit.static_weights->experts)
          if (unit.reads_expert(e)) result.insert(e);
    }
  return result;
}

}  // namespace fusedmoe::cpu
