// Activations, their slopes and dropout of one number.
#pragma once
#include <algorithm>
#include <limits>

#include "problem.h"

namespace fusedmoe::test {

inline bool kinked(const graph::Stage& stage) {
  return stage.slope >= 0 || stage.act == Act::relu || stage.act == Act::leaky_relu || stage.act == Act::elu;
}

template <class Real>
Real gelu_tanh_exponent(Real z) {
  return 2 * Real(0.79788456080286535588L) * (z + Real(0.044715L) * z * z * z);
}

template <class Real>
Real activated(const graph::Stage& stage, Real z) {
  const Real a = Real(stage.parameter);
  switch (stage.act) {
    case Act::identity: return z;
    case Act::relu: return z < 0 ? Real(0) : z;
    case Act::sigmoid: return 1 / (1 + std::exp(-z));
    case Act::tanh: return std::tanh(z);
    case Act::silu: return z / (1 + std::exp(-z));
    // In forms that keep their digits at negative z: 1 + erf(z) = erfc(-z), and 1 + tanh(u) = 2 /
    // (1 + exp(-2 u)).
    case Act::gelu: return z / 2 * std::erfc(-z * Real(0.70710678118654752440L));
    case Act::gelu_tanh: return z / (1 + std::exp(-gelu_tanh_exponent(z)));
    case Act::leaky_relu: return z > 0 ? z : a * z;
    case Act::elu: return z > 0 ? z : a * std::expm1(z);
    case Act::softplus: return z > 20 ? z : std::log1p(std::exp(z));
  }
  return std::numeric_limits<Real>::quiet_NaN();
}

template <class Real>
Real slope(const graph::Stage& stage, Real z) {
  const Real a = Real(stage.parameter), s = 1 / (1 + std::exp(-z)), rest = 1 / (1 + std::exp(z));
  switch (stage.act) {
    case Act::identity: return 1;
    case Act::relu: return z <= 0 ? 0 : 1;
    case Act::sigmoid: return s * rest;
    case Act::tanh: return 1 / (std::cosh(z) * std::cosh(z));
    case Act::silu: return s * (1 + z * rest);
    case Act::gelu:
      return std::erfc(-z * Real(0.70710678118654752440L)) / 2 +
             z * Real(0.39894228040143267794L) * std::exp(-z * z / 2);
    case Act::gelu_tanh: {
      const Real share = 1 / (1 + std::exp(-gelu_tanh_exponent(z))), other = 1 / (1 + std::exp(gelu_tanh_exponent(z)));
      return share + z * share * other * 2 * Real(0.79788456080286535588L) * (1 + 3 * Real(0.044715L) * z * z);
    }
    case Act::leaky_relu: return z > 0 ? 1 : a;
    case Act::elu: return z > 0 ? 1 : a * std::exp(z);
    case Act::softplus: return z > 20 ? 1 : s;
  }
  return std::numeric_limits<Real>::quiet_NaN();
}

// What dropout multiplies an element with: Philox4x32-10 (Salmon et al., SC 2011), one element at a time.
inline double kept(const graph::Stage& stage, int64_t row, int64_t column) {
  if (stage.dropout == 0) return 1;
  uint32_t c[4] = {uint32_t(row), uint32_t(column / 4), uint32_t(stage.stream), uint32_t(row >> 32)};
  uint32_t low = uint32_t(dropout_seed), high = uint32_t(dropout_seed >> 32);
  for (int round = 0; round < 10; round++, low += 0x9E3779B9u, high += 0xBB67AE85u) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ low, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ high,
                              uint32_t(a)};
    std::copy(next, next + 4, c);
  }
  return c[column % 4] >= stage.dropout * 0x1p32 ? 1 / (1 - stage.dropout) : 0;
}

}  // namespace fusedmoe::test
