#include "packing.h"

#include <algorithm>

namespace fusedmoe::cpu {

Packing make_packing(const Plan& plan) {
  const auto& shapes = plan.graph.shapes;
  Packing packing{std::vector<int64_t>(shapes.size(), -1)};
  const auto place = [&](int parameter, int64_t size) {
    if (packing.offset[parameter] >= 0) return;
    packing.offset[parameter] = packing.size;
    packing.size += size;
  };
  for (const Stage* linear : plan.linears) {
    if (linear->bias >= 0) place(linear->bias, padded(linear->n));
    place(linear->weight, padded(linear->n) * linear->k);
  }
  for (int i : plan.plain) place(i, padded(count_of(shapes[i])));
  return packing;
}

template <class T>
void pack(const Plan& plan, const Packing& packing, const T* const* params, T* to) {
  std::fill_n(to, packing.size, T(0));
  for (const Stage* linear : plan.linears) {
    if (linear->bias >= 0) std::copy_n(params[linear->bias], linear->n, to + packing.offset[linear->bias]);
    const T* from = params[linear->weight];
    T* weight = to + packing.offset[linear->weight];
    for (int64_t n = 0; n < linear->n; n++, from += linear->k) {
      T* column = weight + n / packed_group * packed_group * linear->k + n % packed_group;
      for (int64_t k = 0; k < linear->k; k++) column[k * packed_group] = from[k];
    }
  }
  for (int i : plan.plain) std::copy_n(params[i], count_of(plan.graph.shapes[i]), to + packing.offset[i]);
}

template void pack(const Plan&, const Packing&, const float* const*, float*);
template void pack(const Plan&, const Packing&, const double* const*, double*);

}  // namespace fusedmoe::cpu
