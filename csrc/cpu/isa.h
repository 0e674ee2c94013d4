// What each ISA's build of the kernels offers, and the arguments of one call.
#pragma once
#include "plan.h"

namespace fusedmoe::cpu {

// Pointers of one call; all tensors but x and d_x are contiguous. Pointers that a call has no use
// for are null.
template <class T>
struct Call {
  const T* x = nullptr;  // [B, S, D]: rows at row_stride, slots at slot_stride, the last dimension contiguous
  int64_t rows = 0, row_stride = 0, slot_stride = 0;
  bool drops = false;      // whether dropout is on, and its seed
  uint64_t seed = 0;
  const T* const* params = nullptr;
  const uint16_t* const* bf16_weights =
      nullptr;           // a plan of bfloat16 takes the linears' weights from here, and only the vectors from params
  bool packed = false;   // params point into the buffer of a frozen network (packing.h)
  T* out = nullptr;      // [B, *output]
  T* weights = nullptr;  // [B, mixing]
  T* saved = nullptr;     // plan.saved panels of padded(rows) lanes, block by block
  int64_t block = block_rows;  // rows of a block: as forward had them
  const T* d_out = nullptr;
  const T* d_weights = nullptr;
  T* d_x = nullptr;           // [B, S, D] contiguous
  T* const* grads = nullptr;  // one a parameter, null where no gradient is wanted
  int64_t chunk = 0;          // lanes of the chunk's d_z
  T* d_z = nullptr;           // [plan.d_z, chunk]
  int64_t transposed_rows = 0;    // rows of a chunk
  T* transposed = nullptr;        // the linears' inputs, each [chunk, leading(width)]; of bfloat16, words of two rows
  uint16_t* transposed_weights = nullptr;  // of bfloat16: every weight, transposed

  T* saved_of(const Plan& plan, int64_t first) const { return saved + first * plan.saved; }
};

// Rows `row` .. `row + rows` of a call, at most block_rows of them.
template <class T>
using RunBlock = void (*)(const Plan&, const Call<T>&, int64_t row, int64_t rows, T* scratch);
// Rows `first` .. `first + rows` of the gradients of linear maps that share parameters, over the
// chunk of `chunk` rows at row 0 (`fresh`) or after it.
struct LinearTask {
  Span<const Stage*> stages;
  int64_t first, rows;
};
template <class T>
using RunLinear = void (*)(const Plan&, const Call<T>&, const LinearTask&, int64_t chunk, bool fresh);
template <class T>
using RunSums = void (*)(const Plan&, const Call<T>&, int64_t chunk);
template <class T>
using RunWeight = void (*)(const Plan&, const Call<T>&, const Stage& linear);

template <class T>
struct Kernels {
  RunBlock<T> forward;       // a block of any rows
  RunBlock<T> forward_few;   // at most few_rows rows, inference only; null where there is none
  RunBlock<T> packed, packed_few;  // the same from packed parameters
  RunBlock<T> backward;      // gradients of the activations; `row` counts from the chunk's first row, see Call
  RunLinear<T> linear_gradient;    // dW and db
  RunSums<T> row_sums;               // gradients that are sums of rows of the chunk's buffer
  RunWeight<T>
      transpose_weight;  // what backward needs of a linear's weight before all else; null where it needs nothing
};

struct Isa {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<float> bf16;           // operands of the linears in bfloat16
  void (*widen)(const uint16_t* from, int64_t count, float* to);  // bfloat16
  void (*round)(const float* from, int64_t count, uint16_t* to);  // to the nearest, ties to even
  double (*multiply_adds)(int64_t count);  // `count` rounds of independent fp32 multiply-adds; returns the FLOPs done

  template <class T>
  const Kernels<T>& kernels(const Plan& plan) const {
    if constexpr (sizeof(T) == 4)
      return plan.bf16 ? bf16 : f32;
    else
      return f64;
  }
};

// Numbers of scratch that a thread needs for a block of so many rows, one of the few included.
inline int64_t forward_scratch(const Plan& plan, int64_t rows) {
  return (plan.scratch + 2 * plan.widest) * padded(rows);
}
inline int64_t backward_scratch(const Plan& plan, int64_t rows) {
  return (plan.scratch + plan.d_scratch + plan.d_linears + 2 * plan.widest) * padded(rows);
}

}  // namespace fusedmoe::cpu
