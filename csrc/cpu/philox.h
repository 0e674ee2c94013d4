// Dropout's mask: Philox4x32-10, as fusedmoe/reference/philox.py defines it.
#pragma once
#include "mix.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// Four words for each row from `row` on, those of the columns 4 block .. 4 block + 3.
inline void philox(uint64_t seed, int64_t row, uint32_t block, uint32_t stream, uint32_t (&words)[4][lane_multiple]) {
  for (int64_t l = 0; l < lane_multiple; l++) {
    words[0][l] = uint32_t(row + l);
    words[1][l] = block;
    words[2][l] = stream;
    words[3][l] = uint32_t(uint64_t(row + l) >> 32);
  }
  uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++, low += 0x9E3779B9u, high += 0xBB67AE85u)
    for (int64_t l = 0; l < lane_multiple; l++) {
      const uint64_t a = uint64_t(0xD2511F53u) * words[0][l], b = uint64_t(0xCD9E8D57u) * words[2][l];
      words[0][l] = uint32_t(b >> 32) ^ words[1][l] ^ low;
      words[2][l] = uint32_t(a >> 32) ^ words[3][l] ^ high;
      words[1][l] = uint32_t(b);
      words[3][l] = uint32_t(a);
    }
}

// A panel of a stage's output, or of its gradient, in place: 0, or divided by 1 - p.
template <class T>
void drop_out(const Block<T>& b, const Stage& stage, T* panel) {
  if (!b.call.drops || stage.kept == 0) return;
  uint32_t words[4][lane_multiple];
  for (int64_t n = 0; n < stage.n; n += 4)
    for (int64_t v = 0; v < b.ld; v += lane_multiple) {
      philox(b.call.seed, b.row + v, uint32_t(n / 4), uint32_t(stage.stream), words);
      for (int64_t c = 0; c < 4 && n + c < stage.n; c++) {
        T* to = panel + (n + c) * b.ld + v;
        for (int64_t l = 0; l < lane_multiple; l++)
          to[l] = words[c][l] >= stage.threshold ? to[l] * T(stage.kept) : T(0);
      }
    }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
