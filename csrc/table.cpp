#include "table.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <string_view>

namespace fusedmoe {
namespace {

const char* const activations[] = {"identity", "relu",      "sigmoid",    "tanh", "silu",
                                   "gelu",     "gelu_tanh", "leaky_relu", "elu",  "softplus"};
const char* const selectors[] = {"slot", "root", "expert"};

// The token stream, one field at a time, in the order of the dataclasses' fields. No stream and no
// strtod: they obey the locale.
class TokenReader {
 public:
  explicit TokenReader(std::string_view text) : rest_(text) {}

  int64_t integer() { return parsed<int64_t>(); }
  double number() { return parsed<double>(); }
  // Below a limit that no sane table reaches: a count of garbage must not become an allocation.
  int64_t natural() {
    int64_t value = integer();
    if (value < 0 || value > (int64_t{1} << 40)) fail();
    return value;
  }
  int index(int64_t count = 1 << 20) {
    int64_t value = natural();
    if (value >= count) fail();
    return int(value);
  }
  bool flag() { return index(2) == 1; }
  template <size_t N>
  int name(const char* const (&names)[N]) {
    std::string_view t = token();
    for (size_t i = 0; i < N; i++)
      if (t == names[i]) return int(i);
    fail();
  }
  template <class F>
  auto list(F item) {
    std::vector<decltype(item())> result;
    for (int64_t n = natural(); n > 0; n--) result.push_back(item());
    return result;
  }
  void end() {
    if (!rest_.empty()) fail();
  }
  [[noreturn]] void fail() { throw std::invalid_argument("table: expected the words of an encoded table"); }

 private:
  std::string_view token() {
    size_t end = std::min(rest_.find(' '), rest_.size());
    std::string_view t = rest_.substr(0, end);
    rest_.remove_prefix(std::min(end + 1, rest_.size()));
    if (t.empty()) fail();
    return t;
  }
  template <class T>
  T parsed() {
    std::string_view t = token();
    T value{};
    auto [end, error] = std::from_chars(t.data(), t.data() + t.size(), value);
    if (error != std::errc() || end != t.data() + t.size()) fail();
    return value;
  }
  std::string_view rest_;
};

std::vector<Layer> layers(TokenReader& r) {
  return r.list([&] {
    Layer layer;
    layer.width = r.natural();
    layer.act = Act(r.name(activations));
    layer.parameter = r.number();
    layer.has_bias = r.flag();
    return layer;
  });
}

Gate gate(TokenReader& r) {
  Gate g;
  g.selector.kind = SelectorKind(r.name(selectors));
  g.selector.index = r.index();
  g.sees = r.list([&] { return r.index(); });
  g.layers = layers(r);
  Layer last;
  last.width = int64_t(g.sees.size());
  last.has_bias = r.flag();
  g.layers.push_back(last);
  return g;
}

Static static_weights(TokenReader& r) {
  Static s;
  s.experts = r.list([&] { return r.index(); });
  if (r.flag()) s.values = r.list([&] { return r.number(); });
  if (r.flag()) s.parameter = r.index();
  s.offset = r.natural();
  return s;
}

Level level(TokenReader& r) {
  Level l;
  l.experts = r.list([&] {
    Expert e;
    e.slot = r.index();
    e.layers = layers(r);
    return e;
  });
  l.units = r.list([&] {
    Unit u;
    if (r.flag()) u.gate = gate(r);
    if (r.flag()) u.static_weights = static_weights(r);
    return u;
  });
  return l;
}

// Mark, from the top down, what some output depends on (`Table.live` in fusedmoe/table.py).
void mark_live(Table& t) {
  for (size_t u = 0; u < t.levels.back().units.size(); u++) t.levels.back().units[u].live = !t.has_towers;
  for (const Task& task : t.tasks)
    if (t.has_towers)
      for (int u : task.units) t.levels.back().units.at(u).live = true;
  for (size_t l = t.levels.size(); l-- > 0;) {
    Level& level = t.levels[l];
    std::vector<int> slots;
    for (Unit& unit : level.units) {
      if (!unit.live) continue;
      if (unit.gate)
        for (int e : unit.gate->sees) level.experts.at(e).live = true;
      if (unit.static_weights)
        for (int e : unit.static_weights->experts) level.experts.at(e).live = true;
      if (unit.gate && !unit.gate->sees.empty()) {
        if (unit.gate->selector.kind == SelectorKind::expert) level.experts.at(unit.gate->selector.index).live = true;
        if (unit.gate->selector.kind == SelectorKind::slot) slots.push_back(unit.gate->selector.index);
      }
    }
    for (const Expert& e : level.experts)
      if (e.live) slots.push_back(e.slot);
    if (l > 0)
      for (int s : slots) t.levels[l - 1].units.at(s).live = true;
  }
}

// Number the parameters in the operator's order and record their shapes.
class Numbering {
 public:
  explicit Numbering(Table& t) : t_(t) {}

  int64_t stack(std::vector<Layer>& layers, int64_t k, bool live) {
    for (Layer& layer : layers) {
      layer.k = k;
      layer.weight = add({layer.width, k}, live);
      if (layer.has_bias) layer.bias = add({layer.width}, live);
      k = layer.width;
    }
    return k;
  }
  int add(std::vector<int64_t> shape, bool live) {
    t_.shapes.push_back(std::move(shape));
    t_.live.push_back(live);
    return int(t_.shapes.size()) - 1;
  }

 private:
  Table& t_;
};

int64_t selector_width(const Table& t, const Level& level, const Selector& s, const std::vector<int64_t>& slots) {
  if (s.kind == SelectorKind::root) return t.width;
  return s.kind == SelectorKind::slot ? slots.at(s.index) : level.experts.at(s.index).layers.back().width;
}

void number(Table& t, const std::vector<std::vector<int64_t>>& statics) {
  Numbering numbers(t);
  std::vector<int64_t> slots(t.slots, t.width);
  for (Level& level : t.levels) {
    for (Expert& e : level.experts) numbers.stack(e.layers, slots.at(e.slot), e.live);
    for (Unit& u : level.units) {
      if (u.gate)
        numbers.stack(u.gate->layers, selector_width(t, level, u.gate->selector, slots),
                      u.live && !u.gate->sees.empty());
      int reads = u.gate && !u.gate->sees.empty()                          ? u.gate->sees[0]
                  : u.static_weights && !u.static_weights->experts.empty() ? u.static_weights->experts[0]
                                                                           : 0;
      u.width = level.experts.at(reads).layers.back().width;
    }
    slots.clear();
    for (const Unit& u : level.units) slots.push_back(u.width);
    t.mixing += int64_t(level.experts.size() * level.units.size());
  }
  for (Task& task : t.tasks) {
    int64_t k = 0;
    for (int u : task.units) k += slots.at(u);
    numbers.stack(task.tower, k, true);
  }
  int first = int(t.shapes.size());
  t.first_static = t.shapes.size();
  for (const auto& shape : statics) numbers.add(shape, false);
  for (Level& level : t.levels)
    for (Unit& u : level.units)
      if (u.static_weights && u.static_weights->parameter >= 0) {
        u.static_weights->parameter += first;
        if (u.live && !u.static_weights->experts.empty()) t.live.at(u.static_weights->parameter) = true;
      }
  if (t.has_towers)
    t.output = {int64_t(t.tasks.size()), t.tasks[0].tower.back().width};
  else
    t.output = {int64_t(slots.size()), slots.at(0)};
}

bool repeated(std::vector<int> indices) {
  std::sort(indices.begin(), indices.end());
  return std::adjacent_find(indices.begin(), indices.end()) != indices.end();
}

// The rules of fusedmoe/table.py on which the kernels rely for memory safety; the messages are
// given there.
bool consistent(const Table& t, const std::vector<std::vector<int64_t>>& statics) {
  const auto positive = [](const std::vector<Layer>& layers) {
    for (const Layer& layer : layers)
      if (layer.width < 1) return false;
    return true;
  };
  if (t.levels.empty() || t.slots < 1 || t.slots > 1 << 20 || t.width < 1) return false;
  for (const Level& level : t.levels) {
    if (level.experts.empty() || level.units.empty()) return false;
    for (const Expert& e : level.experts)
      if (e.layers.empty() || !positive(e.layers)) return false;
    for (const Unit& unit : level.units) {
      std::vector<int> reads;
      if (unit.gate) reads = unit.gate->sees;
      if (repeated(reads)) return false;
      if (unit.gate && !positive({unit.gate->layers.begin(), unit.gate->layers.end() - 1})) return false;
      if (unit.static_weights) {
        const Static& f = *unit.static_weights;
        reads.insert(reads.end(), f.experts.begin(), f.experts.end());
        if (repeated(f.experts)) return false;
        if ((f.parameter >= 0) != f.values.empty() && !f.experts.empty()) return false;
        if (f.parameter < 0 && f.values.size() != f.experts.size()) return false;
        if (f.parameter >= 0 && f.offset + int64_t(f.experts.size()) > count_of(statics.at(f.parameter))) return false;
      }
      for (int e : reads)
        if (level.experts.at(e).layers.back().width != level.experts.at(reads[0]).layers.back().width) return false;
    }
  }
  for (const Task& task : t.tasks)
    if (task.tower.empty() == t.has_towers || !positive(task.tower) || repeated(task.units)) return false;
  return true;
}

// Whether the outputs have one width, so that they can stand in one tensor.
bool even(const Table& t) {
  for (const Task& task : t.tasks)
    if (t.has_towers && (task.units.empty() || task.tower.back().width != t.output[1])) return false;
  for (const Unit& unit : t.levels.back().units)
    if (!t.has_towers && unit.width != t.output[1]) return false;
  return true;
}

}  // namespace

Table decode(const std::string& text) {
  TokenReader r(text);
  try {
    Table t;
    t.slots = r.natural();
    t.width = r.natural();
    t.levels = r.list([&] { return level(r); });
    t.tasks = r.list([&] {
      Task task;
      task.units = r.list([&] { return r.index(); });
      task.tower = layers(r);
      return task;
    });
    auto statics = r.list([&] { return r.list([&] { return r.natural(); }); });
    t.root = r.index(t.slots);
    r.end();
    for (const Task& task : t.tasks) t.has_towers = t.has_towers || !task.tower.empty();
    if (!consistent(t, statics)) r.fail();
    mark_live(t);
    number(t, statics);
    if (!even(t)) r.fail();
    return t;
  } catch (const std::logic_error&) {  // an index out of range, or no number where one belongs
    r.fail();
  }
}

}  // namespace fusedmoe
