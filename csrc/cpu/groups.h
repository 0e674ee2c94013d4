// What a plan asks of a graph: which units are mixed in one pass, which linear maps share parameters,
// which stages and experts are a special case in backward.
#pragma once
#include <set>

#include "plan.h"

namespace fusedmoe::cpu {

// The vectors of a UnitGroup.
struct Mixed {
  std::vector<int> units, experts, reads;
};
// Neighbouring units of one width, at most `mixed_units` of them.
std::vector<Mixed> mixed_together(const std::vector<UnitPlan>& units);

// Linear maps in groups of those that share a weight or a bias, whose gradients are summed by one
// task. Sets first_of_weight and first_of_bias of each.
std::vector<std::vector<const Stage*>> sharing(const std::vector<Stage*>& linears);

// Whether the derivative of an activation can be told from its output, so that the output alone is
// kept.
bool from_output(Act act);

// An activation whose derivative is computed from its output needs that output undropped: its
// dropout becomes a stage of its own. The identity and relu need it not.
std::vector<graph::Stage> dropout_apart(const std::vector<graph::Stage>& stages);

// The experts that others than the mix read, with a gradient.
std::set<int> read_beside_the_mix(const graph::Level& level);

}  // namespace fusedmoe::cpu
