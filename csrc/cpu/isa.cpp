// One build of the kernels for one ISA: setup.py compiles this file once for each, with -DFUSEDMOE_ISA=name and the ISA's flags.
#include "isa.h"

#include "backward.h"
#include "packed.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

double multiply_adds(int64_t count) {
  // Sixteen chains cover latency x ports of every ISA here; the factor keeps them finite.
  constexpr int chains = 16;
  vec<float> sum[chains] = {};
  vec<float> a = splat(0.999f), b = splat(1e-4f);
  for (int64_t i = 0; i < count; i++) {
    asm volatile("" : "+m"(a), "+m"(b));
    for (int j = 0; j < 64; j++) FUSEDMOE_UNROLL for (int c = 0; c < chains; c++) sum[c] = sum[c] * a + b;
  }
  for (int c = 0; c < chains; c++) asm volatile("" : "+m"(sum[c]));
  return 2.0 * count * 64 * chains * Lanes<float>::count;
}

#define FUSEDMOE_NAME(name) #name
#define FUSEDMOE_NAME_OF(name) FUSEDMOE_NAME(name)

extern const Isa isa;
const Isa isa = {
    FUSEDMOE_NAME_OF(FUSEDMOE_ISA),
    {forward<float, Transposed<float>>, forward<float, RowByRow>, forward<float, PackedTransposed<float>>, forward<float, PackedRowByRow>, backward<float>,
     map_gradient<float>, static_gradient<float>},
    {forward<double, Transposed<double>>, nullptr, forward<double, PackedTransposed<double>>, nullptr, backward<double>, map_gradient<double>,
     static_gradient<double>},
    multiply_adds,
};

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
