#include <stdexcept>
#include <string>

#include "forward_as.h"

namespace fusedmoe::cuda {

void forward(const Network& network, const Tiles& tiles, int place, int programs, Stream stream) {
  switch (tiles.number) {
    case Number::bfloat16: return forward_as<bfloat16>(network, tiles, place, programs, stream);
    case Number::float16: return forward_as<float16>(network, tiles, place, programs, stream);
    case Number::float32: return forward_as<float>(network, tiles, place, programs, stream);
  }
}

void refuse(const Tiles& tiles) {
  throw std::invalid_argument("cuda: expected tiles of 16, 64 or 128 rows that a kernel is compiled for, got " +
                              std::to_string(tiles.rows) + " x " + std::to_string(tiles.columns) + " with " +
                              std::to_string(tiles.units) + " units");
}

}  // namespace fusedmoe::cuda
