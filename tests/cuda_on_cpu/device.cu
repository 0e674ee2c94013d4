// The operations on a device, where there is one: `device FILE` writes the words that test_samples'
// check of operations reads. Exits with 3, and CUDA's error on standard error, where there is none.
#include <cstdio>
#include <fstream>
#include <vector>

#include "cuda/device.h"
#include "samples.h"

namespace fusedmoe::cuda::samples {
namespace {

// Raises: std::runtime_error naming the error.
std::vector<uint32_t> on_device(const std::vector<uint32_t>& from) {
  std::vector<uint32_t> words(32 * operation_words);
  void *input = nullptr, *output = nullptr;
  // The first launch says what is the matter.
  const bool there =
      cudaMalloc(&input, 4 * from.size()) == cudaSuccess && cudaMalloc(&output, 4 * words.size()) == cudaSuccess;
  if (there) check(cudaMemcpy(input, from.data(), 4 * from.size(), cudaMemcpyHostToDevice), "operations");
  operations(static_cast<const uint32_t*>(input), static_cast<uint32_t*>(output), nullptr);
  check(cudaMemcpy(words.data(), output, 4 * words.size(), cudaMemcpyDeviceToHost), "operations");
  cudaFree(input);
  cudaFree(output);
  return words;
}

}  // namespace
}  // namespace fusedmoe::cuda::samples

int main(int count, char** arguments) {
  using namespace fusedmoe::cuda::samples;
  if (count != 2) return 2;
  try {
    const std::vector<uint32_t> words = on_device(operation_input());
    std::ofstream(arguments[1], std::ios::binary)
        .write(reinterpret_cast<const char*>(words.data()), std::streamsize(4 * words.size()));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}
