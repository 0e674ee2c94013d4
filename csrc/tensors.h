// Tensors through PyTorch's stable ABI: checked arguments, and results in ordinary or in recycled memory.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "recycle.h"

// PyTorch has it since 2.11, this binary loads in 2.10 too: null there.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                                                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                                                AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
                                                                int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);

namespace fusedmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Sizes>
std::string shape_of(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// The size of a number, and its dtype as the stable ABI counts them.
inline std::pair<size_t, int32_t> stored_as(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return {8, aoti_torch_dtype_float64()};
    case ScalarType::BFloat16: return {2, aoti_torch_dtype_bfloat16()};
    case ScalarType::Half: return {2, aoti_torch_dtype_float16()};
    default: return {4, aoti_torch_dtype_float32()};
  }
}

// A tensor as messages name it: one of a list by its number.
inline std::string name_of(const char* what, int64_t index) {
  return index < 0 ? what : std::string(what) + "[" + std::to_string(index) + "]";
}

// Raise unless all of a tensor's numbers lie inside its storage. They do not where the storage was freed, as FSDP frees a gathered
// parameter, or where the tensor never had one. Neither shape nor dtype tells; a kernel that read it would end the process.
inline void check_memory(const Tensor& t, const char* what, int64_t index = -1) {
  if (t.numel() == 0) return;
  int64_t last = t.storage_offset(), held = 0;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); i++) last += (sizes[i] - 1) * strides[i];
  const int64_t needed = (last + 1) * int64_t(stored_as(t.scalar_type()).first);
  // A tensor without a storage answers with an error.
  if (aoti_torch_get_storage_size(t.get(), &held)) held = 0;
  STD_TORCH_CHECK(held >= needed, name_of(what, index), ": expected a storage of ", needed, " bytes or more, got one of ", held, "; was it freed?");
}

// Raise unless a tensor is on the CPU, of this shape and dtype, and has memory; `index`: its place in the list `what`.
inline void check(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType dtype, const char* what, int64_t index = -1) {
  const auto have = t.sizes();
  const bool same = have.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), have.begin());
  STD_TORCH_CHECK(same, name_of(what, index), ": expected shape ", shape_of(sizes), ", got ", shape_of(have));
  STD_TORCH_CHECK(t.is_cpu(), name_of(what, index), ": expected a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name_of(what, index), ": expected dtype ", dtype, ", got ", t.scalar_type());
  check_memory(t, what, index);
}

// `t` itself if it is what the kernels take, a contiguous copy if only its strides are not, an error otherwise.
inline Tensor checked(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType dtype, const char* what, int64_t index = -1) {
  check(t, sizes, dtype, what, index);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline int64_t count_of(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

template <class T>
constexpr ScalarType dtype_of = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// The strides of a contiguous tensor.
inline std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return strides;
}

// Whether torch.use_deterministic_algorithms asks for NaN in memory that nothing was written to. The stable ABI does not tell; what
// torch put into a fresh tensor of its own does, and a NaN that stands there by chance only costs a needless fill.
inline bool poisoning(const Tensor& like) {
  Tensor probe = torch::stable::new_empty(like, {1}, ScalarType::Float);
  return std::isnan(*static_cast<const float*>(probe.const_data_ptr()));
}

// Results of one call. Each is a tensor with a storage of its own, as fresh as any (autograd and optimizers may keep it, it is pickled
// and shared alone), but for one thing: torch lets nobody enlarge a storage that it did not allocate. Their memory is recycled.
class Results {
 public:
  // `like` has the device; `poison`: fill with NaN.
  Results(const Tensor& like, ScalarType dtype, bool poison) : like_(like), dtype_(dtype), poison_(poison) {}
  ~Results() {
    if (block_) drop_block(block_);
  }
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;

  Tensor make(const std::vector<int64_t>& sizes) {
    const size_t bytes = size_t(count_of(sizes)) * stored_as(dtype_).first;
    if (!bytes) return nothing(sizes);
    if (!torch_from_blob) return torch::stable::new_empty(like_, {sizes.data(), sizes.size()}, dtype_);
    if (bytes > smallest_block) {
      Block* own = take_block(bytes);
      Tensor result = place(own, own->memory, sizes, bytes);
      drop_block(own);
      return result;
    }
    if (!block_ || used_ + bytes > block_->bytes) {
      if (block_) drop_block(block_);
      block_ = nullptr;
      block_ = take_block(smallest_block);
      used_ = 0;
    }
    char* memory = block_->memory + used_;
    used_ += (bytes + block_alignment - 1) / block_alignment * block_alignment;
    return place(block_, memory, sizes, bytes);
  }

 private:
  // Takes half as long as `new_empty`, which goes through the dispatcher.
  Tensor nothing(const std::vector<int64_t>& sizes) {
    const std::vector<int64_t> strides = strides_of(sizes);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), stored_as(dtype_).second,
                                                           aoti_torch_device_type_cpu(), -1, &handle));
    return Tensor(handle);
  }

  Tensor place(Block* block, char* memory, const std::vector<int64_t>& sizes, size_t bytes) {
    // All bits set are a NaN in every dtype.
    if (poison_) std::memset(memory, 0xff, bytes);
    const std::vector<int64_t> strides = strides_of(sizes);
    AtenTensorHandle handle;
    block->holders.fetch_add(1, std::memory_order_relaxed);
    const auto release = [](void*, void* held) { drop_block(static_cast<Block*>(held)); };
    const auto failed = torch_from_blob(memory, int64_t(sizes.size()), sizes.data(), strides.data(), 0, stored_as(dtype_).second,
                                        aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, release, block);
    if (failed) drop_block(block);
    STD_TORCH_CHECK(!failed, "cpu backend: expected a tensor ", shape_of(sizes), " in recycled memory, got an error of torch");
    return Tensor(handle);
  }

  const Tensor& like_;
  ScalarType dtype_;
  bool poison_;
  Block* block_ = nullptr;  // the one that is being filled
  size_t used_ = 0;
};

}  // namespace fusedmoe
