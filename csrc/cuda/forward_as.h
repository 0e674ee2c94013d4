// The forward in each type, which are compiled apart.
#pragma once
#include "device.h"
#include "kernels.h"

namespace fusedmoe::cuda {

template <class T>
void forward_as(const Network& network, const Tiles& tiles, int place, int programs, Stream stream);
template <>
void forward_as<bfloat16>(const Network& network, const Tiles& tiles, int place, int programs, Stream stream);
template <>
void forward_as<float16>(const Network& network, const Tiles& tiles, int place, int programs, Stream stream);
template <>
void forward_as<float>(const Network& network, const Tiles& tiles, int place, int programs, Stream stream);

// Raises: std::invalid_argument, which names the tiles.
[[noreturn]] void refuse(const Tiles& tiles);

}  // namespace fusedmoe::cuda
