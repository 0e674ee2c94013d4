// A whole call with kernels that Triton has compiled, as an operator of PyTorch's:
// kernels/triton/launch.py says which, and what they were compiled for.
//
// A compiled kernel takes its arguments in order, tensors by address, those that were constant left
// out, and two addresses of scratch behind them, which none of ours has. That is private to Triton:
// kernels/triton/launch.py comes here for the versions that it was tried with alone.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include "gpu/bind.h"
#include "gpu/calls.h"
#include "gpu/stream.h"

namespace fusedmoe::gpu {
namespace {

// CUDA's driver, which Triton has loaded.
struct Driver {
  using Launch = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                         unsigned shared_bytes, void* stream, void** arguments, void** extra);
  Launch launch = nullptr;
  int (*context)(void**) = nullptr;
  int (*name)(int, const char**) = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    if (!library) return;
    launch = reinterpret_cast<Launch>(dlsym(library, "cuLaunchKernel"));
    context = reinterpret_cast<int (*)(void**)>(dlsym(library, "cuCtxGetCurrent"));
    name = reinterpret_cast<int (*)(int, const char**)>(dlsym(library, "cuGetErrorName"));
  }
  // Whether there is a driver, and a device that this thread works with: Triton sees to that in the
  // first launch of a thread.
  bool ready() const {
    void* current = nullptr;
    return launch && context && name && context(&current) == 0 && current;
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

class Launches {
 public:
  using Of = Bound;

  // addresses: of the parameters, on the device; where they are not given, they may have been seen
  // before.
  Launches(const Of& bound, const Given& given, const std::optional<Tensor>& addresses)
      : bound_(bound),
        given_(given),
        addresses_(addresses ? addresses : const_cast<Bound&>(bound).addresses.find(given.parameters)) {}

  // Whether the kernels were compiled for tensors like these: their alignment, and that of every
  // tensor to 16 bytes; numbers of 32 bits.
  bool supports(std::initializer_list<const Tensor*> tensors, bool weights, bool seeded) {
    constexpr int64_t most = int64_t(1) << 31;
    bool matches_compiled = addresses_ && given_.aligned == bound_.aligned && weights == bound_.weights &&
                            seeded == bound_.seeded && given_.rows < most && given_.x_row < most &&
                            given_.x_slot < most && bound_.total < most;
    for (const Tensor* tensor : tensors)
      matches_compiled = matches_compiled && reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 == 0;
    if (!matches_compiled || !driver().ready()) return false;
    stream_ = current_stream(given_.x.get_device_index());
    return true;
  }

  void forward(const Step& step, const Pointers& of) {
    const Words words[]{of.x,         of.buffers,    of.out,        of.p,       of.weights ? of.weights : of.x,
                        addresses(),  bound_.ints,   bound_.floats, step.place, given_.rows,
                        given_.x_row, given_.x_slot, bound_.mixing};
    launch("forward", step, blocks(), step.programs, words);
  }

  void rowwise_forward(const Step& step, const Pointers& of) {
    const Words words[]{of.x,
                        of.buffers,
                        of.out,
                        of.p,
                        of.weights ? of.weights : of.x,
                        addresses(),
                        bound_.ints,
                        bound_.floats,
                        seed(of),
                        step.place,
                        given_.rows,
                        given_.x_row,
                        given_.x_slot,
                        bound_.mixing};
    launch("rowwise_forward", step, row_blocks(), 1, words);
  }

  void backward_rows(const Step& step, const Pointers& of, const GradientPointers& to) {
    const Words words[]{of.x,
                        of.buffers,
                        of.out,
                        of.p,
                        to.dw,
                        to.d_x,
                        to.d_buffers,
                        of.out,
                        weights(of),
                        to.dz,
                        addresses(),
                        bound_.ints,
                        bound_.floats,
                        step.place,
                        given_.rows,
                        given_.x_row,
                        given_.x_slot,
                        bound_.slots * bound_.width,
                        bound_.width,
                        bound_.columns,
                        bound_.mixing};
    launch("backward_rows", step, blocks(), step.programs, words);
  }

  void rowwise_backward(const Step& step, const Pointers& of, const GradientPointers& to) {
    const Words words[]{of.x,
                        of.buffers,
                        of.out,
                        of.p,
                        to.dw,
                        to.d_x,
                        to.d_buffers,
                        of.out,
                        weights(of),
                        addresses(),
                        bound_.ints,
                        bound_.floats,
                        seed(of),
                        step.place,
                        given_.rows,
                        given_.x_row,
                        given_.x_slot,
                        bound_.slots * bound_.width,
                        bound_.width,
                        bound_.mixing};
    launch("rowwise_backward", step, row_blocks(), 1, words);
  }

  void gradients(const Pointers& of, const GradientPointers& to, int64_t, int64_t chunks) {
    const Step &step = bound_.gradients, &add = bound_.add;
    const Words words[]{of.x,         of.buffers,    of.out,         to.dw,         weights(of),
                        to.dz,        to.parts,      bound_.ints,    step.place,    given_.rows,
                        given_.x_row, given_.x_slot, bound_.columns, bound_.mixing, bound_.total};
    launch("gradients", step, step.programs, chunks, words);
    const Words sums[]{to.parts, to.flat, bound_.total, chunks};
    launch("add_chunks", add, add.programs, 1, sums);
  }

 private:
  // An argument: an address, or a number of 32 bits in the half that the kernel reads.
  union Words {
    const void* address;
    uintptr_t plan;
    int32_t number;
    Words(const void* value) : address(value) {}
    Words(uintptr_t value) : plan(value) {}
    Words(int64_t value) : number(int32_t(value)) {}
  };

  const void* addresses() const { return addresses_->const_data_ptr(); }
  const void* weights(const Pointers& of) const { return of.weights ? of.weights : of.out; }
  // The kernels that drop nothing are given the plan, and do not read it.
  Words seed(const Pointers& of) const { return of.seed ? Words(of.seed) : Words(bound_.ints); }
  int64_t row_blocks() const { return (given_.rows + bound_.rowwise_tile - 1) / bound_.rowwise_tile; }
  int64_t blocks() const { return (given_.rows + bound_.tile - 1) / bound_.tile; }

  template <size_t N>
  void launch(const char* what, const Step& step, int64_t x, int64_t y, const Words (&words)[N]) const {
    void *arguments[N + 2], *scratch = nullptr;
    for (size_t i = 0; i < N; i++) arguments[i] = const_cast<Words*>(&words[i]);
    arguments[N] = arguments[N + 1] = &scratch;
    const int failed =
        driver().launch(reinterpret_cast<void*>(step.function), unsigned(x), unsigned(y), 1, unsigned(step.threads), 1,
                        1, unsigned(step.shared_bytes), stream_, arguments, nullptr);
    if (!failed) return;
    const char* name = nullptr;
    driver().name(failed, &name);
    STD_TORCH_CHECK(false, "triton: the launch of ", what, " failed with ",
                    name ? name : std::to_string(failed).c_str());
  }

  const Bound& bound_;
  const Given& given_;
  std::optional<Tensor> addresses_;
  void* stream_ = nullptr;
};

const Bound& at(int64_t address) { return *reinterpret_cast<const Bound*>(address); }

// bound: the address of a Bound, which the caller keeps. Nothing where Triton has to launch by
// itself.
std::vector<Tensor> network_triton(const Tensor& x, const std::vector<Tensor>& params, int64_t bound, bool mixing,
                                   const std::optional<Tensor>& seed, const std::optional<Tensor>& addresses) {
  return forward<Launches>(x, params, at(bound), mixing, seed, addresses);
}

std::vector<Tensor> network_triton_backward(const Tensor& d_out, const std::optional<Tensor>& d_weights,
                                            const Tensor& x, const std::vector<Tensor>& params, const Tensor& saved,
                                            int64_t bound, int64_t chunk, bool apart,
                                            const std::optional<Tensor>& seed,
                                            const std::optional<Tensor>& addresses) {
  return backward<Launches>({d_out, d_weights, saved, seed}, x, params, at(bound), chunk, apart, addresses);
}

// Keep the array of the parameters' addresses for the calls to come.
bool network_triton_addresses(const Tensor& addresses, const std::vector<Tensor>& params, int64_t bound) {
  std::vector<const void*> parameters;
  for (const Tensor& parameter : params) parameters.push_back(parameter.const_data_ptr());
  reinterpret_cast<Bound*>(bound)->addresses.remember(parameters, addresses);
  return true;
}

}  // namespace
}  // namespace fusedmoe::gpu

STABLE_TORCH_LIBRARY_FRAGMENT(fusedmoe, m) {
  m.def(
      "network_triton(Tensor x, Tensor[] params, int bound, bool mixing, Tensor? seed, "
      "Tensor? addresses) -> Tensor[]");
  m.def(
      "network_triton_backward(Tensor d_out, Tensor? d_weights, Tensor x, Tensor[] params, "
      "Tensor saved, int bound, int chunk, bool apart, Tensor? seed, Tensor? addresses)"
      " -> Tensor[]");
  m.def("network_triton_addresses(Tensor addresses, Tensor[] params, int bound) -> bool");
}

// Implicit: autograd is the caller's, and nothing need look for it here.
STABLE_TORCH_LIBRARY_IMPL(fusedmoe, CompositeImplicitAutograd, m) {
  m.impl("network_triton", TORCH_BOX(&fusedmoe::gpu::network_triton));
  m.impl("network_triton_backward", TORCH_BOX(&fusedmoe::gpu::network_triton_backward));
  m.impl("network_triton_addresses", TORCH_BOX(&fusedmoe::gpu::network_triton_addresses));
}

void bind_triton(pybind11::module_& m) { fusedmoe::gpu::bind_bound<fusedmoe::gpu::Bound>(m); }
