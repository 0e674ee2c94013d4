// The device's side of runtime.h; the tests' emulator, which compiles every .cu, has one of its
// own.
#if defined(__CUDACC__)
#include "runtime.h"

#include <stdexcept>

namespace fusedmoe::cuda {
namespace {

std::string words(cudaError_t status) {
  return std::string(cudaGetErrorName(status)) + " (" + cudaGetErrorString(status) + ")";
}

}  // namespace

std::string missing() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  // An error stays CUDA's last one until it is asked for.
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess ? "" : words(status);
}

void use_device(int device) {
  const cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error("cuda: expected device " + std::to_string(device) + ", got " + words(status));
}

bool watching() { return false; }
void tell(const char*, const std::vector<Reach>&) {}

}  // namespace fusedmoe::cuda
#endif
