// samples.h's operations, word for word, by the formulas of csrc/cuda/device.h.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "floats.h"
#include "checks.h"
#include "samples.h"

namespace fusedmoe::cuda_on_cpu {
namespace {

using namespace fusedmoe::cuda;

// What somebody else computed.
void read(const char* name, std::vector<uint32_t>& words) {
  std::ifstream file(name, std::ios::binary);
  file.read(reinterpret_cast<char*>(words.data()), std::streamsize(4 * words.size()));
  if (!file) throw std::logic_error(std::string(name) + ": expected " + std::to_string(words.size()) + " words");
}

// What every lane expects next.
class Expected {
 public:
  explicit Expected(const std::vector<uint32_t>& got) : got_(got) {}

  template <class F>
  void word(F of_lane, const char* what) {
    for (int lane = 0; lane < 32; lane++) {
      const uint32_t expected = of_lane(lane), got = got_[size_t(32 * at_ + lane)];
      if (got != expected)
        throw std::logic_error(std::string(what) + ", word " + std::to_string(at_) + ", lane " + std::to_string(lane) +
                               ": expected " + std::to_string(expected) + ", got " + std::to_string(got));
    }
    at_++;
  }
  template <class F>
  void number(F of_lane, const char* what) {
    word([&](int lane) { return float_as_word(of_lane(lane)); }, what);
  }
  int words() const { return at_; }

 private:
  const std::vector<uint32_t>& got_;
  int at_ = 0;
};

float own(int lane) { return float(lane) + 0.1f; }

void check_exchange(Expected& e, const std::vector<uint32_t>& from) {
  e.word([](int l) { return uint32_t(l + 10000 + 1000000); }, "places");
  e.number([](int l) { return own(l * 7 % 32); }, "shuffle");
  e.number([](int l) { return own(l ^ 5); }, "shuffle_xor");
  e.number([](int l) { return own(l + 9 < 32 ? l + 9 : l); }, "shuffle_down");
  e.word([&](int l) { return from[size_t(31 - l)]; }, "shuffle of words");
  e.word([](int l) { return uint32_t(-(l ^ 16)); }, "shuffle_xor of integers");
  e.word([](int l) { return uint32_t(-(l < 31 ? l + 1 : l)); }, "shuffle_down of integers");
  e.number(
      [](int l) {
        const auto half = [](int lane) { return own(lane) + own(lane ^ 4); };
        const auto quarter = [&](int lane) { return half(lane) + half(lane ^ 2); };
        return quarter(l) + quarter(l ^ 1);
      },
      "sum_lanes");
  e.number([](int) { return own(31); }, "max_lanes");
}

void check_copies(Expected& e, const std::vector<uint32_t>& from) {
  e.word([&](int l) { return l % 2 ? from[size_t(l)] : 0; }, "copy_async<4>");
  for (int i = 0; i < 2; i++)
    e.word([&](int l) { return l % 2 || i == 0 ? from[size_t(2 * l + i)] : 0; }, "copy_async<8>");
}

// Row r of matrix m is words 4 (8 m + r) to 4 (8 m + r) + 3, which copy_async<16> left out where r
// is even.
void check_matrices(Expected& e, const std::vector<uint32_t>& from) {
  const auto number = [&](int matrix, int row, int column) {
    const int line = 8 * matrix + row;
    const uint32_t word = line % 2 ? from[size_t(4 * line + column / 2)] : 0;
    return word >> 16 * (column % 2) & 0xffff;
  };
  for (bool transposed : {false, true})
    for (int count : {1, 2, 4})
      for (int matrix = 0; matrix < count; matrix++)
        e.word(
            [&](int l) {
              const int line = l / 4, first = l % 4 * 2;
              return transposed ? number(matrix, first, line) | number(matrix, first + 1, line) << 16
                                : number(matrix, line, first) | number(matrix, line, first + 1) << 16;
            },
            "load_matrices");
}

void check_conversions(Expected& e, const std::vector<uint32_t>& from) {
  e.number([](int l) { return widened(rounded<bfloat16>(own(l))); }, "bfloat16");
  e.number([](int l) { return float(_Float16(own(l))); }, "float16");
  e.word([](int l) { return rounded<bfloat16>(own(l)).bits | uint32_t(rounded<bfloat16>(-own(l)).bits) << 16; },
         "pair of bfloat16");
  e.word([](int l) { return rounded<float16>(own(l)).bits | uint32_t(rounded<float16>(-own(l)).bits) << 16; },
         "pair of float16");
  e.number([&](int l) { return widened(bfloat16{uint16_t(from[size_t(l)])}); }, "low");
  e.number([&](int l) { return widened(bfloat16{uint16_t(from[size_t(l)] >> 16)}); }, "high");
  e.number([&](int l) { return widened(float16{uint16_t(from[size_t(l)])}); }, "low");
  e.number([&](int l) { return widened(float16{uint16_t(from[size_t(l)] >> 16)}); }, "high");
  e.word([](int l) { return rounded_tf32(own(l)); }, "tf32");
  for (int i = 0; i < 4; i++) e.word([&](int l) { return from[size_t(4 * l + i)]; }, "a vector");
}

// C [r][column] for r = l / 4 + 8 (i / 2) and column = 2 (l % 4) + i % 2, from words as the lanes
// brought them.
template <class T>
void check_product(Expected& e, const std::vector<uint32_t>& from) {
  const auto number = [](uint32_t word, int half) {
    if constexpr (sizeof(T) == 2) return half ? high<T>(word) : low<T>(word);
    return word_as_float(word & 0xffff0000);
  };
  // For a column k of A: in which word, quad and half it is.
  const auto a = [&](int row, int k) {
    const int numbers = 4 / int(sizeof(T)), word = row / 8 + 2 * (k / (4 * numbers)),
              lane = row % 8 * 4 + k % (4 * numbers) / numbers;
    return number(from[size_t(32 * word + lane) % 256], k % numbers);
  };
  const auto b = [&](int k, int column) {
    const int numbers = 4 / int(sizeof(T)), word = k / (4 * numbers), lane = column * 4 + k % (4 * numbers) / numbers;
    return number(from[size_t(32 * word + lane + 128) % 256], k % numbers);
  };
  for (int i = 0; i < 4; i++)
    e.number(
        [&](int l) {
          float sum = float(l - 8 * i);
          for (int k = 0; k < (sizeof(T) == 2 ? 16 : 8); k++)
            sum += a(l / 4 + 8 * (i / 2), k) * b(k, 2 * (l % 4) + i % 2);
          return sum;
        },
        "multiply_add");
}

// kat_vectors of Random123, "philox4x32 10".
void check_philox(Expected& e) {
  constexpr uint32_t answers[3][4] = {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                                      {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                                      {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
  for (int i = 0; i < 4; i++) e.word([&](int l) { return answers[l % 3][i]; }, "philox");
}

// Every float16, and floats around each and half way to the next, against the compiler's own
// conversion.
int check_float16() {
  const auto check = [](float x) {
    const _Float16 theirs = _Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &theirs, 2);
    const uint16_t ours = rounded<float16>(x).bits;
    if (x == x ? ours != bits : (ours & 0x7fff) <= 0x7c00)
      throw std::logic_error("float16 of " + std::to_string(x) + ": expected " + std::to_string(bits));
  };
  for (uint32_t i = 0; i < 65536; i++) {
    const float x = widened(float16{uint16_t(i)}), next = widened(float16{uint16_t(i + 1)});
    const uint16_t bits = uint16_t(i);
    _Float16 theirs;
    std::memcpy(&theirs, &bits, 2);
    if (x == x && float_as_word(x) != float_as_word(float(theirs)))
      throw std::logic_error("float16 " + std::to_string(i) + ": expected another float");
    const float middle = std::isfinite(next) ? (x + next) / 2 : x;
    for (float y : {x, middle, std::nextafter(middle, x), std::nextafter(middle, next)}) check(y);
  }
  return 65536;
}

}  // namespace

int check_operations() {
  const std::vector<uint32_t> from = cuda::samples::operation_input();
  std::vector<uint32_t> to(32 * cuda::samples::operation_words, 0x7fffffff);
  if (const char* file = std::getenv("FUSEDMOE_OPERATIONS"))
    read(file, to);
  else
    cuda::samples::operations(from.data(), to.data(), nullptr);
  Expected e(to);
  check_exchange(e, from);
  check_copies(e, from);
  check_matrices(e, from);
  check_conversions(e, from);
  check_product<bfloat16>(e, from);
  check_product<float16>(e, from);
  check_product<float>(e, from);
  check_philox(e);
  if (e.words() != cuda::samples::operation_words)
    throw std::logic_error("expected a check of every word, got " + std::to_string(e.words()));
  check_float16();
  return e.words();
}

}  // namespace fusedmoe::cuda_on_cpu
