// A whole network on the CPU: which ISA runs, how rows and gradients are shared out among threads.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "isa.h"

namespace fusedmoe::cpu {

// Run body(i) for every i below a count, in any order, on the host's threads.
using ForEach = std::function<void(int64_t, const std::function<void(int64_t)>&)>;

// Every ISA of this build, best first, and whether this processor has it.
std::vector<std::pair<const Isa*, bool>> isas();
// The best one, or the one that the environment variable FUSEDMOE_ISA names.
// Throws std::runtime_error where that one is unknown or the processor lacks it.
const Isa& chosen_isa();

// The rows of a block for so many rows on so many threads: as many as may be, or few enough that
// every thread has some. A power of two, so that blocks do not reach across chunks.
int64_t rows_of_block(int64_t rows, int64_t threads);

// Fill call.out, and call.weights and call.saved where the plan and the call ask for them.
template <class T>
void forward(const Plan& plan, const Call<T>& call, const ForEach& each);

// Fill call.d_x and every call.grads that is not null; chunk buffers are the driver's.
template <class T>
void backward(const Plan& plan, Call<T> call, const ForEach& each);

}  // namespace fusedmoe::cpu
