// A network's forward and backward on a GPU in one go: tensors are looked at, results allocated,
// kernels launched, by whoever `Launches` are.
//
// Results that are empty say that the call is none for these launches; the caller then has another
// way, which takes longer.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <string>

#include "../checks.h"
#include "bound.h"

namespace fusedmoe::gpu {

inline void check(const Tensor& t, const Sizes& sizes, const Tensor& x, const char* what, ScalarType dtype,
                  int64_t index = -1) {
  const bool there = t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index();
  fusedmoe::check(t, sizes, dtype, there, "where x is", what, index);
}

// Contiguous, and from a multiple of 16 bytes on: rows are read in vectors where their distance
// allows it.
inline Tensor contiguous_aligned(const Tensor& t) {
  Tensor here = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(here.const_data_ptr()) % 16 ? torch::stable::clone(here) : here;
}

// A tensor in memory that nobody has written to.
inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  if (!like.is_cuda()) return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
  // The shorter way, on a GPU with what new_empty does.
  const Sizes strides = strides_of(sizes);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                  stored_as(dtype).second, aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, const Sizes& sizes) { return empty(like, sizes, like.scalar_type()); }
inline Tensor bytes(const Tensor& like, int64_t count) { return empty(like, {count}, ScalarType::Byte); }

// x and the parameters of a call.
struct Given {
  const Bound& bound;
  const Tensor& x;
  int64_t rows, x_row, x_slot;
  std::vector<const void*> parameters;
  std::vector<Tensor> copies;
  // Whether every row of every operand begins at a multiple of a vector load.
  bool aligned;

  Given(const Bound& of, const Tensor& input, const std::vector<Tensor>& params) : bound(of), x(input) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == bound.slots && x.size(2) == bound.width, "x: expected [B, ",
                    bound.slots, ", ", bound.width, "], got ", shape_of(x.sizes()));
    STD_TORCH_CHECK(params.size() == bound.shapes.size(), "params: expected ", bound.shapes.size(), " tensors, got ",
                    params.size());
    check_memory(x, "x");
    const ScalarType dtype = x.scalar_type();
    rows = x.size(0), x_row = x.stride(0), x_slot = x.stride(1);
    bool even = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    parameters.reserve(params.size());
    for (size_t i = 0; i < params.size(); i++) {
      check(params[i], bound.shapes[i], x, "params", dtype, int64_t(i));
      const Tensor& parameter =
          params[i].is_contiguous() ? params[i] : copies.emplace_back(torch::stable::contiguous(params[i]));
      parameters.push_back(parameter.const_data_ptr());
      even = even && reinterpret_cast<uintptr_t>(parameters.back()) % 16 == 0;
    }
    aligned = even && bound.vectorizable && x_row % bound.lanes == 0 && x_slot % bound.lanes == 0;
  }
};

// What both directions read and write. weights: mixing weights, or the gradients that they were
// given; null: none. seed: of dropout; null: nothing is dropped.
struct Pointers {
  void *x, *buffers, *out, *p, *weights;
  const int64_t* seed;
};

// What a backward writes besides.
struct GradientPointers {
  void *d_x, *d_buffers, *d_out;
  float* dw;
  void* dz;
  int32_t* arrived;
  float* parts;
  void* flat;
};

inline char* at(const Tensor& memory, int64_t first) { return static_cast<char*>(memory.data_ptr()) + first; }
inline void* read(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

// Dropout's seed, which the kernels read: a CUDA graph that is replayed takes the seed of then.
inline const int64_t* seed_of(const std::optional<Tensor>& seed, const Tensor& x) {
  if (!seed) return nullptr;
  check(*seed, {1}, x, "seed", ScalarType::Long);
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

// {out, what backward takes, mixing weights if they are asked for}.
template <class Launches>
std::vector<Tensor> forward(const Tensor& x, const std::vector<Tensor>& params, const typename Launches::Of& bound,
                            bool mixing, const std::optional<Tensor>& seed, const std::optional<Tensor>& addresses) {
  const Given given(bound, x, params);
  Launches launches(bound, given, addresses);
  if (given.rows && !launches.supports({&x}, mixing, seed.has_value())) return {};
  const Saved saved(bound, given.rows);
  Sizes sizes = bound.output;
  sizes.insert(sizes.begin(), given.rows);
  std::vector<Tensor> results{empty(x, sizes), bytes(x, saved.bytes)};
  if (mixing) {
    const Sizes columns{given.rows, bound.mixing};
    results.push_back(torch::stable::new_zeros(x, {columns.data(), columns.size()}));
  }
  if (!given.rows) return results;
  const Tensor& memory = results[1];
  const Pointers pointers{read(x), at(memory, saved.buffers), results[0].data_ptr(), at(memory, 0),
                          mixing ? results[2].data_ptr() : nullptr, seed_of(seed, x)};
  for (const Step& step : bound.steps)
    for (int64_t again = 0; again < bound.times; again++)
      step.rowwise ? launches.rowwise_forward(step, pointers) : launches.forward(step, pointers);
  return results;
}

// The gradients of the parameters, one after another in memory, apart: those of live ones alone.
inline void split(const Tensor& flat, const Bound& bound, std::vector<Tensor>& to) {
  for (size_t i = 0; i < bound.grads.size(); i++) {
    if (bound.grads[i] < 0) continue;
    const Sizes& sizes = bound.shapes[i];
    const Sizes strides = strides_of(sizes);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(flat.get(), int64_t(sizes.size()), sizes.data(),
                                                          strides.data(), bound.grads[i], &handle));
    to.emplace_back(handle);
  }
}

// What a backward is given: the gradients of `out` and, maybe, of the mixing weights, what the
// forward left, and its seed.
struct Upstream {
  const Tensor& d_out;
  const std::optional<Tensor>& d_weights;
  const Tensor& saved;
  const std::optional<Tensor>& seed;
};

// {d_x, the gradients of all live parameters one after another}, or these apart (`apart`). chunk:
// rows of one part of a gradient.
template <class Launches>
std::vector<Tensor> backward(const Upstream& upstream, const Tensor& x, const std::vector<Tensor>& params,
                             const typename Launches::Of& bound, int64_t chunk, bool apart,
                             const std::optional<Tensor>& addresses) {
  const Given given(bound, x, params);
  const int64_t rows = given.rows, chunks = (rows + chunk - 1) / chunk;
  const Saved saved(bound, rows);
  Sizes sizes = bound.output;
  sizes.insert(sizes.begin(), rows);
  check(upstream.d_out, sizes, x, "d_out", x.scalar_type());
  check(upstream.saved, {saved.bytes}, x, "saved", ScalarType::Byte);
  const Tensor d_out = contiguous_aligned(upstream.d_out), memory = contiguous_aligned(upstream.saved);
  std::optional<Tensor> d_weights;
  if (upstream.d_weights && upstream.d_weights->numel()) {
    check(*upstream.d_weights, {rows, bound.mixing}, x, "d_weights", x.scalar_type());
    d_weights = contiguous_aligned(*upstream.d_weights);
  }
  Launches launches(bound, given, addresses);
  if (rows && !launches.supports({&x, &d_out, &memory, d_weights ? &*d_weights : &x}, d_weights.has_value(),
                                 upstream.seed.has_value()))
    return {};
  const Sizes total{bound.total};
  std::vector<Tensor> results{empty(x, {rows, bound.slots, bound.width})};
  const Tensor flat = rows ? empty(x, total) : torch::stable::new_zeros(x, {total.data(), total.size()});
  if (rows) {
    const Scratch scratch(bound, rows, chunks);
    const Tensor own = bytes(x, scratch.bytes);
    const Pointers pointers{read(x), at(memory, saved.buffers), read(d_out), at(memory, 0),
                            d_weights ? read(*d_weights) : nullptr, seed_of(upstream.seed, x)};
    const auto floats = [&](int64_t first) { return reinterpret_cast<float*>(at(own, first)); };
    const GradientPointers gradients{results[0].data_ptr(),   at(own, scratch.buffers),
                                     pointers.out,            floats(0),
                                     at(own, scratch.dz),     reinterpret_cast<int32_t*>(at(own, scratch.arrived)),
                                     floats(scratch.parts),   flat.data_ptr()};
    for (const Step& step : bound.steps)
      for (int64_t again = 0; again < bound.times; again++)
        step.rowwise ? launches.rowwise_backward(step, pointers, gradients)
                     : launches.backward_rows(step, pointers, gradients);
    for (int64_t again = 0; again < (bound.total ? bound.times : 0); again++)
      launches.gradients(pointers, gradients, chunk, chunks);
  }
  if (apart) split(flat, bound, results);
  else results.push_back(flat);
  return results;
}

}  // namespace fusedmoe::gpu
