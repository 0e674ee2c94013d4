// Numbers in the kernels' type for tensors that store another one: widened on the way in, rounded
// once on the way out. In between they stand in memory of the caching allocator. Whole calls in
// float16 are so computed in float32; bfloat16 so far as the linears' weights are not concerned,
// which the kernels take as they are.
#pragma once
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "cpu/network.h"
#include "tensors.h"

namespace fusedmoe {

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (Slab* block : slabs_) drop_slab(block);
  }
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + slab_alignment - 1) / slab_alignment * slab_alignment;
    if (bytes > left_) {
      slabs_.push_back(take_slab(std::max(bytes, smallest_slab)));
      next_ = slabs_.back()->memory;
      left_ = slabs_.back()->bytes;
    }
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return result;
  }

 private:
  std::vector<Slab*> slabs_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

template <class T>
class Storage {
 public:
  explicit Storage(const cpu::Isa& isa) : isa_(isa) {}

  // The numbers of a contiguous tensor.
  const T* read(const Tensor& t) {
    if (t.scalar_type() == dtype_of<T>) return static_cast<const T*>(t.const_data_ptr());
    T* to = memory_.take<T>(t.numel());
    widen(t.const_data_ptr(), t.scalar_type(), t.numel(), to);
    return to;
  }
  // Those of x [B, S, D], rows and slots at strides that may change; an expanded slot is widened
  // once.
  void read(const Tensor& x, cpu::Call<T>& call) {
    call.rows = x.size(0);
    call.row_stride = x.stride(0);
    call.slot_stride = x.stride(1);
    call.x = static_cast<const T*>(x.const_data_ptr());
    if (x.scalar_type() == dtype_of<T>) return;
    const int64_t width = x.size(2), slots = call.slot_stride == 0 ? 1 : x.size(1);
    T* to = memory_.take<T>(call.rows * slots * width);
    for (int64_t b = 0; b < call.rows; b++)
      for (int64_t s = 0; s < slots; s++) {
        const char* from =
            static_cast<const char*>(x.const_data_ptr()) + 2 * (b * call.row_stride + s * call.slot_stride);
        widen(from, x.scalar_type(), width, to + (b * slots + s) * width);
      }
    call.x = to;
    call.row_stride = slots * width;
    call.slot_stride = call.slot_stride == 0 ? 0 : width;
  }
  // Where to write the numbers of a contiguous tensor; `round` then takes them there.
  T* write(const Tensor& t) {
    if (t.scalar_type() == dtype_of<T>) return static_cast<T*>(t.data_ptr());
    T* from = memory_.take<T>(t.numel());
    pending_.push_back({t, from});
    return from;
  }
  void round() {
    for (const auto& [t, from] : pending_)
      if constexpr (std::is_same_v<T, float>) {
        if (t.scalar_type() == ScalarType::BFloat16)
          isa_.round(from, t.numel(), static_cast<uint16_t*>(t.data_ptr()));
        else
          std::copy_n(from, t.numel(), static_cast<c10::Half*>(t.data_ptr()));
      }
  }
  // bfloat16 of a contiguous tensor of bfloat16 or float32.
  const uint16_t* bf16_weights(const Tensor& t) {
    if (t.scalar_type() == ScalarType::BFloat16) return static_cast<const uint16_t*>(t.const_data_ptr());
    uint16_t* to = memory_.take<uint16_t>(t.numel());
    isa_.round(static_cast<const float*>(t.const_data_ptr()), t.numel(), to);
    return to;
  }

 private:
  void widen(const void* from, ScalarType stored, int64_t count, T* to) {
    if (stored == ScalarType::BFloat16) {
      if constexpr (std::is_same_v<T, float>) isa_.widen(static_cast<const uint16_t*>(from), count, to);
    } else {
      std::copy_n(static_cast<const c10::Half*>(from), count, to);
    }
  }

  const cpu::Isa& isa_;
  Memory memory_;
  std::vector<std::pair<Tensor, T*>> pending_;
};

}  // namespace fusedmoe
