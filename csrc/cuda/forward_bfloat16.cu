#include "forward_instances.h"

namespace fusedmoe::cuda {

template <>
void forward_as<bfloat16>(const Network& network, const Tiles& tiles, int place, int programs, Stream stream) {
  forward_in<bfloat16>(network, tiles, place, programs, stream);
}

}  // namespace fusedmoe::cuda
