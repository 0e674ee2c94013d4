// The emulator's lane maps against those of CUTLASS, whose layouts say for lane and value where it
// lies.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include "fragments.h"

namespace fusedmoe::cuda_on_cpu {
namespace {

int checked = 0, wrong = 0;

void check(int ours, int theirs, const char* what, int lane, int value) {
  checked++;
  if (ours == theirs) return;
  wrong++;
  std::fprintf(stderr, "test_fragments: %s, lane %d, value %d: expected %d, got %d\n", what, lane, value, theirs, ours);
}

// A [16, K], B transposed [8, K] and C [16, 8], all counted down their columns.
template <class Operation>
void check_product(const char* name) {
  using Traits = cute::MMA_Traits<Operation>;
  const int depth = cute::get<2>(typename Traits::Shape_MNK{}), numbers = depth / 8;
  const typename Traits::ALayout a{};
  const typename Traits::BLayout b{};
  const typename Traits::CLayout c{};
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      for (int half = 0; half < numbers; half++) {
        const int value = numbers * i + half;
        const Place in_a = place_of_a(depth, lane, i, half), in_b = place_of_b(depth, lane, i, half);
        check(in_a.row + 16 * in_a.column, a(lane, value), name, lane, value);
        if (i < 2) check(in_b.column + 8 * in_b.row, b(lane, value), name, lane, value);
      }
      const Place in_c = place_of_c(lane, i);
      check(in_c.row + 16 * in_c.column, c(lane, i), name, lane, i);
    }
}

// Bits of the matrices, one after another, each row by row.
template <class Operation>
void check_load(const char* name, int count, bool transposed) {
  using Traits = cute::Copy_Traits<Operation>;
  const typename Traits::SrcLayout from{};
  const typename Traits::DstLayout to{};
  for (int lane = 0; lane < 32; lane++) {
    // Lane l names row l of them all.
    if (lane < 8 * count) check(128 * lane, from(lane, 0), name, lane, 0);
    for (int matrix = 0; matrix < count; matrix++)
      for (int half = 0; half < 2; half++) {
        const Place place = place_in_matrix(transposed, lane, half);
        check(1024 * matrix + 128 * place.row + 16 * place.column, to(lane, 32 * matrix + 16 * half), name, lane,
              2 * matrix + half);
      }
  }
}

}  // namespace
}  // namespace fusedmoe::cuda_on_cpu

int main() {
  using namespace fusedmoe::cuda_on_cpu;
  check_product<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16");
  check_product<cute::SM80_16x8x16_F32F16F16F32_TN>("float16");
  check_product<cute::SM80_16x8x8_F32TF32TF32F32_TN>("tf32");
  check_load<cute::SM75_U32x1_LDSM_N>("load_matrices<1>", 1, false);
  check_load<cute::SM75_U32x2_LDSM_N>("load_matrices<2>", 2, false);
  check_load<cute::SM75_U32x4_LDSM_N>("load_matrices<4>", 4, false);
  check_load<cute::SM75_U16x2_LDSM_T>("load_matrices<1, true>", 1, true);
  check_load<cute::SM75_U16x4_LDSM_T>("load_matrices<2, true>", 2, true);
  check_load<cute::SM75_U16x8_LDSM_T>("load_matrices<4, true>", 4, true);
  if (!wrong) std::printf("%d places checked\n", checked);
  return wrong ? 1 : 0;
}
