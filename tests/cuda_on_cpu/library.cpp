// The kernels of csrc/cuda on the emulator as a shared library, for ctypes (standing.py): a call, and what came of it in words.
#include <cstring>
#include <string>

#include "cuda/kernels.h"
#include "emulator.h"

namespace {

using namespace fusedmoe;

#define FUSEDMOE_SHOWN extern "C" __attribute__((visibility("default")))

// What standing.py passes: cuda::Network, its parameters as a list, cuda::Tiles, and the launch.
struct ForwardCall {
  void *x, *buffers, *out, *p, *weights;
  const void *plan, *floats;
  const void* const* parameters;
  int64_t parameter_count, x_row, x_slot, rows, mixing;
  int32_t number, tile_rows, tile_columns, units, keep, aligned, stored, inner, once, place, programs;
};

cuda::Network network_of(const ForwardCall& call) {
  cuda::Network network{{call.x, call.buffers, call.out, call.x_row, call.x_slot},
                        static_cast<float*>(call.p),
                        call.weights,
                        static_cast<const int32_t*>(call.plan),
                        static_cast<const float*>(call.floats),
                        call.rows,
                        call.mixing,
                        {}};
  constexpr int64_t most = cuda::Addresses::count;
  std::memcpy(network.parameters.at, call.parameters, sizeof(void*) * size_t(call.parameter_count < most ? call.parameter_count : most));
  network.parameters.more = call.parameter_count > most ? call.parameters + most : nullptr;
  return network;
}

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

FUSEDMOE_SHOWN const char* fusedmoe_forward(const ForwardCall* call) {
  return words_of([&] {
    const cuda::Tiles tiles{cuda::Number(call->number), call->tile_rows, call->tile_columns, call->units, call->keep, call->aligned != 0,
                            call->stored != 0, call->inner != 0, call->once != 0};
    cuda::forward(network_of(*call), tiles, call->place, call->programs, nullptr);
  });
}

FUSEDMOE_SHOWN void fusedmoe_settings(uint64_t seed, int eager) { cuda_on_cpu::settings() = {seed, eager != 0}; }

// Memory that kernels may touch; none of what was named before.
FUSEDMOE_SHOWN void fusedmoe_clear_regions() { cuda_on_cpu::regions().clear(); }
FUSEDMOE_SHOWN void fusedmoe_add_region(const char* name, const void* first, uint64_t bytes, int written_to) {
  cuda_on_cpu::regions().push_back({name, first, size_t(bytes), written_to != 0});
}

// Since the last time it was asked, as `Counts` of emulator.h has them.
FUSEDMOE_SHOWN void fusedmoe_take_counts(uint64_t* to) {
  std::memcpy(to, &cuda_on_cpu::counts(), sizeof(cuda_on_cpu::Counts));
  cuda_on_cpu::counts() = {};
}
