// What a call on a GPU is bound to, as kernels/bound.py works it out once for a network: a call
// adds addresses, rows and a stream.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

namespace fusedmoe::gpu {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// One launch. place, programs: where the plan has its programs, and how many a block of rows has;
// stores: whether what it writes begins at multiples of a vector load where everything else does;
// rowwise: whether it runs row-wise operations, and not tiles.
// Of a compiled kernel of Triton's: CUDA's function, threads, bytes of shared memory.
struct Step {
  int64_t place = 0, programs = 0;
  bool stores = true, rowwise = false;
  uintptr_t function = 0;
  int64_t threads = 0, shared_bytes = 0;
};

// The arrays of parameters' addresses that lie on the device, for parameters that have been seen. They
// hold no values, so they cannot go stale.
class AddressCache {
 public:
  // The array on the device, or none. It lives as long as the tensor that is returned.
  std::optional<Tensor> find(const std::vector<const void*>& parameters) {
    std::lock_guard lock(mutex_);
    for (const Known& known : known_)
      if (known.parameters == parameters) return known.addresses;
    return std::nullopt;
  }
  void remember(const std::vector<const void*>& parameters, const Tensor& addresses) {
    std::lock_guard lock(mutex_);
    for (const Known& known : known_)
      if (known.parameters == parameters) return;
    if (known_.size() == most) known_.erase(known_.begin());
    known_.push_back({parameters, addresses});
  }

 private:
  // A model's replicas and its averaged weights are few; the caller keeps many more.
  static constexpr size_t most = 16;
  struct Known {
    std::vector<const void*> parameters;
    Tensor addresses;
  };
  std::mutex mutex_;
  std::vector<Known> known_;
};

// The names are those of kernels/bound.py.
struct Bound {
  // The parameters' shapes; x [B, slots, width]; a row of the output; columns of the mixing
  // weights; bytes of a number.
  std::vector<Sizes> shapes;
  Sizes output;
  int64_t slots = 0, width = 0, mixing = 0, size = 0;
  // Numbers of a vector load, and whether the sizes of the network's table are multiples of them.
  int64_t lanes = 1;
  bool vectorizable = false;
  // The plan on the device. softmax: rows of the softmax; buffer_width: elements of the buffers a
  // row; tile: rows of a tile; rowwise_tile: of a block that runs row-wise operations.
  uintptr_t ints = 0, floats = 0;
  uint64_t plan_bytes = 0, floats_bytes = 0;
  int64_t softmax = 0, buffer_width = 0, tile = 0, rowwise_tile = 1;
  std::vector<Step> steps;
  // What Triton's kernels were compiled for: vector loads, mixing weights or their gradients, and
  // a seed.
  bool aligned = false, weights = false, seeded = false;
  // Of a backward. columns: of dz; sums: rows of dw; total: numbers of all gradients; grads: where
  // each parameter's begins, or -1; those two launches.
  int64_t columns = 0, sums = 0, total = 0;
  Sizes grads;
  // Whether linear maps share parameters: their tasks then have further uses.
  bool shared = false;
  Step gradients, add;
  // How often every kernel is launched: more than once for who wants to know what the launches
  // alone take (bench/gpu_host.py).
  int64_t times = 1;
  AddressCache addresses;
};

// Regions of one allocation begin at multiples of a line.
inline int64_t lines(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// What the forward leaves for the backward: the softmax in float32, and the segments' buffers behind
// it.
struct Saved {
  int64_t buffers, bytes;
  Saved(const Bound& bound, int64_t rows)
      : buffers(lines(4 * bound.softmax * rows)), bytes(buffers + lines(bound.size * bound.buffer_width * rows)) {}
};

// What the backward needs besides: dw and the parts of the gradients in float32, dz, the buffers'
// gradients, and a counter for each task.
struct Scratch {
  int64_t parts, dz, buffers, arrived, bytes;
  Scratch(const Bound& bound, int64_t rows, int64_t chunks)
      : parts(lines(4 * bound.sums * rows)),
        dz(parts + lines(4 * chunks * bound.total)),
        buffers(dz + lines(bound.size * rows * bound.columns)),
        arrived(buffers + lines(bound.size * rows * bound.buffer_width)),
        bytes(arrived + lines(4 * bound.gradients.programs)) {}
};

}  // namespace fusedmoe::gpu
