// The normal distribution and log(1 + e), on the vectors of lanes.h.
//
// The coefficients are minimax polynomials of the relative error, lowest power first, found by
// Remez exchange in 50 digits; beside each stands its error before rounding. tests/cpp/accuracy.cpp
// measures what remains of it.
#pragma once
#include "lanes.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

template <class T>
struct Special;

template <>
struct Special<float> {
  // exp(-x^2 / 2) is 0 from here on.
  static constexpr float largest = 14.5f;
  // P(q) of `normal`, on 0 <= x <= largest: 8.6e-9.
  static constexpr float centre = 4.0f;
  static constexpr float tail[] = {0.7552851438522339f,    -0.6078965663909912f,  0.38713690638542175f,
                                   -0.1865234375f,         0.06040383130311966f,  -0.007525271270424128f,
                                   -0.003512557130306959f, 0.001569922547787428f, 0.00017935661890078336f,
                                   -0.000131970300571993f};
  // Q(t) of `log_of_sum`, on 0 <= t <= 1/9: 1.0e-8, of which 3.8e-10 is left in the logarithm.
  static constexpr float log[] = {0.6666666865348816f, 0.3999970257282257f, 0.2859250009059906f, 0.21704533696174622f,
                                  0.2323356419801712f};
};

template <>
struct Special<double> {
  static constexpr double largest = 39.0;
  // 5.9e-18
  static constexpr double centre = 5.0;
  static constexpr double tail[] = {
      0.769193049750063,      -0.6653825028900567,   0.4953056159699773,      -0.3135331566712962,
      0.1650203661703374,     -0.0691186387065699,   0.020795066800837547,    -0.0029933767667072115,
      -0.0007978694080084864, 0.0005448990334025671, -5.9375674798720435e-05, -4.976265496592968e-05,
      1.6681041238147427e-05, 3.980384866296802e-06, -2.7689524883798266e-06, -3.355375048270276e-07,
      4.328840574106765e-07,  4.088085910962292e-08, -6.601140872081009e-08,  -8.29506379723705e-09,
      7.942061976060825e-09,  1.432052170782309e-09, -3.0285296108069885e-10};
  // 1.2e-16, of which 4.7e-18 is left in the logarithm.
  static constexpr double log[] = {0.6666666666666666,  0.4000000000001481,  0.28571428567052737, 0.22222222722631396,
                                   0.18181789194221706, 0.15385576378178434, 0.13314047479705865, 0.12001936214906146,
                                   0.08796584006443563, 0.1617237252257906};
};

// sum of c[j] x^j
template <class T, int N>
inline vec<T> polynomial(const T (&c)[N], vec<T> x) {
  vec<T> sum = splat<T>(c[N - 1]);
  _Pragma("GCC unroll 32")
  for (int j = N - 2; j >= 0; j--) sum = sum * x + c[j];
  return sum;
}

// Phi(x), the share of the normal distribution below x, and exp(-x^2 / 2).
template <class T>
struct Normal {
  vec<T> share, bell;
};
// The tail Phi(-a) of a = |x| is exp(-a^2 / 2) times a function that falls like 1 / a; times a +
// centre it lies between 0.4 and centre / 2 and is smooth in q = (a - centre) / (a + centre), which
// maps all a >= 0 to a bounded interval. Nothing cancels: the tail's relative error is a few
// roundoffs and that of a^2 / 2, where 1 + erf would leave no digit of it. NaN passes.
template <class T>
inline Normal<T> normal(vec<T> x) {
  using S = Special<T>;
  vec<T> a = x < T(0) ? -x : x;
  a = a > S::largest ? splat<T>(S::largest) : a;
  vec<T> bell = exp<T>(T(-0.5) * a * a);
  vec<T> r = T(1) / (a + S::centre);
  vec<T> tail = bell * (polynomial(S::tail, (a - S::centre) * r) * r);
  return {x < T(0) ? tail : T(1) - tail, bell};
}

// log(1 + e) for 0 <= e <= 1: 2 artanh(s) = 2 s + s t Q(t) with s = e / (2 + e) and t = s^2, as
// accurate for a small e as for a large one.
template <class T>
inline vec<T> log_of_sum(vec<T> e) {
  vec<T> s = e / (T(2) + e), t = s * s;
  return T(2) * s + s * (t * polynomial(Special<T>::log, t));
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
