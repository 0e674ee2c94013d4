// The backward's kernels in the emulated library (library.cpp), for ctypes: the structures of cuda/kernels.h as they are.
#include <exception>
#include <string>

#include "cuda/kernels.h"

namespace {

using namespace fusedmoe;

// Run `what`; return null, or what went wrong, which stays until the next call.
template <class F>
const char* words_of(F&& what) {
  static std::string said;
  try {
    what();
    return nullptr;
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
}

}  // namespace

#define FUSEDMOE_SHOWN extern "C" __attribute__((visibility("default")))

FUSEDMOE_SHOWN const char* fusedmoe_backward_rows(const cuda::Backward& backward, const cuda::Tiles& tiles, int place, int programs) {
  return words_of([&] { cuda::backward_rows(backward, tiles, place, programs, nullptr); });
}
FUSEDMOE_SHOWN const char* fusedmoe_gradients(const cuda::Backward& backward, const cuda::Gradients& gradients, const cuda::Tiles& tiles, int place) {
  return words_of([&] { cuda::gradients(backward, gradients, tiles, place, nullptr); });
}
