// What a plan puts together: units that are mixed in one pass, and linear maps that share parameters.
#pragma once
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

}  // namespace fusedmoe::cpu
