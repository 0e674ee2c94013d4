// The operator's registration through the stable ABI, and pybind11 for what is no operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <chrono>

#include "host.h"
#include "storage.h"

namespace {

using fusedmoe::check;
using fusedmoe::checked;
using fusedmoe::dtype_of;
using fusedmoe::for_each;
using fusedmoe::plan_of;
using fusedmoe::ScalarType;
using fusedmoe::shape_of;
using fusedmoe::Tensor;
namespace cpu = fusedmoe::cpu;

// What forward tells backward in the first numbers of `saved`: the rows of a block, which backward
// must keep to however many threads there are by then, and whether it recomputes.
enum Header { block_at, recompute_at, header_size = cpu::lane_multiple };
// What the operator's `save` asks for.
enum Save { save_nothing, save_all, save_least };

// A call's tensors, checked; it owns what is not read in place, and borrows the rest.
template <class T>
struct Arguments {
  Tensor x;
  ScalarType stored;  // the parameters' dtype
  std::vector<Tensor> copies;
  fusedmoe::Storage<T> storage{cpu::chosen_isa()};
  std::vector<const T*> pointers;
  std::vector<const uint16_t*> bf16_weights;
  std::shared_ptr<const cpu::Plan> plan;
  cpu::Call<T> call;

  Arguments(const Tensor& input, const std::vector<Tensor>& tensors, const std::string& text, Save save,
            const std::optional<Tensor>& seed)
      : x(input), stored(x.scalar_type()) {
    if (seed) {
      call.drops = true;
      call.seed = *static_cast<const uint64_t*>(checked(*seed, {1}, ScalarType::Long, "seed").const_data_ptr());
    }
    STD_TORCH_CHECK(x.dim() == 3 && x.is_cpu(), "x: expected a CPU tensor [B, S, D], got ", shape_of(x.sizes()));
    fusedmoe::check_memory(x, "x");
    if (x.numel() > 0 && x.size(2) > 1 && x.stride(2) != 1) x = torch::stable::contiguous(x);
    const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
    plan = plan_of(text, {save != save_nothing, x.stride(1) == 0 && x.size(1) > 1, save == save_least, bf16});
    const fusedmoe::Graph& table = plan->graph;
    const fusedmoe::graph::Input& given = table.inputs[0];
    STD_TORCH_CHECK(x.size(1) == given.slots && x.size(2) == given.width, "x: expected [B, ", given.slots, ", ",
                    given.width, "], got ", shape_of(x.sizes()));
    const size_t count = tensors.size();
    STD_TORCH_CHECK(count == table.shapes.size(), "params: expected ", table.shapes.size(), " tensors, got ", count);
    // Under autocast the input is cast, and the parameters stay in float32.
    if (bf16 && count && tensors[0].scalar_type() == ScalarType::Float) stored = ScalarType::Float;
    pointers.resize(count);
    bf16_weights.resize(bf16 ? count : 0);
    std::vector<bool> is_weight(bf16_weights.size());
    if (bf16)
      for (const cpu::Stage* linear : plan->linears) is_weight[linear->weight] = true;
    for (size_t i = 0; i < count; i++) {
      check(tensors[i], table.shapes[i], stored, "params", int64_t(i));
      const bool here = tensors[i].is_contiguous();
      const Tensor& given = here ? tensors[i] : copies.emplace_back(torch::stable::contiguous(tensors[i]));
      if (bf16 && is_weight[i])
        bf16_weights[i] = storage.bf16_weights(given);
      else
        pointers[i] = storage.read(given);
    }
    storage.read(x, call);
    call.params = pointers.data();
    call.bf16_weights = bf16_weights.data();
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const std::vector<Tensor>& params,
                                           const std::string& text, Save save, bool mixing,
                                           const std::optional<Tensor>& seed) {
  Arguments<T> a(input, params, text, save, seed);
  const fusedmoe::Graph& table = a.plan->graph;
  const int64_t rows = a.call.rows;
  Tensor out = torch::stable::new_empty(a.x, {rows, table.output[0], table.output[1]});
  const bool poison = save && fusedmoe::poisoning(a.x);
  Tensor weights = mixing ? torch::stable::new_empty(a.x, {rows, table.mixing})
                          : fusedmoe::Results(a.x, a.x.scalar_type(), poison).make({rows, 0});
  Tensor saved =
      fusedmoe::Results(a.x, dtype_of<T>, poison).make({save ? a.plan->saved * cpu::padded(rows) + header_size : 0});
  a.call.out = a.storage.write(out);
  a.call.weights = mixing ? a.storage.write(weights) : nullptr;
  a.call.block = cpu::rows_of_block(rows, torch::stable::get_num_threads());
  if (save) {
    T* state = static_cast<T*>(saved.data_ptr());
    std::fill_n(state, header_size, T(0));
    state[block_at] = T(a.call.block);
    state[recompute_at] = T(save == save_least);
    a.call.saved = state + header_size;
  }
  cpu::forward<T>(*a.plan, a.call, for_each);
  a.storage.round();
  return {out, weights, saved};
}

template <class T>
std::vector<Tensor> backward(const Tensor& d_out, const std::optional<Tensor>& d_weights, const Tensor& input,
                             const std::vector<Tensor>& params, const Tensor& given, const std::string& text,
                             const std::string& needs, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(
      given.is_cpu() && given.dim() == 1 && given.numel() >= header_size && given.scalar_type() == dtype_of<T>,
      "saved: expected what the forward of this call returned, got ", shape_of(given.sizes()));
  // A hook of saved tensors may give back an equal one of any layout.
  const Tensor saved = checked(given, {given.numel()}, dtype_of<T>, "saved");
  T* state = static_cast<T*>(saved.data_ptr());
  const int64_t block = int64_t(state[block_at]);
  Arguments<T> a(input, params, text, state[recompute_at] != 0 ? save_least : save_all, seed);
  const fusedmoe::Graph& table = a.plan->graph;
  const int64_t rows = a.call.rows;
  STD_TORCH_CHECK(saved.numel() == a.plan->saved * cpu::padded(rows) + header_size && block >= cpu::lane_multiple &&
                      block <= cpu::block_rows && (block & (block - 1)) == 0,
                  "saved: expected what the forward of this call returned, got ", shape_of(saved.sizes()),
                  " with other numbers");
  const size_t count = a.pointers.size();
  STD_TORCH_CHECK(needs.size() == count + 1, "needs: expected ", count + 1, " flags, got ", needs.size());
  Tensor d_top = checked(d_out, {rows, table.output[0], table.output[1]}, a.x.scalar_type(), "d_out");
  Tensor d_mixing = d_weights ? checked(*d_weights, {rows, table.mixing}, a.x.scalar_type(), "d_weights") : d_top;
  std::vector<Tensor> results;
  results.reserve(count + 1);
  std::vector<T*> grads(count, nullptr);
  const auto result = [&](const std::vector<int64_t>& sizes, fusedmoe::Results& memory) {
    results.push_back(memory.make(sizes));
    return a.storage.write(results.back());
  };
  const bool poison = fusedmoe::poisoning(a.x);
  fusedmoe::Results like_x(a.x, a.x.scalar_type(), poison), like_params(a.x, a.stored, poison);
  if (needs[0] == '1') a.call.d_x = result({rows, a.x.size(1), a.x.size(2)}, like_x);
  for (size_t i = 0; i < count; i++) {
    STD_TORCH_CHECK(needs[i + 1] != '1' || table.live[i], "needs: no output depends on parameter ", i);
    if (needs[i + 1] == '1') grads[i] = result(table.shapes[i], like_params);
  }
  a.call.d_out = a.storage.read(d_top);
  a.call.d_weights = d_weights ? a.storage.read(d_mixing) : nullptr;
  a.call.block = block;
  a.call.saved = state + header_size;
  a.call.grads = grads.data();
  cpu::backward<T>(*a.plan, a.call, for_each);
  a.storage.round();
  return results;
}

// 16-bit dtypes are only stored; the kernels compute in float.
template <class F>
auto in_kernel_type(const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return f(double());
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half: return f(float());
    default:
      STD_TORCH_CHECK(false, "x: the cpu backend expects float32, float64, bfloat16 or float16, got ",
                      x.scalar_type());
  }
}

std::tuple<Tensor, Tensor, Tensor> network_cpu(const Tensor& x, const std::vector<Tensor>& params,
                                               const std::string& table, int64_t save, bool mixing,
                                               const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(save >= save_nothing && save <= save_least,
                  "save: expected 0 (nothing), 1 (what backward needs) or 2 (as little as possible), got ", save);
  return in_kernel_type(
      x, [&](auto number) { return forward<decltype(number)>(x, params, table, Save(save), mixing, seed); });
}

std::vector<Tensor> network_cpu_backward(const Tensor& d_out, const std::optional<Tensor>& d_weights, const Tensor& x,
                                         const std::vector<Tensor>& params, const Tensor& saved,
                                         const std::string& table, const std::string& needs,
                                         const std::optional<Tensor>& seed) {
  return in_kernel_type(x, [&](auto number) {
    return backward<decltype(number)>(d_out, d_weights, x, params, saved, table, needs, seed);
  });
}

int64_t packed_size(const std::string& table) { return fusedmoe::planned(table, {})->packing.size; }

int64_t saved_width(const std::string& table, bool recompute) {
  return plan_of(table, {true, false, recompute})->saved;
}

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

// guards.cpp
void bind_guards(pybind11::module_& m);
// triton.cpp
void bind_triton(pybind11::module_& m);

STABLE_TORCH_LIBRARY(fusedmoe, m) {
  m.def(
      "network_cpu(Tensor x, Tensor[] params, str table, int save, bool mixing, Tensor? seed) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "network_cpu_backward(Tensor d_out, Tensor? d_weights, Tensor x, Tensor[] params, "
      "Tensor saved, str table, str needs, Tensor? seed) -> Tensor[]");
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
  m.def(
      "isa", [] { return std::string(cpu::chosen_isa().name); },
      "The ISA whose kernels run; RuntimeError for a wrong FUSEDMOE_ISA.");
  m.def("free_bytes", &fusedmoe::free_bytes, "Bytes of results that died, kept for the next ones.");
  m.def("saved_width", &saved_width,
        "Elements a row that forward saves for backward, or the least of them, for a backward that recomputes.");
  m.attr("TABLE_VERSION") = fusedmoe::table_version;
  m.attr("LANE_MULTIPLE") = int64_t(cpu::lane_multiple);
  m.attr("HEADER_SIZE") = int64_t(header_size);
  m.def("bind", &fusedmoe::bind,
        "The handle of a table's text, which the operators of this process take in its place.");
  m.def("packed_size", &packed_size, "Numbers of the packed parameters of a frozen network.");
  m.def("fma_peak", &fma_peak,
        "GFLOP/s of independent fp32 multiply-adds on one core: the best of as many rounds as fit into `seconds`.");
  bind_guards(m);
  bind_triton(m);
}
