// device.h in PTX, for sm_80 and later. An access to shared memory clobbers memory: the compiler
// must not move others across it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fusedmoe::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// Asked for anew wherever it stands: otherwise all that loops make of it is worked out in front of
// them, and kept, in registers that accumulators need.
__device__ __forceinline__ int thread() {
  uint32_t number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return int(number);
}
__device__ __forceinline__ int warp() { return int(uint32_t(thread()) / 32); }
__device__ __forceinline__ int lane() { return int(uint32_t(thread()) % 32); }
__device__ __forceinline__ int block_x() {
  uint32_t number;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(number));
  return int(number);
}
__device__ __forceinline__ int block_y() { return int(blockIdx.y); }
__device__ __forceinline__ int blocks_x() { return int(gridDim.x); }
__device__ __forceinline__ int blocks_y() { return int(gridDim.y); }

template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char fusedmoe_shared[];
  return reinterpret_cast<T*>(fusedmoe_shared);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

template <class T>
__device__ __forceinline__ T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T x, int delta) {
  return __shfl_down_sync(0xffffffffu, x, delta);
}

template <class T>
__device__ __forceinline__ T load_global(const T* from) {
  return *from;
}
template <class T>
__device__ __forceinline__ void store_global(T* to, T x) {
  *to = x;
}

// The first fence hands on what was stored; behind the second one no load finds what L1 had before.
__device__ __forceinline__ int arrive(int* counter) {
  __threadfence();
  const int before = atomicAdd(counter, 1);
  __threadfence();
  return before;
}

// 16 bytes pass L1 by: a tile is read once by a block.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, int given = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
  const size_t global = __cvta_generic_to_global(from);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(given) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(BYTES), "r"(given)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ float widened(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(float16 x) { return __half2float(x); }
__device__ __forceinline__ float widened(float x) { return x; }

template <class T>
__device__ __forceinline__ T rounded(float x);
template <>
__device__ __forceinline__ bfloat16 rounded<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float16 rounded<float16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ float rounded<float>(float x) {
  return x;
}

// The instructions take the upper half first.
template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  uint32_t pair;
  if constexpr (sizeof(T) != 2)
    static_assert(sizeof(T) == 2);
  else if constexpr (std::is_same_v<T, bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class T>
__device__ __forceinline__ float low(uint32_t pair) {
  if constexpr (std::is_same_v<T, bfloat16>) return __uint_as_float(pair << 16);
  else return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffff)));
}
template <class T>
__device__ __forceinline__ float high(uint32_t pair) {
  if constexpr (std::is_same_v<T, bfloat16>) return __uint_as_float(pair & 0xffff0000u);
  else return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}
__device__ __forceinline__ uint32_t float_as_word(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float word_as_float(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ uint32_t rounded_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

#define FUSEDMOE_LDMATRIX(COUNT, TO, ...)                                         \
  if constexpr (TRANSPOSED)                                                       \
    asm volatile("ldmatrix.sync.aligned.m8n8.x" COUNT ".trans.shared.b16 " TO ";" \
                 : __VA_ARGS__                                                    \
                 : "r"(shared)                                                    \
                 : "memory");                                                     \
  else asm volatile("ldmatrix.sync.aligned.m8n8.x" COUNT ".shared.b16 " TO ";" : __VA_ARGS__ : "r"(shared) : "memory")

template <int N, bool TRANSPOSED = false>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (N == 1) {
    FUSEDMOE_LDMATRIX("1", "{%0}, [%1]", "=r"(to[0]));
  } else if constexpr (N == 2) {
    FUSEDMOE_LDMATRIX("2", "{%0, %1}, [%2]", "=r"(to[0]), "=r"(to[1]));
  } else {
    FUSEDMOE_LDMATRIX("4", "{%0, %1, %2, %3}, [%4]", "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]));
  }
}
#undef FUSEDMOE_LDMATRIX

#define FUSEDMOE_MMA(KIND)                                                                                          \
  asm("mma.sync.aligned." KIND " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    FUSEDMOE_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, float16>) {
    FUSEDMOE_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, float>);
    FUSEDMOE_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
}
#undef FUSEDMOE_MMA

}  // namespace fusedmoe::cuda
