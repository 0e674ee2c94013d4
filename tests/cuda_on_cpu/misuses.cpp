#include "checks.h"

#include <array>
#include <span>

#include "cuda/device.h"

namespace fusedmoe::cuda {
namespace {

using cuda_on_cpu::Error, cuda_on_cpu::fail, cuda_on_cpu::settings;

// Global memory of every kernel here: numbers from 0 on.
using Numbers = const uint32_t*;

// And what they may write to.
float sums[8];
int arrived[2];

struct Misuse {
  const char* words;  // of the error
  Shape shape;
  void (*kernel)(Numbers from);
};

// A copy of 16 bytes into shared memory by every lane.
void copy_line(Numbers from) { copy_async<16>(shared_memory<uint32_t>() + 4 * thread(), from + 4 * thread()); }

// Lanes one after another would wait for ever for one that went elsewhere: each of these says so
// instead.
const Misuse divergences[] = {
    {"divergent barrier: expected every thread at one barrier", {1, 1, 64},
     [](Numbers) {
       if (warp() == 0)
         sync_block();
       else
         sync_block();
     }},
    {"early return: expected every thread at the barrier", {1, 1, 64},
     [](Numbers) {
       if (thread() == 5) return;
       sync_block();
     }},
    {"early return: expected every thread at the barrier", {1, 1, 64},
     [](Numbers) {
       if (warp() == 1) return;
       sync_block();
     }},
    {"early return: expected the whole warp at shuffle_xor", {1, 1, 32},
     [](Numbers) {
       if (lane() < 8) return;
       shuffle_xor(1, 16);
     }},
    {"early return: expected the whole warp at sync_warp", {1, 1, 32},
     [](Numbers) {
       if (lane() == 31) return;
       sync_warp();
     }},
    {"divergent warp: expected the whole warp at shuffle_", {1, 1, 32},
     [](Numbers) {
       if (lane() < 16)
         shuffle_down(1, 1);
       else
         shuffle_xor(1, 1);
     }},
    {"divergent warp: expected the whole warp at shuffle_xor", {1, 1, 32},
     [](Numbers) {
       if (lane() < 16)
         shuffle_xor(1, 1);
       else
         shuffle_xor(1, 1);
     }},
    {"divergent warp: expected the whole warp at sync_warp", {1, 1, 32},
     [](Numbers) {
       if (lane() % 2)
         sync_block();
       else
         sync_warp();
     }},
    // As many turns as a thread has numbers.
    {"divergent warp: expected the whole warp at shuffle_xor", {1, 1, 32},
     [](Numbers) {
       for (int i = 0; i < 1 + lane() / 30; i++) shuffle_xor(i, 1);
       sync_block();
     }},
};

const Misuse addresses[] = {
    {"misaligned load_matrices: expected an address at a multiple of 16 bytes", {1, 1, 32, 1024},
     [](Numbers) {
       uint32_t to[1];
       load_matrices<1>(to, shared_memory<char>() + 20 * (lane() % 8));
     }},
    {"outside: expected load_matrices of 16 bytes inside shared memory, got byte 512 of it", {1, 1, 32, 520},
     [](Numbers) {
       uint32_t to[4];
       load_matrices<4>(to, shared_memory<char>() + 16 * (lane() + 1));
     }},
    {"outside: expected copy_async of 16 bytes inside shared memory, got byte 496 of it", {1, 1, 32, 508},
     [](Numbers from) {
       copy_line(from);
       sync_block();
     }},
    {"misaligned copy_async: expected an address at a multiple of 16 bytes", {1, 1, 32, 1024},
     [](Numbers from) {
       if (lane() == 9) copy_async<16>(shared_memory<uint32_t>() + 9, from);
     }},
    {"misaligned source of copy_async: expected an address at a multiple of 8 bytes", {1, 1, 32, 1024},
     [](Numbers from) {
       if (lane() == 9) copy_async<8>(shared_memory<char>(), from + 9);
     }},
    {"outside: expected copy_async of 4 bytes inside shared memory", {1, 1, 32, 1024},
     [](Numbers from) {
       uint32_t own;
       copy_async<4>(&own, from);
     }},
    {"expected copy_async of 0 to 16 bytes, got 17", {1, 1, 32, 1024},
     [](Numbers from) { copy_async<16>(shared_memory<char>() + 16 * lane(), from, 17); }},
};

const Misuse global_memory[] = {
    {"misaligned load: expected an address at a multiple of 16 bytes",
     {1, 1, 32},
     [](Numbers from) { load_global(reinterpret_cast<const Vector<uint32_t, 4>*>(from + lane())); }},
    {"outside: expected a load inside a tensor, got 4 bytes at byte 1024 of numbers, which has 1024",
     {1, 1, 32},
     [](Numbers from) { load_global(from + 225 + lane()); }},
    {"outside: expected a load inside a tensor, got 16 bytes at byte 1024 of numbers",
     {1, 1, 32, 1024},
     [](Numbers from) {
       if (lane() == 0) copy_async<16>(shared_memory<char>(), from + 256);
     }},
    {"outside: expected no store into numbers",
     {1, 1, 32},
     [](Numbers from) { store_global(const_cast<uint32_t*>(from), 1u); }},
    {"race: expected a store to what no other block writes, got byte 4 of sums",
     {3, 1, 32},
     [](Numbers) {
       if (lane() == 7) store_global(sums + 1, 1.0f);
     }},
    {"race: expected a load of what no other block writes, got byte",
     {2, 1, 32},
     [](Numbers) {
       if (lane() > 0) return;
       store_global(sums + block_x(), 1.0f);
       load_global(sums + 1 - block_x());
     }},
    {"race: expected a load of what no other block writes, got byte",
     {2, 1, 32},
     [](Numbers) {
       if (lane() > 0) return;
       // Too late for whoever comes next.
       const bool last = arrive(arrived) % 2 == 1;
       store_global(sums + block_x(), 1.0f);
       if (last) load_global(sums + 1 - block_x());
     }},
};

const Misuse left_over[] = {
    {"expected copies to be committed before the thread returns", {1, 1, 32, 512},
     [](Numbers from) {
       copy_line(from);
       wait_copies<0>();
     }},
    {"expected copies to be waited for before the thread returns", {1, 1, 32, 512},
     [](Numbers from) {
       copy_line(from);
       commit_copies();
       wait_copies<1>();
     }},
#if !defined(__SANITIZE_ADDRESS__)
    // AddressSanitizer stops the program instead.
    {"expected writes inside the 36 bytes of shared memory, got one 0 bytes behind them", {1, 1, 32, 36},
     [](Numbers) {
       if (lane() == 3) shared_memory<volatile char>()[36] = 0;
     }},
    {"expected writes inside the 36 bytes of shared memory, got one 4 bytes in front of them", {1, 1, 32, 36},
     [](Numbers) {
       if (lane() == 3) shared_memory<volatile char>()[-4] = 0;
     }},
#endif
};

const Misuse shapes[] = {
    {"expected a multiple of 32 threads, at most 1024, got 48", {1, 1, 48}, [](Numbers) {}},
    {"expected a multiple of 32 threads, at most 1024, got 1056", {1, 1, 1056}, [](Numbers) {}},
    {"expected a grid of 1 to 2147483647 by 65535", {1, 70000, 32}, [](Numbers) {}},
    {"expected a grid of 1 to 2147483647 by 65535", {0, 1, 32}, [](Numbers) {}},
    {"expected at most 232448 bytes of shared memory, got 232449", {1, 1, 32, 232449}, [](Numbers) {}},
};

// What must hold of a kernel that errs in nothing.
const Misuse proper[] = {
    {"shared memory that nobody wrote is no number", {3, 1, 64, 256},
     [](Numbers) {
       float& own = shared_memory<float>()[thread()];
       if (own == own) fail({}, "got one");
       own = 1;
     }},
    {"an early return after the last barrier", {2, 1, 128},
     [](Numbers) {
       sync_block();
       if (warp() % 2) return;
       shuffle_xor(1.0f, 8);
     }},
    {"copies arrive with their group, at the latest", {1, 1, 32, 1536},
     [](Numbers from) {
       uint32_t* to = shared_memory<uint32_t>() + 4 * lane();
       for (int group = 0; group < 3; group++) {
         copy_async<16>(to + 128 * group, from + 4 * lane());
         commit_copies();
       }
       const auto there = [&](int group) { return to[128 * group] == uint32_t(4 * lane()); };
       const auto late = [&](int group) { return settings().eager == there(group); };
       wait_copies<3>();
       if (!late(0)) fail({}, "expected the first group to come when it is waited for");
       wait_copies<1>();
       if (!there(0) || !there(1) || !late(2)) fail({}, "expected two groups of three");
       wait_copies<0>();
       if (!there(2)) fail({}, "expected the last group");
     }},
    {"zeros for what a copy does not give", {1, 1, 32, 512},
     [](Numbers from) {
       char* to = shared_memory<char>() + 16 * lane();
       copy_async<16>(to, from + 4 * lane(), lane() % 17);
       commit_copies();
       wait_copies<0>();
       for (int i = 0; i < 16; i++)
         if (to[i] != (i < lane() % 17 ? reinterpret_cast<const char*>(from + 4 * lane())[i] : 0))
           fail({}, "expected zeros behind it");
     }},
    {"groups without copies count", {1, 1, 32, 512},
     [](Numbers from) {
       copy_line(from);
       commit_copies();
       commit_copies();
       wait_copies<1>();
       if (shared_memory<uint32_t>()[4 * lane()] != uint32_t(4 * lane()))
         fail({}, "expected what the first group brought");
     }},
    {"as many threads and as much shared memory as there can be", {2, 1, 1024, 232448},
     [](Numbers) {
       char* all = shared_memory<char>();
       for (int i = thread(); i < 232448; i += 1024) all[i] = char(i / 7);
       sync_block();
       for (int i = 1023 - thread(); i < 232448; i += 1024)
         if (all[i] != char(i / 7)) fail({}, "expected what another thread wrote");
     }},
};

// And of what orders memory.
const Misuse ordered[] = {
    {"who comes last sees what was stored before", {8, 1, 32},
     [](Numbers) {
       if (lane() > 0) return;
       store_global(sums + block_x(), float(block_x()));
       if (arrive(arrived + 1) % 8 < 7) return;
       for (int i = 0; i < 8; i++)
         if (load_global(sums + i) != float(i)) fail({}, "expected what each block stored");
     }},
    {"what one barrier orders, in both directions", {4, 1, 96, 384},
     [](Numbers) {
       int* all = shared_memory<int>();
       for (int round = 0; round < 5; round++) {
         all[thread()] = 1000 * round + thread();
         sync_block();
         const int other = (thread() * 37 + round) % 96;
         if (all[other] != 1000 * round + other) fail({}, "expected this round's number");
         sync_block();
       }
     }},
};

void run(const Misuse& misuse, Numbers from) { launch("kernel", misuse.kernel, misuse.shape, nullptr, from); }

void check_refused(const Misuse& misuse, Numbers from) {
  std::string said = "nothing";
  try {
    run(misuse, from);
  } catch (const Error& error) {
    said = error.what();
  }
  if (said.find(misuse.words) == std::string::npos)
    throw std::logic_error(std::string("expected \"") + misuse.words + "\", got " + said);
}

}  // namespace
}  // namespace fusedmoe::cuda

namespace fusedmoe::cuda_on_cpu {

int check_misuses() {
  using namespace fusedmoe::cuda;
  alignas(16) std::array<uint32_t, 256> numbers;
  for (uint32_t i = 0; i < numbers.size(); i++) numbers[i] = i;
  int checked = 0;
  regions() = {{"numbers", numbers.data(), sizeof numbers, false},
               {"sums", sums, sizeof sums, true},
               {"arrived", arrived, sizeof arrived, true}};
  const Settings before = settings();
  for (uint64_t seed = 0; seed < 4; seed++)
    for (bool eager : {false, true}) {
      settings() = {seed, eager};
      for (std::span<const Misuse> misuses :
           std::initializer_list<std::span<const Misuse>>{divergences, addresses, global_memory, left_over, shapes})
        for (const Misuse& misuse : misuses) check_refused(misuse, numbers.data()), checked++;
      // After so many errors, and among them.
      for (std::span<const Misuse> kernels : std::initializer_list<std::span<const Misuse>>{proper, ordered})
        for (const Misuse& each : kernels) run(each, numbers.data()), checked++;
    }
  settings() = before;
  regions().clear();
  return checked;
}

}  // namespace fusedmoe::cuda_on_cpu
