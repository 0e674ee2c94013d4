// PyTorch's side of runtime.h.
#include "gpu/stream.h"

#include "runtime.h"

namespace fusedmoe::cuda {

Stream current_stream(int device) { return static_cast<Stream>(gpu::current_stream(device)); }

}  // namespace fusedmoe::cuda
