// Which lane holds which numbers of the matrices of multiply_add and load_matrices.
// test_fragments.cpp holds them against CUTLASS's.
#pragma once

namespace fusedmoe::cuda_on_cpu {

struct Place {
  int row, column;
};

// Number `half` (of one or two) of word `i` that a lane has of A [16, depth], of B [depth, 8], and
// number `i` that it has of C [16, 8].
constexpr Place place_of_a(int depth, int lane, int i, int half) {
  const int numbers = depth == 16 ? 2 : 1;
  return {lane / 4 + 8 * (i % 2), numbers * (lane % 4) + half + depth / 2 * (i / 2)};
}
constexpr Place place_of_b(int depth, int lane, int i, int half) {
  const int numbers = depth == 16 ? 2 : 1;
  return {numbers * (lane % 4) + half + depth / 2 * i, lane / 4};
}
constexpr Place place_of_c(int lane, int i) { return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2}; }

// Number `half` of the word that a lane gets of a matrix of 8 x 8 numbers of 16 bits, as its rows
// lie in shared memory.
constexpr Place place_in_matrix(bool transposed, int lane, int half) {
  return transposed ? Place{2 * (lane % 4) + half, lane / 4} : Place{lane / 4, 2 * (lane % 4) + half};
}

}  // namespace fusedmoe::cuda_on_cpu
