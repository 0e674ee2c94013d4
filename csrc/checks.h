// What a call's tensors must be, checked through PyTorch's stable ABI: what, where, expected, got.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace fusedmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Sizes>
std::string shape_of(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// The strides of a contiguous tensor.
inline std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return strides;
}

// The size of a number, and its dtype as the stable ABI counts them.
inline std::pair<size_t, int32_t> stored_as(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return {8, aoti_torch_dtype_float64()};
    case ScalarType::BFloat16: return {2, aoti_torch_dtype_bfloat16()};
    case ScalarType::Half: return {2, aoti_torch_dtype_float16()};
    case ScalarType::Byte: return {1, aoti_torch_dtype_uint8()};
    case ScalarType::Long: return {8, aoti_torch_dtype_int64()};
    default: return {4, aoti_torch_dtype_float32()};
  }
}

// A tensor as messages name it: one of a list by its number.
inline std::string name_of(const char* what, int64_t index) {
  return index < 0 ? what : std::string(what) + "[" + std::to_string(index) + "]";
}

// Raise unless all of a tensor's numbers lie inside its storage. They do not where the storage was
// freed, as FSDP frees a gathered parameter, or where the tensor never had one. Neither shape nor
// dtype tells; a kernel that read it would end the process.
inline void check_memory(const Tensor& t, const char* what, int64_t index = -1) {
  if (t.numel() == 0) return;
  int64_t last = t.storage_offset(), held = 0;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); i++) last += (sizes[i] - 1) * strides[i];
  const int64_t needed = (last + 1) * int64_t(stored_as(t.scalar_type()).first);
  // A tensor without a storage answers with an error.
  if (aoti_torch_get_storage_size(t.get(), &held)) held = 0;
  STD_TORCH_CHECK(held >= needed, name_of(what, index), ": expected a storage of ", needed,
                  " bytes or more, got one of ", held, "; was it freed?");
}

// Raise unless a tensor is `there`, which `place` says in words, has this shape and dtype, and
// memory. `index`: its place in the list `what`.
inline void check(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType dtype, bool there, const char* place,
                  const char* what, int64_t index = -1) {
  const auto have = t.sizes();
  const bool same = have.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), have.begin());
  STD_TORCH_CHECK(same, name_of(what, index), ": expected shape ", shape_of(sizes), ", got ", shape_of(have));
  STD_TORCH_CHECK(there, name_of(what, index), ": expected a tensor ", place);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name_of(what, index), ": expected dtype ", dtype, ", got ",
                  t.scalar_type());
  check_memory(t, what, index);
}

}  // namespace fusedmoe
