// What the files that register operators share: plans by table, threads, and the checks of a tensor.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/network.h"
#include "cpu/packing.h"

namespace fusedmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A plan, and the layout of a frozen network's parameters.
struct Planned {
  std::unique_ptr<const cpu::Plan> plan;
  cpu::Packing packing;
};

// The plan of a table; decoding costs more than a small network, so plans are kept.
std::shared_ptr<const Planned> planned(const std::string& table, cpu::PlanKind kind);

inline std::shared_ptr<const cpu::Plan> plan_of(const std::string& table, cpu::PlanKind kind) {
  std::shared_ptr<const Planned> found = planned(table, kind);
  return {found, found->plan.get()};
}

// at::parallel_for, with the work handed out as the threads ask for it.
void for_each(int64_t count, const std::function<void(int64_t)>& body);

std::string shape_of(const Tensor& t);
std::string shape_of(const std::vector<int64_t>& sizes);

// `t` itself if it is what the kernels take, a contiguous copy if only its strides are not, an error otherwise.
Tensor checked(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType dtype, const char* what);

}  // namespace fusedmoe
