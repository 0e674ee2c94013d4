// Vectors of one ISA, in GCC's and Clang's portable vector extensions, and exp and its kin on them.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define FUSEDMOE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FUSEDMOE_VECTOR_BYTES 32
#else
#define FUSEDMOE_VECTOR_BYTES 16  // SSE2, NEON
#endif
#define FUSEDMOE_UNROLL _Pragma("GCC unroll 16")

// Everything here lives in a namespace of its ISA: equal names in two of them would be merged by
// the linker.
namespace fusedmoe::cpu::FUSEDMOE_ISA {

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int count = FUSEDMOE_VECTOR_BYTES / 4;
  typedef float vec __attribute__((vector_size(FUSEDMOE_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t ints __attribute__((vector_size(FUSEDMOE_VECTOR_BYTES)));
  // 1.5 x 2^23: adding it rounds a small number to an integer, which then stands in the low bits.
  static constexpr float magic = 12582912.0f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // exp is 0 below `least` and infinite above `most`; expm1 needs 2^n to be a normal number.
  static constexpr float least = -104.0f, most = 89.0f, least_normal = -87.0f, most_normal = 88.0f;
  // Terms of the Taylor series on |r| <= ln(2) / 2: the first one left out is 0.35^8 / 8! = 5e-9.
  static constexpr int terms = 7;
};

template <>
struct Lanes<double> {
  static constexpr int count = FUSEDMOE_VECTOR_BYTES / 8;
  typedef double vec __attribute__((vector_size(FUSEDMOE_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t ints __attribute__((vector_size(FUSEDMOE_VECTOR_BYTES)));
  static constexpr double magic = 6755399441055744.0;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double least = -746.0, most = 710.0, least_normal = -708.0, most_normal = 709.0;
  static constexpr int terms = 14;
};

template <class T>
using vec = typename Lanes<T>::vec;
template <class T>
using ints = typename Lanes<T>::ints;

template <class T>
inline vec<T> splat(T value) {
  return vec<T>{} + value;
}
template <class T>
inline vec<T> load(const T* p) {
  return *(const vec<T>*)p;
}
template <class T>
inline void store(T* p, vec<T> v) {
  *(vec<T>*)p = v;
}

// x = n ln 2 + r; leaves r in x and returns n in the low bits.
template <class T>
inline ints<T> reduce(vec<T>& x) {
  using L = Lanes<T>;
  vec<T> t = x * T(1.4426950408889634) + L::magic;
  vec<T> n = t - L::magic;
  x = x - n * L::ln2_high;
  x = x - n * L::ln2_low;
  return (ints<T>)t - (ints<T>)splat<T>(L::magic);
}
template <class T>
inline vec<T> power_of_two(ints<T> n) {
  return (vec<T>)((n + Lanes<T>::bias) << Lanes<T>::mantissa);
}
// (exp(r) - 1) / r on |r| <= ln(2) / 2, by Horner's rule.
template <class T>
inline vec<T> taylor(vec<T> r) {
  T factorial = 1;
  for (int k = 2; k <= Lanes<T>::terms; k++) factorial *= T(k);
  vec<T> sum = splat<T>(T(1) / factorial);
  FUSEDMOE_UNROLL
  for (int k = Lanes<T>::terms; k > 1; k--) {
    factorial /= T(k);
    sum = sum * r + T(1) / factorial;
  }
  return sum;
}

// NaN passes every comparison below unselected, so it stays NaN.
template <class T>
inline vec<T> exp(vec<T> x) {
  using L = Lanes<T>;
  x = x < L::least ? splat<T>(L::least) : x;
  x = x > L::most ? splat<T>(L::most) : x;
  ints<T> n = reduce<T>(x);
  vec<T> sum = taylor<T>(x) * x + T(1);
  // In two steps, because 2^n itself may be no normal number.
  ints<T> half = n >> 1;
  return sum * power_of_two<T>(half) * power_of_two<T>(n - half);
}
// exp(x), and exp(x) - 1 without cancellation near 0.
template <class T>
struct Shifted {
  vec<T> exp, less_one;
};
// Stays finite above `most_normal`, where no activation needs it.
template <class T>
inline Shifted<T> exp_and_less_one(vec<T> x) {
  using L = Lanes<T>;
  x = x < L::least_normal ? splat<T>(L::least_normal) : x;
  x = x > L::most_normal ? splat<T>(L::most_normal) : x;
  ints<T> n = reduce<T>(x);
  vec<T> scale = power_of_two<T>(n), sum = taylor<T>(x) * x;
  return {scale * sum + scale, scale * sum + (scale - T(1))};
}
template <class T>
inline vec<T> expm1(vec<T> x) {
  return exp_and_less_one<T>(x).less_one;
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
