// Which networks the kernels can run; the list by features is fusedmoe/support.py.
#pragma once
#include "../table.h"

namespace fusedmoe::cpu {

// Throws std::invalid_argument for a graph with a part that the kernels do not have.
void require_kernels(const Graph& graph);

}  // namespace fusedmoe::cpu
