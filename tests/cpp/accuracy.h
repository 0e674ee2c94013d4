// How near the kernels' activations come to the C library's functions in long double.
#pragma once
#include <string>
#include <vector>

#include "tables.h"

namespace fusedmoe::test {

// Worst errors of the value f and of the derivative, in units of roundoff (|f| + |x f'|): what one
// roundoff of x and one of f would cause.
struct Accuracy {
  double value = 0, slope = 0;
};

// Of every activation, in the order of Act, over a grid with `each` points a binade; the networks
// that are one activation stand among `cases`.
template <class T>
std::vector<Accuracy> accuracy(const std::vector<Case>& cases, int each);

// Where infinities, NaN, the largest numbers and -0 come out otherwise than from the C library;
// empty if nowhere.
template <class T>
std::string special_values(const std::vector<Case>& cases);

}  // namespace fusedmoe::test
