// What the files that register operators share: plans by table, and threads.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/network.h"
#include "cpu/packing.h"
#include "tensors.h"

namespace fusedmoe {

// A plan, and the layout of a frozen network's parameters.
struct Planned {
  std::unique_ptr<const cpu::Plan> plan;
  cpu::Packing packing;
};

// A short name for the text of a table, the same for equal texts, under which `planned` knows it in
// this process from then on.
std::string bind(const std::string& table);

// The plan of a table, by its text or its handle. Plans are kept: a call decodes nothing.
std::shared_ptr<const Planned> planned(const std::string& table, cpu::PlanKind kind);

inline std::shared_ptr<const cpu::Plan> plan_of(const std::string& table, cpu::PlanKind kind) {
  std::shared_ptr<const Planned> found = planned(table, kind);
  return {found, found->plan.get()};
}

// at::parallel_for, with the work handed out as the threads ask for it.
void for_each(int64_t count, const std::function<void(int64_t)>& body);

}  // namespace fusedmoe
