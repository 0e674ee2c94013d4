#include "forward_instances.h"

namespace fusedmoe::cuda {

template <>
void forward_as<float>(const Network& network, const Tiles& tiles, int place, int programs, Stream stream) {
  forward_in<float>(network, tiles, place, programs, stream);
}

}  // namespace fusedmoe::cuda
