// One build of the kernels for one ISA: setup.py compiles this file once for each, with
// -DFUSEDMOE_ISA=name and the ISA's flags.
#include "isa.h"

#include "backward.h"
#include "packed.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

double multiply_adds(int64_t count) {
  // Sixteen accumulators cover latency x ports of every ISA here; the factor keeps them finite.
  constexpr int accumulators = 16;
  vec<float> sum[accumulators] = {};
  vec<float> a = splat(0.999f), b = splat(1e-4f);
  for (int64_t i = 0; i < count; i++) {
    asm volatile("" : "+m"(a), "+m"(b));
    for (int j = 0; j < 64; j++) FUSEDMOE_UNROLL for (int c = 0; c < accumulators; c++) sum[c] = sum[c] * a + b;
  }
  for (int c = 0; c < accumulators; c++) asm volatile("" : "+m"(sum[c]));
  return 2.0 * count * 64 * accumulators * Lanes<float>::count;
}

#define FUSEDMOE_NAME(name) #name
#define FUSEDMOE_NAME_OF(name) FUSEDMOE_NAME(name)

extern const Isa isa;
const Isa isa = {
    FUSEDMOE_NAME_OF(FUSEDMOE_ISA),
    {forward<float, Transposed<float, NativeOperands>>, forward<float, RowByRow>,
     forward<float, Transposed<float, Packed>>, forward<float, PackedRowByRow>, backward<float, NativeOperands>,
     linear_gradient<float, NativeOperands>, row_sums<float>, nullptr},
    {forward<double, Transposed<double, NativeOperands>>, nullptr, forward<double, Transposed<double, Packed>>, nullptr,
     backward<double, NativeOperands>, linear_gradient<double, NativeOperands>, row_sums<double>, nullptr},
    {forward<float, Transposed<float, Bf16Operands>>, nullptr, nullptr, nullptr, backward<float, Bf16Operands>,
     linear_gradient<float, Bf16Operands>, row_sums<float>, transpose_weight},
    widen_row,
    round_row,
    multiply_adds,
};

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
