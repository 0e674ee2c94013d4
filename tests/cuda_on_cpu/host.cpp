// What csrc/cuda/runtime.h asks for where the emulator is the device; and the emulator's own words,
// for the tests that have loaded the library.
#include "cuda/runtime.h"

#include <map>
#include <utility>

#include "emulator.h"

namespace fusedmoe::cuda {

std::string missing() { return ""; }
void use_device(int) {}
Stream current_stream(int) { return nullptr; }

namespace {

// What a test watches: the regions that every launch may touch, the kernels that were launched, and
// what was moved of each region, by name.
struct Watch {
  bool on = false;
  std::vector<cuda_on_cpu::Region> lent;
  std::vector<std::string> kernels;
  std::map<std::string, std::pair<uint64_t, uint64_t>> moved;

  // Add up what the last launch moved.
  void settle() {
    for (const cuda_on_cpu::Region& region : cuda_on_cpu::regions()) {
      auto& [read, written] = moved[region.name];
      read += region.bytes_read;
      written += region.bytes_written;
    }
    cuda_on_cpu::regions().clear();
  }
} watch;

}  // namespace

bool watching() { return watch.on; }

void tell(const char* kernel, const std::vector<Reach>& reaches) {
  watch.settle();
  watch.kernels.push_back(kernel);
  cuda_on_cpu::regions() = watch.lent;
  for (const Reach& reach : reaches)
    if (reach.bytes)
      cuda_on_cpu::regions().push_back(
          {std::string(kernel) + ", " + reach.name, reach.first, reach.bytes, reach.written});
}

}  // namespace fusedmoe::cuda

#define FOR_TESTS extern "C" __attribute__((visibility("default")))

using namespace fusedmoe::cuda_on_cpu;

// Every launch from now on goes by these.
FOR_TESTS void fusedmoe_schedule(uint64_t seed, bool eager) { settings() = {seed, eager}; }

// What launches have done so far, as emulator.h has it.
FOR_TESTS void fusedmoe_counts(Counts* to) { *to = counts(); }

// Global memory that kernels may touch, as soon as there is any.
FOR_TESTS void fusedmoe_lend(const char* name, const void* first, uint64_t bytes, bool written_to) {
  regions().push_back({name, first, bytes, written_to});
}
FOR_TESTS void fusedmoe_take_back() { regions().clear(); }

// From here on every launch may touch what it was given, and what was lent by then; nothing else.
FOR_TESTS void fusedmoe_watch() {
  fusedmoe::cuda::watch = {true, regions(), {}, {}};
  regions().clear();
}
FOR_TESTS void fusedmoe_watch_no_more() {
  fusedmoe::cuda::watch.settle();
  fusedmoe::cuda::watch.on = false;
}
// Of the launches since then: the name of one, or null; and by the place in the alphabet, what was
// read or written of a region, whose name is returned.
FOR_TESTS const char* fusedmoe_launched(uint64_t at) {
  const auto& kernels = fusedmoe::cuda::watch.kernels;
  return at < kernels.size() ? kernels[at].c_str() : nullptr;
}
FOR_TESTS const char* fusedmoe_moved(uint64_t at, uint64_t* read, uint64_t* written) {
  const auto& moved = fusedmoe::cuda::watch.moved;
  if (at >= moved.size()) return nullptr;
  const auto& [name, bytes] = *std::next(moved.begin(), ptrdiff_t(at));
  *read = bytes.first;
  *written = bytes.second;
  return name.c_str();
}
