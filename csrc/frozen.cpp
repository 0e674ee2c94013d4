// The operators of a frozen network: pack the parameters once, then run from the packed ones.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "host.h"

namespace {

namespace cpu = fusedmoe::cpu;
using fusedmoe::Planned;
using fusedmoe::ScalarType;
using fusedmoe::shape_of;
using fusedmoe::Tensor;

void check_dtype(const Tensor& t, const char* what) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, what,
                  ": a frozen network expects float32 or float64, got ", dtype);
}

// Not `new_empty`, which goes through the dispatcher.
Tensor empty_like(const Tensor& like, const std::vector<int64_t>& sizes) {
  const std::vector<int64_t> strides = fusedmoe::strides_of(sizes);
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), -1, &made));
  return Tensor(made);
}

template <class T>
Tensor freeze(const std::vector<Tensor>& tensors, const Planned& planned) {
  const auto& shapes = planned.plan->graph.shapes;
  std::vector<Tensor> params;
  std::vector<const T*> pointers;
  for (size_t i = 0; i < tensors.size(); i++) {
    params.push_back(fusedmoe::checked(tensors[i], shapes[i], tensors[0].scalar_type(), "params", int64_t(i)));
    pointers.push_back(static_cast<const T*>(params.back().data_ptr()));
  }
  Tensor packed = empty_like(params[0], {planned.packing.size});
  cpu::pack<T>(*planned.plan, planned.packing, pointers.data(), static_cast<T*>(packed.data_ptr()));
  return packed;
}

Tensor freeze_cpu(const std::vector<Tensor>& params, const std::string& table) {
  const auto planned = fusedmoe::planned(table, {});
  const size_t expected = planned->plan->graph.shapes.size();
  STD_TORCH_CHECK(params.size() == expected && expected > 0, "params: expected ", expected, " tensors, got ",
                  params.size());
  check_dtype(params[0], "params");
  return params[0].scalar_type() == ScalarType::Float ? freeze<float>(params, *planned)
                                                      : freeze<double>(params, *planned);
}

template <class T>
Tensor run(const Tensor& input, const Tensor& packed, const std::string& text) {
  Tensor x = input;
  const int64_t dims = x.dim(), width = dims ? x.size(dims - 1) : 0;
  STD_TORCH_CHECK((dims == 2 || dims == 3) && x.is_cpu(), "x: expected a CPU tensor [B, S, D] or [B, D], got ",
                  shape_of(x.sizes()));
  fusedmoe::check_memory(x, "x");
  if (width > 1 && x.numel() > 0 && x.stride(dims - 1) != 1) x = torch::stable::contiguous(x);
  const int64_t slots = dims == 3 ? x.size(1) : 1, slot_stride = dims == 3 ? x.stride(1) : 0;
  const auto planned = fusedmoe::planned(text, {false, slot_stride == 0 && slots > 1});
  const fusedmoe::Graph& table = planned->plan->graph;
  const fusedmoe::graph::Input& given = table.inputs[0];
  const cpu::Packing& packing = planned->packing;
  STD_TORCH_CHECK(slots == given.slots && width == given.width, "x: expected [B, ", given.slots, ", ", given.width,
                  "], got ", shape_of(x.sizes()));
  STD_TORCH_CHECK(packed.scalar_type() == x.scalar_type(), "x: expected dtype ", packed.scalar_type(),
                  " of the frozen parameters, got ", x.scalar_type());
  STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.numel() == packing.size,
                  "packed: expected what freeze_cpu returned, [", packing.size, "], got ", shape_of(packed.sizes()));
  fusedmoe::check_memory(packed, "packed");
  const T* buffer = static_cast<const T*>(packed.data_ptr());
  std::vector<const T*> params(packing.offset.size(), nullptr);
  for (size_t i = 0; i < params.size(); i++)
    if (packing.offset[i] >= 0) params[i] = buffer + packing.offset[i];
  cpu::Call<T> call;
  call.x = static_cast<const T*>(x.data_ptr());
  call.rows = x.size(0);
  call.row_stride = x.stride(0);
  call.slot_stride = slot_stride;
  call.params = params.data();
  call.packed = true;
  call.block = cpu::rows_of_block(call.rows, torch::stable::get_num_threads());
  Tensor out = empty_like(x, {call.rows, table.output[0], table.output[1]});
  call.out = static_cast<T*>(out.data_ptr());
  cpu::forward<T>(*planned->plan, call, fusedmoe::for_each);
  return out;
}

Tensor network_cpu_frozen(const Tensor& x, const Tensor& packed, const std::string& table) {
  check_dtype(packed, "packed");
  return packed.scalar_type() == ScalarType::Float ? run<float>(x, packed, table) : run<double>(x, packed, table);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedmoe, m) {
  m.def("freeze_cpu(Tensor[] params, str table) -> Tensor");
  m.def("network_cpu_frozen(Tensor x, Tensor packed, str table) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedmoe, CPU, m) {
  m.impl("freeze_cpu", TORCH_BOX(&freeze_cpu));
  m.impl("network_cpu_frozen", TORCH_BOX(&network_cpu_frozen));
}
