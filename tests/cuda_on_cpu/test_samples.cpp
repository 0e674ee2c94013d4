// The sample kernels and every operation of csrc/cuda/device.h in the emulator, against plain
// loops.
//
//   test_samples samples         as FUSEDMOE_CUDA_SEED and FUSEDMOE_CUDA_COPIES say
//   test_samples operations      each operation of the device, to the bit
//   test_samples misuses         what CUDA leaves undefined is refused, each in its own words
#include <array>
#include <cstdio>
#include <map>

#include "floats.h"
#include "memory.h"
#include "checks.h"
#include "problem.h"
#include "samples.h"

namespace fusedmoe::cuda_on_cpu {
namespace {

using cuda::samples::Element;
using cuda::samples::Gemm;
using test::Guarded;
using test::Random;

[[noreturn]] void wrong(const std::string& what) { throw std::logic_error(what); }

void check_equal(uint64_t got, uint64_t expected, const std::string& what) {
  if (got != expected) wrong(what + ": expected " + std::to_string(expected) + ", got " + std::to_string(got));
}

// The rule of tests/cpp/expectation.h: twice the error of a plain loop in float, and 8 roundoffs of
// the largest number.
struct Sums {
  double worst = 0, plain = 0, largest = 0;

  void add(float ours, float loop, double truth) {
    worst = std::max(worst, std::isnan(ours) ? INFINITY : std::abs(ours - truth));
    plain = std::max(plain, std::abs(loop - truth));
    largest = std::max(largest, std::abs(truth));
  }
  void check(const std::string& what) const {
    const double allowed = 2 * plain + 8 * 0x1p-24 * largest;
    if (!(worst <= allowed))
      wrong(what + ": expected an error of at most " + std::to_string(allowed) + ", got " + std::to_string(worst));
  }
};

template <class T>
Guarded<T> draw(Random& random, int64_t count) {
  std::vector<T> numbers;
  while (count-- > 0) numbers.push_back(cuda::rounded<T>(float(random.normal())));
  return Guarded<T>(numbers);
}

// As multiply_add reads it.
template <class T>
float operand(T x) {
  if constexpr (sizeof(T) == 4)
    return cuda::word_as_float(cuda::rounded_tf32(x));
  else
    return cuda::widened(x);
}

template <class T>
void check_gemm(Gemm call, const std::string& what) {
  Random random(uint64_t(call.m * 1000 + call.n));
  const Guarded<T> a = draw<T>(random, int64_t(call.m) * call.k), b = draw<T>(random, int64_t(call.n) * call.k);
  Guarded<float> c(size_t(call.m) * call.n);
  c.fill(NAN);
  call.a = a.data();
  call.b = b.data();
  call.c = c.data();
  regions() = {{"a", call.a, sizeof(T) * call.m * call.k, false},
               {"b", call.b, sizeof(T) * call.n * call.k, false},
               {"c", call.c, sizeof(float) * call.m * call.n, true}};
  const Counts before = counts();
  cuda::samples::gemm(call, nullptr);
  const auto number_of_b = [&](int k, int column) {
    return operand(b.data()[call.turned ? k * call.n + column : column * call.k + k]);
  };
  Sums sums;
  for (int row = 0; row < call.m; row++)
    for (int column = 0; column < call.n; column++) {
      double truth = 0;
      float plain = 0;
      for (int k = 0; k < call.k; k++) {
        const float x = operand(a.data()[row * call.k + k]), y = number_of_b(k, column);
        truth += double(x) * y;
        plain += x * y;
      }
      sums.add(c.data()[row * call.n + column], plain, truth);
    }
  sums.check(what);
  if (!a.intact() || !b.intact() || !c.intact()) wrong(what + ": expected writes inside tensors, got some outside");
  // 64 products make a tile of 64 x 64 and 64 bytes of k. Each tile of a is read for every 64
  // columns, each of b for every 64 rows, and c is written once.
  const auto tiles = [](int size) { return uint64_t(size + 63) / 64; };
  const uint64_t steps = (call.k * sizeof(T) + 63) / 64;
  check_equal(regions()[0].bytes_read, regions()[0].bytes * tiles(call.n), what + ", bytes of a");
  check_equal(regions()[1].bytes_read, regions()[1].bytes * tiles(call.m), what + ", bytes of b");
  check_equal(regions()[2].bytes_written, regions()[2].bytes, what + ", bytes of c");
  check_equal(counts().matrix_products - before.matrix_products, tiles(call.m) * tiles(call.n) * steps * 64,
              what + ", matrix products");
  check_equal(counts().barriers - before.barriers, tiles(call.m) * tiles(call.n) * (steps + 2), what + ", barriers");
  check_equal(counts().bank_conflicts, before.bank_conflicts, what + ", bank conflicts");
  regions().clear();
}

void check_softmax(int rows, int n) {
  Random random(uint64_t(rows * 100 + n));
  const Guarded<float> from = draw<float>(random, int64_t(rows) * n);
  Guarded<float> to(size_t(rows) * n);
  cuda::samples::softmax(from.data(), to.data(), rows, n, nullptr);
  Sums sums;
  for (int row = 0; row < rows; row++) {
    const float* x = from.data() + row * n;
    double total = 0;
    float plain = 0;
    for (int i = 0; i < n; i++) total += std::exp(double(x[i])), plain += std::exp(x[i]);
    for (int i = 0; i < n; i++)
      sums.add(to.data()[row * n + n - 1 - i], std::exp(x[i]) / plain, std::exp(double(x[i])) / total);
  }
  sums.check("softmax of " + std::to_string(rows) + " rows of " + std::to_string(n));
}

int check_samples() {
  int checked = 0;
  for (const auto& [m, n, k] : {std::array{64, 64, 64}, {1, 8, 8}, {70, 72, 40}, {130, 16, 96}, {5, 200, 24}})
    for (int stages : {2, 3})
      for (bool turned : {false, true})
        for (Element element : {Element::bfloat16, Element::float16, Element::tf32}) {
          if (element == Element::tf32 && turned) continue;
          const Gemm call{element, stages, turned, nullptr, nullptr, nullptr, m, n, k};
          const std::string what = "gemm " + std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k) +
                                   ", element " + std::to_string(int(element)) + ", " + std::to_string(stages) +
                                   " stages" + (turned ? ", turned" : "");
          if (element == Element::bfloat16) check_gemm<cuda::bfloat16>(call, what);
          if (element == Element::float16) check_gemm<cuda::float16>(call, what);
          if (element == Element::tf32) check_gemm<float>(call, what);
          checked++;
        }
  for (const auto& [rows, n] : {std::array{1, 1}, {9, 32}, {40, 7}}) {
    check_softmax(rows, n);
    checked++;
  }
  return checked;
}

}  // namespace
}  // namespace fusedmoe::cuda_on_cpu

int main(int count, char** arguments) {
  using namespace fusedmoe::cuda_on_cpu;
  const std::map<std::string, int (*)()> all = {
      {"samples", check_samples}, {"operations", check_operations}, {"misuses", check_misuses}};
  const auto found = all.find(count == 2 ? arguments[1] : "");
  if (found == all.end()) {
    std::fprintf(stderr, "test_samples: expected one of samples, operations, misuses\n");
    return 2;
  }
  try {
    const int checked = found->second();
    std::printf("%d %s checked\n", checked, arguments[1]);
    return checked ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_samples: %s\n", error.what());
    return 1;
  }
}
