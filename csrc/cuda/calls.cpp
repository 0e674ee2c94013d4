// A whole call with the kernels of this folder as an operator of PyTorch's: what to launch was
// worked out before, here come addresses and a stream.
#include "calls.h"

#include <torch/csrc/stable/library.h>

#include "gpu/calls.h"

namespace fusedmoe::cuda {
namespace {

using gpu::Given;
using gpu::GradientPointers;
using gpu::Pointers;
using gpu::Step;
using torch::stable::Tensor;

class Launches {
 public:
  using Of = Bound;

  // addresses: of more parameters than travel with a launch, on the device.
  Launches(const Of& bound, const Given& given, const std::optional<Tensor>& addresses)
      : bound_(bound), given_(given), tiles_(bound.tiles), device_(given.x.get_device_index()) {
    const size_t count = given.parameters.size();
    std::copy_n(given.parameters.begin(), std::min<size_t>(count, Addresses::count), network_.parameters.at);
    here_ = count <= Addresses::count || addresses;
    if (count > Addresses::count && addresses)
      network_.parameters.more = static_cast<const void* const*>(addresses->const_data_ptr()) + Addresses::count;
    tiles_.aligned = given.aligned;
    network_.plan = reinterpret_cast<const int32_t*>(bound.ints);
    network_.floats = reinterpret_cast<const float*>(bound.floats);
    network_.rows = given.rows;
    network_.mixing = bound.mixing;
  }

  // Unless addresses are not here.
  bool supports(std::initializer_list<const Tensor*>, bool, bool) {
    if (!here_) return false;
    // Of this library's own runtime; that of PyTorch has it already.
    use_device(device_);
    stream_ = current_stream(device_);
    return true;
  }

  void forward(const Step& step, const Pointers& pointers) {
    put(pointers);
    if (watching()) tell("forward", around(pointers, true));
    cuda::forward(network_, tiles_for(step), int(step.place), int(step.programs), stream_);
  }

  void backward_rows(const Step& step, const Pointers& pointers, const GradientPointers& to) {
    if (watching()) tell("backward_rows", around(pointers, to));
    cuda::backward_rows(backward(pointers, to), tiles_for(step), int(step.place), int(step.programs), stream_);
  }

  void rowwise_forward(const Step& step, const Pointers& pointers) {
    put(pointers);
    if (watching()) tell("rowwise_forward", around(pointers, true));
    cuda::rowwise_forward(network_, tiles_.number, pointers.seed, int(step.place), stream_);
  }

  void rowwise_backward(const Step& step, const Pointers& pointers, const GradientPointers& to) {
    if (watching()) tell("rowwise_backward", around(pointers, to));
    cuda::rowwise_backward(backward(pointers, to), tiles_.number, pointers.seed, int(step.place), stream_);
  }

  void gradients(const Pointers& pointers, const GradientPointers& to, int64_t chunk, int64_t chunks) {
    if (watching()) {
      std::vector<Reach> reaches = around(pointers, to);
      reaches.push_back({"parts", to.parts, uint64_t(4 * chunks * bound_.total), true});
      reaches.push_back({"flat", to.flat, uint64_t(bound_.size * bound_.total), true});
      tell("gradients", reaches);
    }
    const Gradients of{to.parts, to.flat, bound_.total, chunk, bound_.shared};
    cuda::gradients(backward(pointers, to), of, tiles_, int(bound_.gradients.place), stream_);
  }

 private:
  void put(const Pointers& pointers) {
    network_.places = {pointers.x, pointers.buffers, pointers.out, given_.x_row, given_.x_slot};
    network_.p = static_cast<float*>(pointers.p);
    network_.weights = pointers.weights;
  }
  Backward backward(const Pointers& pointers, const GradientPointers& to) {
    put(pointers);
    const cuda::Places under{to.d_x, to.d_buffers, to.d_out, bound_.slots * bound_.width, bound_.width};
    return {network_, under, to.dw, to.dz, to.arrived, int(bound_.columns), int(bound_.gradients.programs)};
  }
  Tiles tiles_for(const Step& step) const {
    Tiles tiles = tiles_;
    tiles.store_aligned = given_.aligned && step.stores;
    return tiles;
  }

  // What a launch may touch. `out` is the upstream gradient in the backward, which only reads it,
  // and so the softmax and the buffers.
  std::vector<Reach> around(const Pointers& pointers, bool forward) const {
    const int64_t rows = given_.rows, size = bound_.size;
    const int64_t x = 1 + (rows - 1) * given_.x_row + (bound_.slots - 1) * given_.x_slot + bound_.width - 1,
                  top = bound_.output[0] * bound_.output[1];
    return {{"x", pointers.x, uint64_t(size * x), false},
            {"buffers", pointers.buffers, uint64_t(size * bound_.buffer_width * rows), forward},
            {"out", pointers.out, uint64_t(size * rows * top), forward},
            {"p", pointers.p, uint64_t(4 * bound_.softmax * rows), forward},
            {"weights", pointers.weights, pointers.weights ? uint64_t(size * rows * bound_.mixing) : 0, forward},
            {"plan", network_.plan, bound_.plan_bytes, false},
            {"floats", network_.floats, bound_.floats_bytes, false},
            {"seed", pointers.seed, pointers.seed ? sizeof(*pointers.seed) : 0, false},
            {"addresses", network_.parameters.more,
             network_.parameters.more ? 8 * (given_.parameters.size() - Addresses::count) : 0, false}};
  }
  std::vector<Reach> around(const Pointers& pointers, const GradientPointers& to) const {
    const int64_t rows = given_.rows, size = bound_.size;
    std::vector<Reach> reaches = around(pointers, false);
    const Reach more[]{{"d_x", to.d_x, uint64_t(size * rows * bound_.slots * bound_.width), true},
                       {"d_buffers", to.d_buffers, uint64_t(size * bound_.buffer_width * rows), true},
                       {"dw", to.dw, uint64_t(4 * bound_.sums * rows), true},
                       {"dz", to.dz, uint64_t(size * rows * bound_.columns), true},
                       {"arrived", to.arrived, uint64_t(4 * bound_.gradients.programs), true}};
    reaches.insert(reaches.end(), std::begin(more), std::end(more));
    return reaches;
  }

  const Bound& bound_;
  const Given& given_;
  Network network_{};
  Tiles tiles_;
  int device_;
  bool here_ = false;
  Stream stream_ = nullptr;
};

const Bound& at(int64_t address) { return *reinterpret_cast<const Bound*>(address); }

// bound: the address of a Bound, which the caller keeps.
std::vector<Tensor> network_cuda(const Tensor& x, const std::vector<Tensor>& params, int64_t bound, bool mixing,
                                 const std::optional<Tensor>& seed, const std::optional<Tensor>& addresses) {
  return gpu::forward<Launches>(x, params, at(bound), mixing, seed, addresses);
}

std::vector<Tensor> network_cuda_backward(const Tensor& d_out, const std::optional<Tensor>& d_weights, const Tensor& x,
                                          const std::vector<Tensor>& params, const Tensor& saved, int64_t bound,
                                          int64_t chunk, bool apart, const std::optional<Tensor>& seed,
                                          const std::optional<Tensor>& addresses) {
  return gpu::backward<Launches>({d_out, d_weights, saved, seed}, x, params, at(bound), chunk, apart, addresses);
}

}  // namespace
}  // namespace fusedmoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fusedmoe, m) {
  m.def("network_cuda(Tensor x, Tensor[] params, int bound, bool mixing, Tensor? seed, Tensor? addresses) -> Tensor[]");
  m.def(
      "network_cuda_backward(Tensor d_out, Tensor? d_weights, Tensor x, Tensor[] params, "
      "Tensor saved, int bound, int chunk, bool apart, Tensor? seed, Tensor? addresses)"
      " -> Tensor[]");
}

// Wherever the tensors are: the tests' emulator has them on the CPU. Implicit: autograd is the
// caller's, and nothing need look for it here.
STABLE_TORCH_LIBRARY_IMPL(fusedmoe, CompositeImplicitAutograd, m) {
  m.impl("network_cuda", TORCH_BOX(&fusedmoe::cuda::network_cuda));
  m.impl("network_cuda_backward", TORCH_BOX(&fusedmoe::cuda::network_cuda_backward));
}
