#include "network.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fusedmoe::cpu {

#if defined(__x86_64__)
namespace amx {
extern const Isa isa;
}
namespace avx512_bf16 {
extern const Isa isa;
}
namespace avx512 {
extern const Isa isa;
}
namespace avx2 {
extern const Isa isa;
}
#endif
namespace baseline {
extern const Isa isa;
}

#if defined(__x86_64__)
namespace {

// Whether the processor has AMX tiles of bfloat16 and the system lets this process use them.
bool amx_here() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
#if defined(__linux__)
  // Linux hands the 8 KB of tiles to a process that asks: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

std::vector<std::pair<const Isa*, bool>> isas() {
  std::vector<std::pair<const Isa*, bool>> result;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2_here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512_here = avx2_here && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool bf16_here = avx512_here && __builtin_cpu_supports("avx512bf16");
  result.emplace_back(&amx::isa, bf16_here && amx_here());
  result.emplace_back(&avx512_bf16::isa, bf16_here);
  result.emplace_back(&avx512::isa, avx512_here);
  result.emplace_back(&avx2::isa, avx2_here);
#endif
  result.emplace_back(&baseline::isa, true);
  return result;
}

namespace {

const Isa& choose() {
  const char* wanted = std::getenv("FUSEDMOE_ISA");
  std::string names;
  for (const auto& [isa, here] : isas()) {
    if (wanted ? std::strcmp(wanted, isa->name) == 0 : here) {
      if (!here)
        throw std::runtime_error(std::string("FUSEDMOE_ISA: expected an ISA of this processor, got '") + wanted + "'");
      return *isa;
    }
    names += std::string(names.empty() ? "" : ", ") + isa->name;
  }
  throw std::runtime_error("FUSEDMOE_ISA: expected one of " + names + ", got '" + wanted + "'");
}

// Memory of one thread, kept from call to call: it asks the system for no pages.
// Zeroed once, because the lanes that pad a panel are computed with, and what stands in fresh
// memory could be denormal and slow.
template <class T>
class Scratch {
 public:
  T* get(int64_t count) {
    if (count > count_) {
      size_t bytes = (size_t(count) * sizeof(T) + 4095) / 4096 * 4096;
      memory_.reset(static_cast<T*>(std::aligned_alloc(4096, bytes)));
      if (!memory_) {
        count_ = 0;
        throw std::runtime_error("cpu backend: expected " + std::to_string(bytes) +
                                 " bytes of memory for intermediate results, got none");
      }
      std::memset(memory_.get(), 0, bytes);
      count_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t count_ = 0;
};

template <class T>
T* thread_scratch(int64_t count) {
  thread_local Scratch<T> scratch;
  return scratch.get(count);
}
template <class T>
T* chunk_scratch(int64_t count) {
  thread_local Scratch<T> scratch;
  return scratch.get(count);
}

uint16_t* weight_scratch(int64_t count) {
  thread_local Scratch<uint16_t> scratch;
  return scratch.get(count);
}

// The gradients' tasks of every linear: this many rows of dW each, so that the threads end
// together; a multiple of every tile.
constexpr int64_t task_rows = 48;

std::vector<LinearTask> linear_tasks(const Plan& plan, const std::function<bool(int)>& wanted) {
  std::vector<LinearTask> tasks;
  for (const Span<const Stage*>& stages : plan.gradients) {
    const int64_t rows = stages[0]->n;
    const bool any = std::any_of(stages.begin(), stages.end(), [&](const Stage* stage) {
      return wanted(stage->weight) || (stage->bias >= 0 && wanted(stage->bias));
    });
    for (int64_t n = 0; n < rows && any; n += task_rows) tasks.push_back({stages, n, std::min(task_rows, rows - n)});
  }
  return tasks;
}

// Up to this many rows a frozen network runs few_rows at a time, each time over the packed weights
// again. Case "AdaTT T3m2, inference" of bench/, arm "fused, frozen", on a Sapphire Rapids: 0.80 (9
// rows) to 0.93 (24 rows) of the time of a block, and 1.18 of it for 32 rows.
constexpr int64_t packed_few_rows = 3 * few_rows;

}  // namespace

const Isa& chosen_isa() {
  static const Isa& isa = choose();
  return isa;
}

int64_t rows_of_block(int64_t rows, int64_t threads) {
  return std::clamp(int64_t(std::bit_ceil(uint64_t(rows / threads))), lane_multiple, block_rows);
}

template <class T>
void forward(const Plan& plan, const Call<T>& call, const ForEach& each) {
  const Kernels<T>& kernels = chosen_isa().kernels<T>(plan);
  const RunBlock<T> run = call.packed ? kernels.packed : kernels.forward,
                    few = call.packed ? kernels.packed_few : kernels.forward_few;
  if (call.rows <= (call.packed ? packed_few_rows : few_rows) && !plan.training && plan.linear && !call.drops && few) {
    each((call.rows + few_rows - 1) / few_rows, [&](int64_t part) {
      const int64_t row = part * few_rows, rows = std::min(few_rows, call.rows - row);
      few(plan, call, row, rows, thread_scratch<T>(forward_scratch(plan, rows)));
    });
    return;
  }
  each((call.rows + call.block - 1) / call.block, [&](int64_t block) {
    const int64_t row = block * call.block, rows = std::min(call.block, call.rows - row);
    run(plan, call, row, rows, thread_scratch<T>(forward_scratch(plan, rows)));
  });
}

template <class T>
void backward(const Plan& plan, Call<T> call, const ForEach& each) {
  const Kernels<T>& kernels = chosen_isa().kernels<T>(plan);
  const auto wanted = [&](int parameter) { return call.grads[parameter] != nullptr; };
  const std::vector<LinearTask> tasks = linear_tasks(plan, wanted);
  const auto zero = [&](int i) {
    if (wanted(i)) std::fill_n(call.grads[i], count_of(plan.graph.shapes[i]), T(0));
  };
  for (size_t i = 0; i < plan.graph.shapes.size() && call.rows == 0; i++) zero(int(i));
  for (int i : plan.plain) zero(i);
  const bool sums = std::any_of(plan.plain.begin(), plan.plain.end(), wanted);
  call.transposed_rows = std::min(chunk_rows, call.rows);
  call.chunk = leading(call.transposed_rows);
  const int64_t d_z = plan.d_z * call.chunk;
  call.d_z = chunk_scratch<T>(d_z + (tasks.empty() ? 0 : plan.transposed * call.transposed_rows));
  call.transposed = tasks.empty() ? nullptr : call.d_z + d_z;
  if (kernels.transpose_weight) {
    call.transposed_weights = weight_scratch(plan.transposed_weights);
    each(plan.linears.count, [&](int64_t i) { kernels.transpose_weight(plan, call, *plan.linears[i]); });
  }
  for (int64_t first = 0; first < call.rows; first += chunk_rows) {
    const int64_t chunk = std::min(chunk_rows, call.rows - first);
    each((chunk + call.block - 1) / call.block, [&](int64_t block) {
      const int64_t row = first + block * call.block, rows = std::min(call.block, call.rows - row);
      kernels.backward(plan, call, row, rows, thread_scratch<T>(backward_scratch(plan, rows)));
    });
    each(int64_t(tasks.size()), [&](int64_t i) { kernels.linear_gradient(plan, call, tasks[i], chunk, first == 0); });
    if (sums) kernels.row_sums(plan, call, chunk);
  }
}

template void forward(const Plan&, const Call<float>&, const ForEach&);
template void forward(const Plan&, const Call<double>&, const ForEach&);
template void backward(const Plan&, Call<float>, const ForEach&);
template void backward(const Plan&, Call<double>, const ForEach&);

}  // namespace fusedmoe::cpu
