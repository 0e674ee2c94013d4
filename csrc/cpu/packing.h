// The parameters of a network in one buffer, laid out for serving: in the order in which a row
// block reads them, so that a prefetch beyond one linear finds the next one's weights. A weight [n,
// k] stands as [ceil(n / 16)][k][16], its bias before it as [ceil(n / 16) * 16]; what pads them is
// zero. Static weights come last.
#pragma once
#include "plan.h"

namespace fusedmoe::cpu {

// Outputs that stand side by side: the longest vector of fp32, and a cache line.
constexpr int64_t packed_group = lane_multiple;

struct Packing {
  std::vector<int64_t> offset;  // of each parameter; -1 where no output depends on it
  int64_t size = 0;             // of the buffer, in numbers; a multiple of packed_group
};

Packing make_packing(const Plan& plan);

// Fill to[packing.size] from the parameters.
template <class T>
void pack(const Plan& plan, const Packing& packing, const T* const* params, T* to);

}  // namespace fusedmoe::cpu
