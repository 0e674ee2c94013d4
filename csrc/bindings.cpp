// The operator's registration through the stable ABI, and pybind11 for what is no operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <chrono>

#include "host.h"

namespace {

using fusedmoe::checked;
using fusedmoe::for_each;
using fusedmoe::plan_of;
using fusedmoe::ScalarType;
using fusedmoe::shape_of;
using fusedmoe::Tensor;
namespace cpu = fusedmoe::cpu;

// A call's tensors, checked; it owns the contiguous copies.
template <class T>
struct Arguments {
  Tensor x;
  std::vector<Tensor> params;
  std::vector<const T*> pointers;
  std::shared_ptr<const cpu::Plan> plan;
  cpu::Call<T> call;

  Arguments(const Tensor& input, const std::vector<Tensor>& tensors, const std::string& text, bool training) : x(input) {
    STD_TORCH_CHECK(x.dim() == 3 && x.is_cpu(), "x: expected a CPU tensor [B, S, D], got ", shape_of(x.sizes()));
    if (x.numel() > 0 && x.size(2) > 1 && x.stride(2) != 1) x = torch::stable::contiguous(x);
    plan = plan_of(text, {training, x.stride(1) == 0 && x.size(1) > 1});
    const fusedmoe::Table& table = plan->table;
    STD_TORCH_CHECK(x.size(1) == table.slots && x.size(2) == table.width, "x: expected [B, ", table.slots, ", ", table.width, "], got ", shape_of(x.sizes()));
    STD_TORCH_CHECK(tensors.size() == table.shapes.size(), "params: expected ", table.shapes.size(), " tensors, got ", tensors.size());
    params.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); i++) {
      params.push_back(checked(tensors[i], table.shapes[i], x.scalar_type(), "params"));
      pointers.push_back(static_cast<const T*>(params.back().data_ptr()));
    }
    call.x = static_cast<const T*>(x.data_ptr());
    call.rows = x.size(0);
    call.row_stride = x.stride(0);
    call.slot_stride = x.stride(1);
    call.params = pointers.data();
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const std::vector<Tensor>& params, const std::string& text, bool save, bool mixing) {
  Arguments<T> a(input, params, text, save);
  const fusedmoe::Table& table = a.plan->table;
  const int64_t rows = a.call.rows;
  Tensor out = torch::stable::new_empty(a.x, {rows, table.output[0], table.output[1]});
  Tensor weights = torch::stable::new_empty(a.x, {rows, mixing ? table.mixing : 0});
  Tensor saved = fusedmoe::Results<T>(a.x).make({save ? a.plan->kept * cpu::kept_lanes(rows) + cpu::lane_multiple : 0});
  a.call.out = static_cast<T*>(out.data_ptr());
  a.call.weights = mixing ? static_cast<T*>(weights.data_ptr()) : nullptr;
  a.call.block = cpu::rows_of_block(rows, torch::stable::get_num_threads());
  if (save) {
    // Backward must cut the rows as forward did, however many threads there are by then.
    T* state = static_cast<T*>(saved.data_ptr());
    std::fill_n(state, cpu::lane_multiple, T(a.call.block));
    a.call.kept = state + cpu::lane_multiple;
  }
  cpu::forward<T>(*a.plan, a.call, for_each);
  return {out, weights, saved};
}

template <class T>
std::vector<Tensor> backward(const Tensor& d_out, const std::optional<Tensor>& d_weights, const Tensor& input, const std::vector<Tensor>& params,
                             const Tensor& saved, const std::string& text, const std::string& needs) {
  Arguments<T> a(input, params, text, true);
  const fusedmoe::Table& table = a.plan->table;
  const int64_t rows = a.call.rows;
  STD_TORCH_CHECK(needs.size() == params.size() + 1, "needs: expected ", params.size() + 1, " flags, got ", needs.size());
  Tensor d_top = checked(d_out, {rows, table.output[0], table.output[1]}, a.x.scalar_type(), "d_out");
  Tensor state = checked(saved, {a.plan->kept * cpu::kept_lanes(rows) + cpu::lane_multiple}, a.x.scalar_type(), "saved");
  Tensor d_mixing = d_weights ? checked(*d_weights, {rows, table.mixing}, a.x.scalar_type(), "d_weights") : d_top;
  std::vector<Tensor> results;
  std::vector<T*> grads(params.size(), nullptr);
  fusedmoe::Results<T> memory(a.x);
  const auto result = [&](const std::vector<int64_t>& sizes) {
    results.push_back(memory.make(sizes));
    return static_cast<T*>(results.back().data_ptr());
  };
  if (needs[0] == '1') a.call.d_x = result({rows, table.slots, table.width});
  for (size_t i = 0; i < params.size(); i++) {
    STD_TORCH_CHECK(needs[i + 1] != '1' || table.live[i], "needs: no output depends on parameter ", i);
    if (needs[i + 1] == '1') grads[i] = result(table.shapes[i]);
  }
  a.call.d_out = static_cast<const T*>(d_top.data_ptr());
  a.call.d_weights = d_weights ? static_cast<const T*>(d_mixing.data_ptr()) : nullptr;
  const T* header = static_cast<const T*>(state.data_ptr());
  a.call.block = int64_t(header[0]);
  STD_TORCH_CHECK(a.call.block >= cpu::lane_multiple && a.call.block <= cpu::block_rows && (a.call.block & (a.call.block - 1)) == 0,
                  "saved: expected what the forward of this call returned, got other numbers");
  a.call.kept = static_cast<T*>(state.data_ptr()) + cpu::lane_multiple;
  a.call.grads = grads.data();
  cpu::backward<T>(*a.plan, a.call, for_each);
  return results;
}

// float16 is stored, never computed in: the arguments are widened and the results rounded, once.
Tensor widened(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half, "params, d_out, d_weights: expected the dtype of x, float16");
  return torch::stable::to(t, ScalarType::Float);
}

std::vector<Tensor> widened(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(widened(t));
  return result;
}

Tensor rounded(const Tensor& t) { return torch::stable::to(t, ScalarType::Half); }

std::tuple<Tensor, Tensor, Tensor> network_cpu(const Tensor& x, const std::vector<Tensor>& params, const std::string& table, bool save, bool mixing) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return forward<float>(x, params, table, save, mixing);
    case ScalarType::Double: return forward<double>(x, params, table, save, mixing);
    case ScalarType::Half: {
      auto [out, weights, saved] = forward<float>(widened(x), widened(params), table, save, mixing);
      return {rounded(out), rounded(weights), saved};
    }
    default: STD_TORCH_CHECK(false, "x: the cpu backend expects float32, float64 or float16");
  }
}

std::vector<Tensor> network_cpu_backward(const Tensor& d_out, const std::optional<Tensor>& d_weights, const Tensor& x, const std::vector<Tensor>& params,
                                         const Tensor& saved, const std::string& table, const std::string& needs) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return backward<float>(d_out, d_weights, x, params, saved, table, needs);
    case ScalarType::Double: return backward<double>(d_out, d_weights, x, params, saved, table, needs);
    case ScalarType::Half: {
      const auto d_mixing = d_weights ? std::optional(widened(*d_weights)) : std::nullopt;
      std::vector<Tensor> results = backward<float>(widened(d_out), d_mixing, widened(x), widened(params), saved, table, needs);
      std::transform(results.begin(), results.end(), results.begin(), rounded);
      return results;
    }
    default: STD_TORCH_CHECK(false, "x: the cpu backend expects float32, float64 or float16");
  }
}

int64_t packed_size(const std::string& table) { return fusedmoe::planned(table, {})->packing.size; }

int64_t kept_of(const std::string& table) { return plan_of(table, {true, false})->kept; }

double fma_peak(double seconds) {
  const cpu::Isa& isa = cpu::chosen_isa();
  double best = 0;
  const auto now = [] { return std::chrono::steady_clock::now(); };
  for (auto end = now() + std::chrono::duration<double>(seconds); now() < end;) {
    auto start = now();
    double flops = isa.multiply_adds(2000);
    best = std::max(best, flops / std::chrono::duration<double>(now() - start).count());
  }
  return best * 1e-9;
}

}  // namespace

// watch.cpp
void bind_watch(pybind11::module_& m);

STABLE_TORCH_LIBRARY(fusedmoe, m) {
  m.def("network_cpu(Tensor x, Tensor[] params, str table, bool save, bool mixing) -> (Tensor, Tensor, Tensor)");
  m.def("network_cpu_backward(Tensor d_out, Tensor? d_weights, Tensor x, Tensor[] params, Tensor saved, str table, str needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fusedmoe, CPU, m) {
  m.impl("network_cpu", TORCH_BOX(&network_cpu));
  m.impl("network_cpu_backward", TORCH_BOX(&network_cpu_backward));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of fusedmoe; the operators are in torch.ops.fusedmoe.";
  m.def("isas", [] {
    std::vector<std::pair<std::string, bool>> result;
    for (const auto& [isa, here] : cpu::isas()) result.emplace_back(isa->name, here);
    return result;
  }, "Every ISA of this build, best first, and whether this processor has it.");
  m.def("isa", [] { return std::string(cpu::chosen_isa().name); }, "The ISA whose kernels run; RuntimeError for a wrong FUSEDMOE_ISA.");
  m.def("free_bytes", &fusedmoe::free_bytes, "Bytes of results that died, kept for the next ones.");
  m.def("kept", &kept_of, "Numbers a row that forward keeps for backward.");
  m.def("packed_size", &packed_size, "Numbers of the packed parameters of a frozen network.");
  m.def("fma_peak", &fma_peak, "GFLOP/s of independent fp32 multiply-adds on one core: the best of as many rounds as fit into `seconds`.");
  bind_watch(m);
}
