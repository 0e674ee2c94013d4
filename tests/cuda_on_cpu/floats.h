// The 16-bit floating-point types of the device, in plain C++; rounding is to the nearest, ties to
// even.
#pragma once
#include <bit>
#include <cstdint>

namespace fusedmoe::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float widened(float x) { return x; }
inline float widened(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widened(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // Exponents move from a bias of 15 to one of 127; subnormal numbers count in 2^-24.
  if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | rest << 13);
  if (rest >= 0x0400) return std::bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(float(rest) * 0x1p-24f));
}

template <class T>
T rounded(float x);
template <>
inline float rounded<float>(float x) {
  return x;
}
template <>
inline bfloat16 rounded<bfloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 rounded<float16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {0x7fff};
  if (rest >= std::bit_cast<uint32_t>(65536.0f)) return {uint16_t(sign | 0x7c00)};
  // Beside 0.5 a float's last place is 2^-24: the addition rounds.
  if (rest < std::bit_cast<uint32_t>(0x1p-14f)) {
    const float places = std::bit_cast<float>(rest) + 0.5f;
    return {uint16_t(sign | (std::bit_cast<uint32_t>(places) - std::bit_cast<uint32_t>(0.5f)))};
  }
  return {uint16_t(sign | ((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13))};
}

template <class T>
uint32_t rounded_pair(float low, float high) {
  return rounded<T>(low).bits | uint32_t(rounded<T>(high).bits) << 16;
}
template <class T>
float low(uint32_t pair) {
  return widened(T{uint16_t(pair)});
}
template <class T>
float high(uint32_t pair) {
  return widened(T{uint16_t(pair >> 16)});
}
inline uint32_t float_as_word(float x) { return std::bit_cast<uint32_t>(x); }
inline float word_as_float(uint32_t x) { return std::bit_cast<float>(x); }
// Ties away from zero; infinities and NaN stay.
inline uint32_t rounded_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

}  // namespace fusedmoe::cuda
