// PyTorch's side of runtime.h: its stable ABI tells the stream, so that this loads beside a build of PyTorch that knows no CUDA.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

#include "runtime.h"

// PyTorch has it since 2.13, this binary loads in 2.10 too: null there.
extern "C" __attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream, void** handle);

namespace fusedmoe::cuda {
namespace {

// What PyTorch's part for CUDA has, which the libraries linked here have not.
using Ask = AOTITorchError (*)(int32_t device, void** stream);
Ask before_2_13() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<Ask>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

}  // namespace

Stream current_stream(int device) {
  void* result = nullptr;
  if (torch_stream_native_handle) {
    StreamHandle stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &stream));
    const AOTITorchError failed = torch_stream_native_handle(stream, &result);
    aoti_torch_delete_stream(stream);
    TORCH_ERROR_CODE_CHECK(failed);
  } else {
    static const Ask ask = before_2_13();
    if (!ask) throw std::runtime_error("cuda: expected a PyTorch that knows CUDA's streams, got one that does not");
    TORCH_ERROR_CODE_CHECK(ask(device, &result));
  }
  return static_cast<Stream>(result);
}

}  // namespace fusedmoe::cuda
