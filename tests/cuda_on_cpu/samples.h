// Small kernels with everything that those of csrc/cuda are made of: what the emulator is tested
// with, and nvcc.
#pragma once
#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace fusedmoe::cuda::samples {

enum class Element { bfloat16, float16, tf32 };

// c [m, n] = a [m, k] times b [n, k] transposed or, where b is turned, b [k, n]. Rows of a and b
// are multiples of 16 bytes.
struct Gemm {
  Element element;
  int stages;  // of copies: 2 or 3
  bool turned;  // 16-bit types alone
  const void *a, *b;
  float* c;
  int m, n, k;
};
void gemm(const Gemm& call, Stream stream);

// to [rows, n] = the softmax of each row of `from`, backwards; n <= 32.
void softmax(const float* from, float* to, int rows, int n, Stream stream);

// Every operation of device.h once, and Philox, by one warp: what lane l got as word i stands in to[32 i + l].
constexpr int operation_words = 55;
// Pairs of numbers that are short in either 16-bit type, signs mixed: the sums of their products
// are exact in float, whatever their order.
inline std::vector<uint32_t> operation_input() {
  std::vector<uint32_t> words;
  for (uint32_t i = 0; i < 256; i++) words.push_back((0x3c00 + 64 * (i * 5 % 7)) | (0xbc00 + 64 * (i * 3 % 8)) << 16);
  return words;
}
// `from` is operation_input().
void operations(const uint32_t* from, uint32_t* to, Stream stream);

}  // namespace fusedmoe::cuda::samples
