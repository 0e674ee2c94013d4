// The other checks of test_samples. Each returns how many things it checked. Raises:
// std::logic_error where one is wrong.
#pragma once

namespace fusedmoe::cuda_on_cpu {

int check_misuses();
int check_operations();

}  // namespace fusedmoe::cuda_on_cpu
