// Tensors through PyTorch's stable ABI: checked arguments, and results in ordinary or in memory of
// the caching allocator.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "caching_allocator.h"
#include "table.h"

// PyTorch has it since 2.11, this binary loads in 2.10 too: null there.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);

namespace fusedmoe {

inline void check(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType dtype, const char* what,
                  int64_t index = -1) {
  check(t, sizes, dtype, t.is_cpu(), "on the CPU", what, index);
}

// `t` itself if it is what the kernels take, a contiguous copy if only its strides are not, an
// error otherwise.
inline Tensor checked(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType dtype, const char* what,
                      int64_t index = -1) {
  check(t, sizes, dtype, what, index);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

template <class T>
constexpr ScalarType dtype_of = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// Whether torch.use_deterministic_algorithms asks for NaN in memory that nothing was written to.
// The stable ABI does not tell; what torch put into a fresh tensor of its own does, and a NaN that
// stands there by chance only costs a needless fill.
inline bool poisoning(const Tensor& like) {
  Tensor probe = torch::stable::new_empty(like, {1}, ScalarType::Float);
  return std::isnan(*static_cast<const float*>(probe.const_data_ptr()));
}

// Results of one call. Each is a tensor with a storage of its own, as fresh as any (autograd and
// optimizers may keep it, it is pickled and shared alone), but for one thing: torch lets nobody
// enlarge a storage that it did not allocate. Their memory is that of the caching allocator.
class Results {
 public:
  // `like` has the device; `poison`: fill with NaN.
  Results(const Tensor& like, ScalarType dtype, bool poison) : like_(like), dtype_(dtype), poison_(poison) {}
  ~Results() {
    if (slab_) drop_slab(slab_);
  }
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;

  Tensor make(const std::vector<int64_t>& sizes) {
    const size_t bytes = size_t(count_of(sizes)) * stored_as(dtype_).first;
    if (!bytes) return nothing(sizes);
    if (!torch_from_blob) return torch::stable::new_empty(like_, {sizes.data(), sizes.size()}, dtype_);
    if (bytes > smallest_slab) {
      Slab* own = take_slab(bytes);
      Tensor result = place(own, own->memory, sizes, bytes);
      drop_slab(own);
      return result;
    }
    if (!slab_ || used_ + bytes > slab_->bytes) {
      if (slab_) drop_slab(slab_);
      slab_ = nullptr;
      slab_ = take_slab(smallest_slab);
      used_ = 0;
    }
    char* memory = slab_->memory + used_;
    used_ += (bytes + slab_alignment - 1) / slab_alignment * slab_alignment;
    return place(slab_, memory, sizes, bytes);
  }

 private:
  // Not `new_empty`, which goes through the dispatcher.
  Tensor nothing(const std::vector<int64_t>& sizes) {
    const std::vector<int64_t> strides = strides_of(sizes);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                    stored_as(dtype_).second, aoti_torch_device_type_cpu(), -1,
                                                    &handle));
    return Tensor(handle);
  }

  Tensor place(Slab* slab, char* memory, const std::vector<int64_t>& sizes, size_t bytes) {
    // All bits set are a NaN in every dtype.
    if (poison_) std::memset(memory, 0xff, bytes);
    const std::vector<int64_t> strides = strides_of(sizes);
    AtenTensorHandle handle;
    slab->holders.fetch_add(1, std::memory_order_relaxed);
    const auto release = [](void*, void* held) { drop_slab(static_cast<Slab*>(held)); };
    const auto failed = torch_from_blob(memory, int64_t(sizes.size()), sizes.data(), strides.data(), 0,
                                        stored_as(dtype_).second, aoti_torch_device_type_cpu(), -1, &handle,
                                        aoti_torch_layout_strided(), nullptr, 0, release, slab);
    if (failed) drop_slab(slab);
    STD_TORCH_CHECK(!failed, "cpu backend: expected a tensor ", shape_of(sizes),
                    " in cached memory, got an error of torch");
    return Tensor(handle);
  }

  const Tensor& like_;
  ScalarType dtype_;
  bool poison_;
  Slab* slab_ = nullptr;  // the one that is being filled
  size_t used_ = 0;
};

}  // namespace fusedmoe
