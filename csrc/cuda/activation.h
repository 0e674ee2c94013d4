// The activations on the device: a(z) and a'(z) in float. The formulas are those of
// kernels/triton/activation.py.
#pragma once
#include "device.h"

namespace fusedmoe::cuda {

// The names and their order are those of fusedmoe/activation.py.
enum class Act { identity, relu, sigmoid, tanh, silu, gelu, gelu_tanh, leaky_relu, elu, softplus };

constexpr float gelu_cubic = 0.044715f, root_half = 0.70710678118654752f, root_two_over_pi = 0.79788456080286536f,
                root_one_over_two_pi = 0.39894228040143268f;
// PyTorch's default: above it softplus is the identity.
constexpr float softplus_linear = 20.0f;

// sigmoid(z) and sigmoid(-z), from exp(-|z|), which cannot overflow.
struct Shares {
  float share, rest;
};
__device__ __forceinline__ Shares shares(float z) {
  const float t = expf(-fabsf(z)), larger = 1.0f / (1.0f + t), smaller = t * larger;
  return z < 0.0f ? Shares{smaller, larger} : Shares{larger, smaller};
}
__device__ __forceinline__ float sigmoid(float z) { return shares(z).share; }
// Near 0 the difference loses its digits: Taylor's series, whose next term is below a roundoff for
// |z| < 1/4.
__device__ __forceinline__ float tangent(float z) {
  const float t = expf(-2.0f * fabsf(z)), large = (1.0f - t) / (1.0f + t), u = z * z;
  const float small =
      z * (1.0f - u * (1.0f / 3.0f - u * (2.0f / 15.0f - u * (17.0f / 315.0f - u * (62.0f / 2835.0f)))));
  return fabsf(z) < 0.25f ? small : z < 0.0f ? -large : large;
}
// 1 - tanh(z)^2 without a difference.
__device__ __forceinline__ float tangent_slope(float z) {
  const float t = expf(-2.0f * fabsf(z));
  return 4.0f * t / ((1.0f + t) * (1.0f + t));
}
// 2 u in z (1 + tanh(u)) / 2 = z sigmoid(2 u), of which the right side does not cancel at a
// negative z.
__device__ __forceinline__ float gelu_tanh_inner(float z) {
  return z * (z * z * gelu_cubic + 1.0f) * (2.0f * root_two_over_pi);
}
// z where it is negative or NaN, which fminf would drop, else 0.
__device__ __forceinline__ float not_above_zero(float z) { return z > 0.0f ? 0.0f : z; }

// a(z), of the activation alone.
template <Act ACT>
__device__ __forceinline__ float activated(float z, float parameter) {
  if constexpr (ACT == Act::relu) return z <= 0.0f ? 0.0f : z;  // and not a maximum, which drops NaN
  else if constexpr (ACT == Act::sigmoid) return sigmoid(z);
  else if constexpr (ACT == Act::tanh) return tangent(z);
  else if constexpr (ACT == Act::silu) return z * sigmoid(z);
  else if constexpr (ACT == Act::gelu) return 0.5f * z * (1.0f + erff(z * root_half));
  else if constexpr (ACT == Act::gelu_tanh) return z * sigmoid(gelu_tanh_inner(z));
  else if constexpr (ACT == Act::leaky_relu) return z > 0.0f ? z : parameter * z;
  else if constexpr (ACT == Act::elu) return z > 0.0f ? z : parameter * expm1f(not_above_zero(z));
  else if constexpr (ACT == Act::softplus) return z > softplus_linear ? z : fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z)));
  else return z;
}

template <Act ACT>
__device__ __forceinline__ float derivative(float z, float parameter) {
  if constexpr (ACT == Act::relu) {
    return z <= 0.0f ? 0.0f : 1.0f;
  } else if constexpr (ACT == Act::sigmoid) {
    const Shares s = shares(z);
    return s.share * s.rest;
  } else if constexpr (ACT == Act::tanh) {
    return tangent_slope(z);
  } else if constexpr (ACT == Act::silu) {
    const Shares s = shares(z);
    return s.share * (1.0f + z * s.rest);
  } else if constexpr (ACT == Act::gelu) {
    return 0.5f * (1.0f + erff(z * root_half)) + z * expf(-0.5f * z * z) * root_one_over_two_pi;
  } else if constexpr (ACT == Act::gelu_tanh) {
    const Shares s = shares(gelu_tanh_inner(z));
    return s.share * (1.0f + z * s.rest * (z * z * gelu_cubic * 3.0f + 1.0f) * (2.0f * root_two_over_pi));
  } else if constexpr (ACT == Act::leaky_relu) {
    return z > 0.0f ? 1.0f : parameter;
  } else if constexpr (ACT == Act::elu) {
    return z > 0.0f ? 1.0f : parameter * expf(not_above_zero(z));
  } else if constexpr (ACT == Act::softplus) {
    return z > softplus_linear ? 1.0f : sigmoid(z);
  } else {
    return 1.0f;
  }
}

template <Act ACT>
struct Activation {
  static __device__ __forceinline__ float value(float z, float parameter) { return activated<ACT>(z, parameter); }
  static __device__ __forceinline__ float slope(float z, float parameter) { return derivative<ACT>(z, parameter); }
};

// Call f(Activation<code>()): numbers are visited inside of the choice, and not the choice made for
// each of them.
template <class F>
__device__ __forceinline__ void choose(int code, F&& f) {
  switch (Act(code)) {
    case Act::relu: return f(Activation<Act::relu>());
    case Act::sigmoid: return f(Activation<Act::sigmoid>());
    case Act::tanh: return f(Activation<Act::tanh>());
    case Act::silu: return f(Activation<Act::silu>());
    case Act::gelu: return f(Activation<Act::gelu>());
    case Act::gelu_tanh: return f(Activation<Act::gelu_tanh>());
    case Act::leaky_relu: return f(Activation<Act::leaky_relu>());
    case Act::elu: return f(Activation<Act::elu>());
    case Act::softplus: return f(Activation<Act::softplus>());
    case Act::identity: return;
  }
}

}  // namespace fusedmoe::cuda
