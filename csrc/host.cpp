#include "host.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace fusedmoe {

namespace {

// A process uses few tables; past the limit all are dropped, and those that are in use are planned
// again. Each route of a call is one.
constexpr size_t plan_limit = 1024;
constexpr int kinds = 16;

// The texts that were bound, by their number, and the numbers by the texts.
struct Bound {
  std::mutex mutex;
  std::vector<std::string> texts;
  std::unordered_map<std::string, size_t> numbers;
};
Bound& bound() {
  static Bound instance;
  return instance;
}
constexpr char mark = '@';  // no text begins with it

// The text of a handle; a text is its own.
std::string text_of(const std::string& table) {
  if (table.empty() || table[0] != mark) return table;
  size_t number = 0;
  auto [end, error] = std::from_chars(table.data() + 1, table.data() + table.size(), number);
  std::lock_guard<std::mutex> lock(bound().mutex);
  if (error != std::errc() || end != table.data() + table.size() || number >= bound().texts.size())
    throw std::invalid_argument("table: expected an encoded table, or the handle of one that this process bound");
  return bound().texts[number];
}

// The graph of a table's text or handle, cut down to the route whose words may follow.
Graph graph_of(const std::string& table) {
  const size_t at = table.find(" route ");
  Graph graph = decode(text_of(table.substr(0, at)));
  if (at != table.npos) take_route(graph, table.substr(at + 1));
  return graph;
}

std::shared_ptr<const Planned> make_planned(const std::string& table, cpu::PlanKind kind) {
  auto result = std::make_shared<Planned>();
  result->plan = cpu::make_plan(graph_of(table), kind);
  result->packing = cpu::make_packing(*result->plan);
  return result;
}

}  // namespace

std::string bind(const std::string& table) {
  std::lock_guard<std::mutex> lock(bound().mutex);
  auto [at, fresh] = bound().numbers.try_emplace(table, bound().texts.size());
  if (fresh) bound().texts.push_back(table);
  return mark + std::to_string(at->second);
}

std::shared_ptr<const Planned> planned(const std::string& table, cpu::PlanKind kind) {
  struct Last {
    std::string table;
    std::shared_ptr<const Planned> planned;
  };
  // A thread often runs one network again and again: to compare its text avoids the lock and the
  // hash.
  static thread_local Last lasts[kinds];
  const int which = kind.training | kind.expanded << 1 | kind.recompute << 2 | kind.bf16 << 3;
  Last& last = lasts[which];
  if (last.planned && last.table == table) return last.planned;
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const Planned>> plans[kinds];
  std::lock_guard<std::mutex> lock(mutex);
  auto& known = plans[which];
  auto found = known.find(table);
  if (found == known.end()) {
    if (known.size() >= plan_limit) known.clear();
    found = known.emplace(table, make_planned(table, kind)).first;
  }
  last = {table, found->second};
  return last.planned;
}

// at::parallel_for, with the work handed out as the threads ask for it.
void for_each(int64_t count, const std::function<void(int64_t)>& body) {
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::once_flag once;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    // The stable ABI would replace the text of an exception that leaves here.
    try {
      for (int64_t i = next++; i < count; i = next++) body(i);
    } catch (...) {
      std::call_once(once, [&] { failure = std::current_exception(); });
      next = count;
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fusedmoe
