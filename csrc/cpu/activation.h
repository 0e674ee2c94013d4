// Activations and their derivatives, on panels: `n` numbers, a multiple of the vector length.
#pragma once
#include "../table.h"
#include "special.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

template <class T>
inline vec<T> relu(vec<T> x) {
  return x < T(0) ? splat<T>(0) : x;  // and not max(x, 0): NaN passes
}
template <class T>
inline vec<T> sigmoid(vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}
// With e = exp(-2|x|) - 1: -e / (e + 2) for small |x|, where nothing cancels, and 1 - 2 exp(-2|x|)
// / (exp(-2|x|) + 1) beyond, where the error of the quotient is small beside 1. Not e + 1 for
// exp(-2|x|): beside -1 that has lost its digits.
template <class T>
inline vec<T> tanh(vec<T> x) {
  vec<T> size = x < T(0) ? -x : x;
  Shifted<T> e = exp_and_less_one<T>(T(-2) * size);
  vec<T> t = size < T(0.55) ? -e.less_one / (e.less_one + T(2)) : T(1) - T(2) * e.exp / (e.exp + T(1));
  return x < T(0) ? -t : t;
}

// z[i] -> act(z[i]), to `out`, which may be z.
template <class T, class F>
inline void elementwise(const T* z, T* out, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += Lanes<T>::count) store<T>(out + i, f(load<T>(z + i)));
}
// d[i] *= act'(s[i]), where s is what forward saved: the output of relu, sigmoid and tanh, the
// pre-activation of the others.
template <class T, class F>
inline void chain_rule(const T* s, T* d, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += Lanes<T>::count) store<T>(d + i, f(load<T>(s + i), load<T>(d + i)));
}

constexpr double inverse_sqrt_two_pi = 0.39894228040143267794, sqrt_two_over_pi = 0.79788456080286535588,
                 gelu_cubic = 0.044715;
constexpr double softplus_threshold = 20.0;  // PyTorch's default: above it softplus is the identity

// 2 u in gelu_tanh(x) = x (1 + tanh(u)) / 2 = x sigmoid(2 u), which does not cancel at negative x.
template <class T>
inline vec<T> gelu_tanh_inner(vec<T> x) {
  return x * (T(2 * sqrt_two_over_pi) + T(2 * sqrt_two_over_pi * gelu_cubic) * (x * x));
}
template <class T>
inline vec<T> gelu_tanh_slope(vec<T> x) {
  vec<T> u = gelu_tanh_inner<T>(x);
  vec<T> e = exp<T>(u < T(0) ? u : -u);
  vec<T> larger = T(1) / (T(1) + e);  // sigmoid(|2 u|); the other of the two shares is e times it
  vec<T> share = u < T(0) ? e * larger : larger, rest = u < T(0) ? larger : e * larger;
  return share * (T(1) + x * rest * (T(2 * sqrt_two_over_pi) + T(6 * sqrt_two_over_pi * gelu_cubic) * (x * x)));
}

template <class T>
void activate(Act act, T parameter, const T* z, T* out, int64_t n) {
  switch (act) {
    case Act::identity:
      if (out != z) memcpy(out, z, n * sizeof(T));
      return;
    case Act::relu: return elementwise(z, out, n, [](vec<T> x) { return relu<T>(x); });
    case Act::sigmoid: return elementwise(z, out, n, [](vec<T> x) { return sigmoid<T>(x); });
    case Act::tanh: return elementwise(z, out, n, [](vec<T> x) { return tanh<T>(x); });
    case Act::silu: return elementwise(z, out, n, [](vec<T> x) { return x / (T(1) + exp<T>(-x)); });
    case Act::gelu: return elementwise(z, out, n, [](vec<T> x) { return x * normal<T>(x).share; });
    case Act::gelu_tanh: return elementwise(z, out, n, [](vec<T> x) { return x * sigmoid<T>(gelu_tanh_inner<T>(x)); });
    case Act::leaky_relu: return elementwise(z, out, n, [=](vec<T> x) { return x > T(0) ? x : x * parameter; });
    case Act::elu: return elementwise(z, out, n, [=](vec<T> x) { return x > T(0) ? x : parameter * expm1<T>(x); });
    case Act::softplus:
      return elementwise(z, out, n, [](vec<T> x) {
        vec<T> above = (x > T(0) ? x : splat<T>(0)) + log_of_sum<T>(exp<T>(x > T(0) ? -x : x));
        return x > T(softplus_threshold) ? x : above;
      });
  }
}

template <class T>
void differentiate(Act act, T parameter, const T* s, T* d, int64_t n) {
  switch (act) {
    case Act::identity: return;
    // relu'(0) = 0, as PyTorch has it.
    case Act::relu: return chain_rule(s, d, n, [](vec<T> y, vec<T> g) { return y <= T(0) ? splat<T>(0) : g; });
    case Act::sigmoid: return chain_rule(s, d, n, [](vec<T> y, vec<T> g) { return g * (T(1) - y) * y; });
    case Act::tanh: return chain_rule(s, d, n, [](vec<T> y, vec<T> g) { return g * (T(1) - y * y); });
    case Act::silu:
      return chain_rule(s, d, n, [](vec<T> x, vec<T> g) {
        vec<T> e = exp<T>(-x), sig = T(1) / (T(1) + e);
        // At a large x the difference would be all rounding, and x times it felt.
        vec<T> rest = x > T(0) ? e * sig : T(1) - sig;
        return g * sig * (T(1) + x * rest);
      });
    case Act::gelu:
      return chain_rule(s, d, n, [](vec<T> x, vec<T> g) {
        Normal<T> below = normal<T>(x);
        return g * (below.share + x * (T(inverse_sqrt_two_pi) * below.bell));
      });
    case Act::gelu_tanh: return chain_rule(s, d, n, [](vec<T> x, vec<T> g) { return g * gelu_tanh_slope<T>(x); });
    case Act::leaky_relu: return chain_rule(s, d, n, [=](vec<T> x, vec<T> g) { return x > T(0) ? g : g * parameter; });
    case Act::elu:
      return chain_rule(s, d, n, [=](vec<T> x, vec<T> g) { return x > T(0) ? g : g * (parameter * exp<T>(x)); });
    case Act::softplus:
      return chain_rule(s, d, n, [](vec<T> x, vec<T> g) { return x > T(softplus_threshold) ? g : g * sigmoid<T>(x); });
  }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
