// PyTorch's current stream of a device: its stable ABI tells it, so that who asks loads beside a
// build of PyTorch that knows no CUDA.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

// PyTorch has it since 2.13, this binary loads in 2.10 too: null there.
extern "C" __attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream, void** handle);

namespace fusedmoe::gpu {

// What PyTorch's part for CUDA has, which the libraries linked here have not.
using Ask = AOTITorchError (*)(int32_t device, void** stream);
inline Ask before_2_13() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<Ask>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

// Raises: std::runtime_error if PyTorch has none to tell.
inline void* current_stream(int device) {
  void* result = nullptr;
  if (torch_stream_native_handle) {
    StreamHandle stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &stream));
    const AOTITorchError failed = torch_stream_native_handle(stream, &result);
    aoti_torch_delete_stream(stream);
    TORCH_ERROR_CODE_CHECK(failed);
  } else {
    static const Ask ask = before_2_13();
    if (!ask) throw std::runtime_error("expected a PyTorch that knows CUDA's streams, got one that does not");
    TORCH_ERROR_CODE_CHECK(ask(device, &result));
  }
  return result;
}

}  // namespace fusedmoe::gpu
