// How the host starts a kernel: by name, on a stream that it was given, and never without asking
// what became of it.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "runtime.h"

namespace fusedmoe::cuda {

struct Shape {
  unsigned blocks_x = 1, blocks_y = 1;
  int threads = 32;  // a multiple of 32
  size_t shared_bytes = 0;
};

// void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, Stream stream,
// Parameters... arguments)
//   Raises: std::runtime_error with the name of CUDA's error, which is CUDA's last one no more.
#if defined(__CUDACC__)
inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("cuda: the launch of ") + name + " failed with " + cudaGetErrorName(status) +
                           " (" + cudaGetErrorString(status) + ")");
}

// Ask for shared memory unless the kernel has asked for as much on this device before, which avoids
// a call of the runtime in every launch. Under the lock, so that no smaller number comes after a
// larger one.
inline void ask_for(const void* kernel, int bytes, const char* name) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> asked;
  int device = 0;
  check(cudaGetDevice(&device), name);
  std::lock_guard lock(mutex);
  int& most = asked[{device, kernel}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  most = bytes;
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, Stream stream,
            std::type_identity_t<Parameters>... arguments) {
  // More than this a kernel must ask for.
  constexpr size_t default_shared_bytes = 48 * 1024;
  if (shape.shared_bytes > default_shared_bytes)
    ask_for(reinterpret_cast<const void*>(kernel), int(shape.shared_bytes), name);
  kernel<<<dim3(shape.blocks_x, shape.blocks_y), dim3(unsigned(shape.threads)), shape.shared_bytes, stream>>>(
      arguments...);
  check(cudaGetLastError(), name);
}
#endif

}  // namespace fusedmoe::cuda

#if !defined(__CUDACC__)
// On the path of tests alone.
#include "cuda_on_cpu.h"
#endif
