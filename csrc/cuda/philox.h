// Random words of dropout, Philox4x32-10: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011. The same seed, row, column and stream give the same word
// in every backend, whoever asks for it.
#pragma once
#include "device.h"

namespace fusedmoe::cuda {

struct Philox {
  uint32_t at[4];
};

// What ten rounds make of a counter, by a key of 64 bits.
__device__ __forceinline__ Philox philox(Philox counter, uint64_t key) {
  constexpr uint64_t first_factor = 0xd2511f53, second_factor = 0xcd9e8d57;
  constexpr uint32_t first_step = 0x9e3779b9, second_step = 0xbb67ae85;
  uint32_t first_key = uint32_t(key), second_key = uint32_t(key >> 32);
  FUSEDMOE_CUDA_UNROLL
  for (int round = 0; round < 10; round++) {
    const uint64_t first = first_factor * counter.at[0], second = second_factor * counter.at[2];
    counter = {uint32_t(second >> 32) ^ counter.at[1] ^ first_key, uint32_t(second),
               uint32_t(first >> 32) ^ counter.at[3] ^ second_key, uint32_t(first)};
    first_key += first_step, second_key += second_step;
  }
  return counter;
}

// The word of one number that may be dropped.
__device__ __forceinline__ uint32_t random_word(uint64_t seed, int64_t row, int column, int stream) {
  const Philox of = philox({uint32_t(row), uint32_t(column / 4), uint32_t(stream), uint32_t(row >> 32)}, seed);
  const uint32_t low = column % 2 ? of.at[1] : of.at[0], high = column % 2 ? of.at[3] : of.at[2];
  return column % 4 < 2 ? low : high;
}

}  // namespace fusedmoe::cuda
