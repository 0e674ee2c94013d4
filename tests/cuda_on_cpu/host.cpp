// What csrc/cuda/runtime.h asks for where the emulator is the device; and the emulator's own words, for the tests that have loaded the library.
#include "cuda/runtime.h"

#include "emulator.h"

namespace fusedmoe::cuda {

std::string missing() { return ""; }
void use_device(int) {}
Stream current_stream(int) { return nullptr; }

}  // namespace fusedmoe::cuda

#define FOR_TESTS extern "C" __attribute__((visibility("default")))

using namespace fusedmoe::cuda_on_cpu;

// Every launch from now on goes by these.
FOR_TESTS void fusedmoe_schedule(uint64_t seed, bool eager) { settings() = {seed, eager}; }

// What launches have done so far, as emulator.h has it.
FOR_TESTS void fusedmoe_counts(Counts* to) { *to = counts(); }

// Global memory that kernels may touch, as soon as there is any.
FOR_TESTS void fusedmoe_lend(const char* name, const void* first, uint64_t bytes, bool written_to) { regions().push_back({name, first, bytes, written_to}); }
// What was read of the memory that was lent in this place, or written there.
FOR_TESTS uint64_t fusedmoe_bytes(uint64_t place, bool written) { return written ? regions()[place].bytes_written : regions()[place].bytes_read; }
FOR_TESTS void fusedmoe_take_back() { regions().clear(); }
