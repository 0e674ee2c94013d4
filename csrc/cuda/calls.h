// A call with the kernels of this folder is bound to their tiles besides.
#pragma once
#include "gpu/bound.h"
#include "kernels.h"

namespace fusedmoe::cuda {

struct Bound : gpu::Bound {
  Tiles tiles;
};

}  // namespace fusedmoe::cuda
