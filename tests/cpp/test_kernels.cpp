// The kernels against plain loops, on every case of a file of tables.py, in float, double and
// bfloat16, plain, packed and recomputed.
//
//   test_kernels isas             names the ISAs of this build that this processor has
//   test_kernels FILE accuracy    prints the errors of the activations, in the units of accuracy.h
//   test_kernels FILE [ROWS]      runs every check under the ISA that FUSEDMOE_ISA names, on cases
//                                 of at most ROWS rows
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <thread>

#include "accuracy.h"
#include "expectation.h"
#include "kernels.h"

namespace fusedmoe::test {
namespace {

// What is being checked, for whoever has to report a failure.
std::string current;

[[noreturn]] void fail(const std::string& message) { throw std::logic_error(message); }

std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.2e", value);
  return digits;
}

void check_close(const Named& ours, const std::map<std::string, Expected>& expected, Size kind, const char* what) {
  for (const auto& [name, values] : ours) {
    const Expected& e = expected.at(name);
    const double worst = error(values, e.truth, kind);
    if (!(worst <= e.allowed))
      fail(std::string(what) + ", " + name + ": expected an error of at most " + text(e.allowed) + ", got " +
           text(worst));
  }
}

template <class T>
void check_same(const std::vector<T>& ours, const std::vector<T>& others, const std::string& what) {
  if (ours.size() != others.size())
    fail(what + ": expected " + std::to_string(others.size()) + " numbers, got " + std::to_string(ours.size()));
  for (size_t i = 0; i < ours.size(); i++)
    if (std::memcmp(&ours[i], &others[i], sizeof(T)))
      fail(what + ": expected the same bits, got others at " + std::to_string(i));
}

// Bits of all results but those that one of the runs was not asked for.
template <class T>
void check_same(const Results<T>& ours, const Results<T>& others, const std::string& what) {
  const auto same = [&](const std::vector<T>& a, const std::vector<T>& b, const std::string& name) {
    if (!a.empty() && !b.empty()) check_same(a, b, what + ", " + name);
  };
  same(ours.out, others.out, "out");
  same(ours.weights, others.weights, "weights");
  same(ours.d_x, others.d_x, "d_x");
  for (size_t i = 0; i < std::min(ours.grads.size(), others.grads.size()); i++)
    same(ours.grads[i], others.grads[i], "gradient of parameter " + std::to_string(i));
}

template <class T>
Problem<T> rows_of(const Problem<T>& given, int64_t first, int64_t count) {
  const auto part = [&](const std::vector<T>& values) {
    const int64_t width = int64_t(values.size()) / given.rows;
    return std::vector<T>(values.begin() + first * width, values.begin() + (first + count) * width);
  };
  return {given.graph,   count,        given.expanded,    given.bf16,
          part(given.x), given.params, part(given.d_out), part(given.d_weights)};
}

// Fill the kernels' own memory with NaN, so that a number of an earlier call that is read shows.
template <class T>
void poison(Problem<T> given) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  given.rows = (given.rows + cpu::block_rows - 1) / cpu::block_rows * cpu::block_rows;
  given.x.assign(given.rows * given.graph.inputs[0].slots * given.graph.inputs[0].width, nan);
  given.d_out.assign(given.rows * count_of(given.graph.output), nan);
  given.d_weights.assign(given.rows * given.graph.mixing, nan);
  Request request;
  for (bool training : {false, true}) {
    request.training = training;
    run(given, request);
  }
}

template <class T>
Results<T> check_parity(const Problem<T>& given, const std::map<std::string, Expected>& expected) {
  poison(given);
  const Results<T> whole = run(given);
  check_close(named(whole), expected, size_kind(given.graph, given.bf16), "training");
  Request request;
  request.training = false;
  poison(given);
  const Results<T> inference = run(given, request);
  for (size_t i = 0; i < whole.grads.size(); i++)
    if (whole.grads[i].empty() == given.graph.live[i]) fail("expected gradients of the live parameters alone");
  check_same(inference, whole, "inference against training");
  return whole;
}

// Less asked for, another layout of x: the same bits.
template <class T>
void check_requests(const Problem<T>& given, const Results<T>& whole) {
  Request request;
  request.spread = true;
  check_same(run(given, request), whole, "x with gaps");
  request.d_x = request.weights = false;
  check_same(run(given, request), whole, "without d_x");
  request.training = false;
  check_same(run(given, request), whole, "inference without mixing weights");
  // bfloat16 has no packed form.
  request.packed = !given.bf16;
  check_same(run(given, request), whole, "inference from packed parameters");
  request = {};
  request.recompute = true;
  check_same(run(given, request), whole, "recomputed");
  request.gradient = [](int) { return false; };
  check_same(run(given, request), whole, "d_x alone");
  for (int part : {0, 1, 2}) {
    request.gradient = [=](int i) { return i % 3 == part; };
    check_same(run(given, request), whole, "a third of the gradients");
  }
  Problem<T> still = given;
  still.d_weights.assign(given.d_weights.size(), 0);
  const Results<T> zeros = run(still);
  request = {};
  request.d_weights = false;
  Results<T> without = run(given, request);
  // -0 + 0 is 0, so these may differ in the sign of a zero.
  for (auto& [name, values] : named(without))
    if (values != named(zeros).at(name)) fail("without d_weights, " + name + ": expected what zeros give");
  Problem<T> none = rows_of(given, 0, 0);
  for (const auto& grad : run(none).grads)
    for (T value : grad)
      if (value != 0) fail("no rows: expected gradients of zero");
}

// The work in other orders and on threads: the same bits, gradients of parameters included.
template <class T>
void check_orders(const Problem<T>& given, const Results<T>& whole) {
  Request request;
  request.each = [](int64_t count, const std::function<void(int64_t)>& body) {
    for (int64_t i = count; i-- > 0;) body(i);
  };
  check_same(run(given, request), whole, "backwards");
  for (int workers : {2, 5}) {
    request.threads = workers;
    request.each = [=](int64_t count, const std::function<void(int64_t)>& body) {
      std::atomic<int64_t> next{0};
      std::vector<std::thread> threads;
      for (int i = 0; i < workers; i++) threads.emplace_back([&] {
        for (int64_t j = next++; j < count; j = next++) body(j);
      });
      for (std::thread& thread : threads) thread.join();
    };
    check_same(run(given, request), whole, std::to_string(workers) + " threads");
  }
}

// A row's bits do not depend on the batch that it comes in.
template <class T>
void check_batches(const Problem<T>& given, const Results<T>& whole) {
  for (int64_t count : {1, 2, 3, 5, 8, 9, 16, 17, 33, 257}) {
    // What is dropped goes by the row's number in its batch.
    if (count >= given.rows || drops(given.graph)) break;
    for (int64_t first : {int64_t(0), given.rows - count}) {
      const Problem<T> part = rows_of(given, first, count);
      Results<T> rows;
      const auto of = [&](const std::vector<T>& values) {
        const int64_t width = int64_t(values.size()) / given.rows;
        return std::vector<T>(values.begin() + first * width, values.begin() + (first + count) * width);
      };
      rows = {of(whole.out), of(whole.weights), of(whole.d_x), {}};
      Request request;
      check_same(run(part, request), rows, std::to_string(count) + " rows from " + std::to_string(first));
      request.training = false;
      check_same(run(part, request), rows,
                 "inference of " + std::to_string(count) + " rows from " + std::to_string(first));
    }
  }
}

// The truth's own gradients against differences of its loss: (L(p + h v) - L(p - h v)) / 2 h for a
// random direction v of every tensor. Halving h shows how far the difference is off: by as much as
// it changes, and by the roundoff of L.
void check_truth(const Problem<double>& given) {
  const double h = std::cbrt(roundoff<double>);
  Plain<double> truth(given);
  const Results<double> results = truth.run();
  // No gradient goes through them.
  const std::vector<std::vector<double>> detached = truth.detached();
  Random random(7);
  for (int i = -1; i < int(given.params.size()); i++) {
    const std::vector<double>& gradient = i < 0 ? results.d_x : results.grads[i];
    if (gradient.empty()) continue;
    std::vector<double> direction;
    double slope = 0;
    for (double d : gradient) {
      direction.push_back(random.normal());
      slope += d * direction.back();
    }
    const auto difference = [&](double step) {
      std::pair<double, double> ends[2];
      for (int side : {0, 1}) {
        Problem<double> moved = given;
        std::vector<double>& values = i < 0 ? moved.x : moved.params[i];
        for (size_t j = 0; j < values.size(); j++) values[j] += (side ? step : -step) * direction[j];
        ends[side] = Plain<double>(moved).loss(&detached);
      }
      return std::pair{(ends[1].first - ends[0].first) / (2 * step), 8 * roundoff<double> * ends[1].second / step};
    };
    const auto [wide, ignored] = difference(2 * h);
    const auto [narrow, noise] = difference(h);
    if (!(std::abs(narrow - slope) <= std::abs(wide - narrow) + noise))
      fail("the truth's gradient " + std::to_string(i) + ": expected " + text(narrow) + " by differences, got " +
           text(slope));
  }
}

template <class T>
void check(const Problem<T>& given, const std::map<std::string, double>& plain) {
  const Results<T> whole = check_parity(given, expectation(given, plain));
  check_requests(given, whole);
  check_orders(given, whole);
  check_batches(given, whole);
}

// Points a binade: a few thousand for the report, fewer for the check, which emulators run too.
constexpr int report_points = 4096, check_points = 128;

// The rule of expectation.h with nothing for a rival: 8 roundoffs.
template <class T>
void check_activations(const std::vector<Case>& cases, const char* type) {
  current = std::string("activations, ") + type;
  const std::vector<Accuracy> all = accuracy<T>(cases, check_points);
  for (size_t act = 0; act < all.size(); act++)
    if (!(all[act].value <= 8) || !(all[act].slope <= 8))
      fail(activations[act] + ": expected errors of at most 8 roundoffs, got " + text(all[act].value) +
           " and, of the derivative, " + text(all[act].slope));
  if (const std::string fault = special_values<T>(cases); !fault.empty()) fail(fault);
}

void report_accuracy(const std::vector<Case>& cases) {
  const auto single = accuracy<float>(cases, report_points), twice = accuracy<double>(cases, report_points);
  std::printf("            float: value   slope   double: value   slope\n");
  for (size_t i = 0; i < activations.size(); i++)
    std::printf("%-10s %14.2f %7.2f %15.2f %7.2f\n", activations[i].c_str(), single[i].value, single[i].slope,
                twice[i].value, twice[i].slope);
}

void on_fault(int) {
  const std::string message = "test_kernels: " + current + ": memory was touched behind a tensor\n";
  if (write(STDERR_FILENO, message.data(), message.size())) _exit(1);
}

int check_all(const std::vector<Case>& cases, int64_t rows) {
  check_activations<float>(cases, "float");
  check_activations<double>(cases, "double");
  int count = 0;
  for (const Case& c : cases) {
    if (c.rows > rows || c.rows == 0) continue;
    current = c.name;
    Case few = c;
    few.rows = std::min<int64_t>(c.rows, 3);
    check_truth(problem(few));
    const Problem<double> given = problem(c);
    const Problem<float> rounded = convert<float>(given);
    const auto plain = plain_errors(rounded);
    current = c.name + ", float";
    check(rounded, plain);
    current = c.name + ", double";
    check(given, plain);
    current = c.name + ", bfloat16";
    const Problem<float> bf16 = halved(rounded);
    check(bf16, plain_errors(bf16));
    count++;
  }
  return count;
}

}  // namespace
}  // namespace fusedmoe::test

int main(int count, char** arguments) {
  using namespace fusedmoe;
  try {
    if (count == 2 && std::string(arguments[1]) == "isas") {
      for (const auto& [isa, here] : cpu::isas())
        if (here) std::printf("%s\n", isa->name);
      return 0;
    }
    if (count < 2) throw std::invalid_argument("expected the file that tables.py writes, got nothing");
    const std::vector<test::Case> cases = test::read_cases(arguments[1]);
    if (count == 3 && std::string(arguments[2]) == "accuracy") {
      test::report_accuracy(cases);
      return 0;
    }
    // A sanitizer has a report of its own.
    if (!test::heap) std::signal(SIGSEGV, test::on_fault), std::signal(SIGBUS, test::on_fault);
    const int64_t rows = count == 3 ? std::stoll(arguments[2]) : std::numeric_limits<int64_t>::max();
    const int checked = test::check_all(cases, rows);
    std::printf("%s: %d cases checked\n", cpu::chosen_isa().name, checked);
    return checked ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_kernels: %s: %s\n", test::current.c_str(), error.what());
    return 1;
  }
}
