// What a kernel may ask of the device, beside C++: everything that is an instruction of its own
// stands behind a name of this page, in PTX (ptx.h) for nvcc, and in tests/cuda_on_cpu for a
// compiler of the processor, which so compiles and runs the same kernels.
//
//   int thread(), warp(), lane();                   of a block, which has one dimension and whole warps
//   int block_x(), block_y(), blocks_x(), blocks_y();
//   T* shared_memory<T>();                          the launch's bytes of it, at a multiple of 128
//   void sync_block(), sync_warp();                 every thread of the block, of the warp
//   T shuffle(T x, int lane), shuffle_xor(T x, int mask), shuffle_down(T x, int delta);
//                                                   float, int and uint32_t; the whole warp
//
//   T load_global<T>(const T* from), void store_global(T* to, T x);
//                                                   one access of sizeof(T) bytes, aligned to them
//   int arrive(int* counter);                       add 1, and return what it was. Whoever comes later sees
//                                                   what was stored before: by this thread, or by others
//                                                   in front of a barrier that both have left
//   void copy_async<BYTES>(void* to, const void* from, int given = BYTES);
//                                                   to shared memory, 4, 8 or 16 bytes: `given` of them,
//                                                   then zeros
//   void commit_copies();                           a group of those that were asked for since the last one,
//                                                   maybe none
//   void wait_copies<N>();                          this thread's own, all but the last N groups; others see
//                                                   them after a sync
//
//   float widened(T x), T rounded<T>(float x), uint32_t rounded_pair<T>(float low, float high);
//                                                   T = bfloat16, float16
//   float low<T>(uint32_t pair), high<T>(uint32_t pair);
//   uint32_t rounded_tf32(float x);                 to the nearest tf32, ties away from zero
//   uint32_t float_as_word(float x), float word_as_float(uint32_t x);      the bits
//
//   void load_matrices<N, TRANSPOSED = false>(uint32_t (&to)[N], const void* row);
//                                                   N = 1, 2, 4 matrices of 8 rows of 16 bytes
//   void multiply_add<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
//                                                   C += A B by the whole warp
//
// load_matrices: lane l names row l % 8 of matrix l / 8, at a multiple of 16 bytes; lanes beyond 8
// N name any address in shared memory. It gets of each matrix the 32 bits l % 4 of row l / 4;
// transposed, the 16-bit numbers 2 (l % 4) and the next one of column l / 4.
//
// multiply_add: A is [16, K], B [K, 8], C [16, 8], K = 16 for 16-bit types and 8 for float (of
// which the upper 19 bits count: tf32). With r = l / 4 and q = l % 4 lane l has
//   c[i] = C[r + 8 (i / 2)][2 q + i % 2]
//   16 bits: a[i] = A[r + 8 (i % 2)][2 q + 8 (i / 2)] and the next column,
//            b[i] = B[2 q + 8 i] and the next row, column r; the first is the low half
//   tf32: a[i] = A[r + 8 (i % 2)][q + 4 (i / 2)], b[i] = B[q + 4 i][r]
// so that load_matrices<4> brings an A from rows of A, and load_matrices<2> a B from rows of its
// transpose (a weight as PyTorch stores it). Source: PTX ISA, "Matrix fragments for mma.m16n8k16",
// "... mma.m16n8k8" and "ldmatrix".
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include "ptx.h"
#define FUSEDMOE_CUDA_UNROLL _Pragma("unroll")
#define FUSEDMOE_CUDA_ROLLED _Pragma("unroll 1")
#define FUSEDMOE_CUDA_UNROLL_SOME _Pragma("unroll 4")
#else
// On the path of tests alone.
#include "cuda_on_cpu.h"
#define FUSEDMOE_CUDA_UNROLL
#define FUSEDMOE_CUDA_ROLLED
#define FUSEDMOE_CUDA_UNROLL_SOME
#endif

namespace fusedmoe::cuda {

// Several numbers that are loaded or stored as one.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// K of multiply_add<T>.
template <class T>
constexpr int depth = sizeof(T) == 2 ? 16 : 8;

// Over groups of COUNT lanes that follow one another; every lane has the result. In the order of a
// butterfly, so the same for all of them.
template <int COUNT = 32>
__device__ __forceinline__ float sum_lanes(float x) {
  FUSEDMOE_CUDA_UNROLL
  for (int stride = COUNT / 2; stride > 0; stride /= 2) x += shuffle_xor(x, stride);
  return x;
}
template <int COUNT = 32>
__device__ __forceinline__ float max_lanes(float x) {
  FUSEDMOE_CUDA_UNROLL
  for (int stride = COUNT / 2; stride > 0; stride /= 2) x = fmaxf(x, shuffle_xor(x, stride));
  return x;
}

}  // namespace fusedmoe::cuda
