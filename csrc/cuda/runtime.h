// What launches need of the machine: a device, and the stream that PyTorch works on.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

// cudaStream_t, without CUDA's headers.
struct CUstream_st;

namespace fusedmoe::cuda {

using Stream = CUstream_st*;

// CUDA's name for what is missing here, and its words, where there is no driver or no device;
// nothing where there are.
std::string missing();

// Make a device the current one of this thread. Raises: std::runtime_error with the name of CUDA's
// error.
void use_device(int device);

// PyTorch's current stream of a device, which it works on. Raises: std::runtime_error if PyTorch
// has none to tell.
Stream current_stream(int device);

// Memory that a launch may touch, by the name of what lies there; written: may be.
struct Reach {
  const char* name;
  const void* first;
  uint64_t bytes;
  bool written;
};

// Whether somebody wants to know what the launches reach, and who is told before each: the tests'
// emulator, and nobody on a device.
bool watching();
void tell(const char* kernel, const std::vector<Reach>& reaches);

}  // namespace fusedmoe::cuda
