#include "tables.h"

#include <charconv>

#include "problem.h"

namespace fusedmoe::test {

const std::vector<std::string> activations = {"identity", "relu",      "sigmoid",    "tanh", "silu",
                                              "gelu",     "gelu_tanh", "leaky_relu", "elu",  "softplus"};

namespace {

const char* const selectors[] = {"slot", "root", "expert"};

// Neither of them is PyTorch's default, which a kernel might have built in.
double parameter_of(Act act) { return act == Act::leaky_relu ? 0.2 : act == Act::elu ? 0.7 : 0.0; }

Layer layer(int64_t width, Act act, bool bias = true) {
  Layer l;
  l.width = width;
  l.act = act;
  l.parameter = parameter_of(act);
  l.has_bias = bias;
  return l;
}
std::vector<Layer> mlp(const std::vector<int64_t>& widths, Act act, bool bias = true) {
  std::vector<Layer> layers;
  for (int64_t width : widths) layers.push_back(layer(width, act, bias));
  return layers;
}
Expert expert(int slot, std::vector<Layer> layers) { return {slot, std::move(layers)}; }
Gate gate(Selector selector, std::vector<int> sees, std::vector<Layer> hidden = {}, bool bias = true) {
  hidden.push_back(layer(int64_t(sees.size()), Act::identity, bias));
  return {selector, std::move(sees), std::move(hidden)};
}
Static fixed(std::vector<int> experts, std::vector<double> values) { return {std::move(experts), std::move(values)}; }
Static learned(std::vector<int> experts, int tensor, int64_t offset = 0) {
  return {std::move(experts), {}, tensor, offset};
}
Unit unit(std::optional<Gate> gate, std::optional<Static> values = {}) { return {std::move(gate), std::move(values)}; }
Task task(std::vector<int> units, std::vector<Layer> tower) { return {std::move(units), std::move(tower)}; }

std::vector<int> up_to(int64_t count) {
  std::vector<int> list;
  for (int i = 0; i < count; i++) list.push_back(i);
  return list;
}

// The word stream of a table whose parameters have no numbers yet.
class WordWriter {
 public:
  std::string text;

  void table(const Table& t, const std::vector<std::vector<int64_t>>& statics) {
    integer(t.slots);
    integer(t.width);
    list(t.levels, [&](const Level& l) {
      list(l.experts, [&](const Expert& e) {
        integer(e.slot);
        layers(e.layers, e.layers.size());
      });
      list(l.units, [&](const Unit& u) { write(u); });
    });
    list(t.tasks, [&](const Task& task) {
      list(task.units, [&](int u) { integer(u); });
      layers(task.tower, task.tower.size());
    });
    list(statics, [&](const std::vector<int64_t>& shape) { list(shape, [&](int64_t n) { integer(n); }); });
    integer(t.root);
  }

 private:
  void word(const std::string& w) { text += (text.empty() ? "" : " ") + w; }
  void integer(int64_t value) { word(std::to_string(value)); }
  void number(double value) {
    char digits[32];
    word(std::string(digits, std::to_chars(digits, digits + sizeof digits, value).ptr));
  }
  template <class T, class F>
  void list(const std::vector<T>& items, F write) {
    integer(int64_t(items.size()));
    for (const T& item : items) write(item);
  }
  void layers(const std::vector<Layer>& items, size_t count) {
    list(std::vector<Layer>(items.begin(), items.begin() + count), [&](const Layer& l) {
      integer(l.width);
      word(activations[int(l.act)]);
      number(l.parameter);
      integer(l.has_bias);
    });
  }
  void write(const Unit& u) {
    integer(u.gate.has_value());
    if (u.gate) {
      word(selectors[int(u.gate->selector.kind)]);
      integer(u.gate->selector.index);
      list(u.gate->sees, [&](int e) { integer(e); });
      layers(u.gate->layers, u.gate->layers.size() - 1);
      integer(u.gate->layers.back().has_bias);
    }
    integer(u.static_weights.has_value());
    if (u.static_weights) {
      const Static& s = *u.static_weights;
      list(s.experts, [&](int e) { integer(e); });
      integer(s.parameter < 0);
      if (s.parameter < 0) list(s.values, [&](double v) { number(v); });
      integer(s.parameter >= 0);
      if (s.parameter >= 0) integer(s.parameter);
      integer(s.offset);
    }
  }
};

Table decoded(const Table& table, const std::vector<std::vector<int64_t>>& statics = {}) {
  WordWriter words;
  words.table(table, statics);
  return decode(words.text);
}

// `experts` experts of `widths` over slot 0, `tasks` units that see them all by a gate of `hidden`
// layers, towers of width 5 and 1.
Table mmoe(int64_t width, const std::vector<int64_t>& widths, int64_t experts, int64_t tasks, Act act,
           const std::vector<int64_t>& hidden = {}) {
  Table t;
  t.slots = 1;
  t.width = width;
  Level level;
  for (int64_t e = 0; e < experts; e++) level.experts.push_back(expert(0, mlp(widths, act)));
  for (int64_t u = 0; u < tasks; u++)
    level.units.push_back(unit(gate({SelectorKind::slot, 0}, up_to(experts), mlp(hidden, act))));
  t.levels = {level};
  for (int64_t u = 0; u < tasks; u++) t.tasks.push_back(task({int(u)}, {layer(5, act), layer(1, Act::identity)}));
  return decoded(t);
}

// Two levels in the manner of PLE and AdaTT: own and shared experts, ragged in depth, own slots as
// selectors, learned static weights.
Table two_levels(int64_t width, int64_t inner, int64_t outer, Act act) {
  constexpr int tasks = 2, own = 2;
  Table t;
  t.slots = tasks + 1;
  t.width = width;
  std::vector<std::vector<int64_t>> statics;
  for (int l = 0; l < 2; l++) {
    Level level;
    const int64_t out = l == 0 ? inner : outer;
    for (int e = 0; e < tasks * own + 1; e++) {
      const std::vector<int64_t> widths = e % own ? std::vector<int64_t>{out + 3, out} : std::vector<int64_t>{out};
      level.experts.push_back(expert(e / own, mlp(widths, act)));
    }
    for (int u = 0; u < (l == 0 ? tasks + 1 : tasks); u++) {
      std::vector<int> sees = u == tasks ? up_to(tasks * own + 1) : std::vector<int>{own * u, own * u + 1, tasks * own};
      level.units.push_back(unit(gate({SelectorKind::slot, u}, sees),
                                 learned({own * u % (tasks * own), own * u % (tasks * own) + 1}, int(statics.size()))));
      statics.push_back({own});
    }
    t.levels.push_back(level);
  }
  for (int u = 0; u < tasks; u++) t.tasks.push_back(task({u, 1 - u}, {layer(9, act), layer(2, Act::sigmoid)}));
  return decoded(t, statics);
}

// Selectors of all kinds, gates with hidden layers and without bias, static weights fixed, learned
// and shared, experts and units that no output needs, a gate that sees nothing, a unit without
// anything, towers that share a unit.
Table every_feature() {
  const auto e = [](int slot, std::vector<int64_t> widths, Act act = Act::relu, bool bias = true) {
    return expert(slot, mlp(widths, act, bias));
  };
  const auto slot = [](int i) { return Selector{SelectorKind::slot, i}; };
  const Selector root{SelectorKind::root, 0};
  const auto output_of = [](int i) { return Selector{SelectorKind::expert, i}; };
  Table t;
  t.slots = 2;
  t.width = 5;
  t.root = 1;
  Level lower{
      {e(0, {5, 4}, Act::tanh), e(1, {4}, Act::relu, false), e(0, {6, 3, 5, 4}, Act::elu), e(1, {4}), e(0, {4})},
      {unit(gate(slot(1), {2, 0}, mlp({3}, Act::gelu))),
       unit(gate(output_of(3), {0, 1}, {}, false), learned({1, 2}, 0, 1)), unit(gate(root, {1, 2}), fixed({2}, {0.5})),
       unit(gate(slot(0), {})), unit({}), unit(gate(slot(0), {4}))}};
  Level upper{{e(0, {3}), e(1, {7, 3}, Act::silu), e(4, {3}), e(3, {3}), e(2, {3}, Act::leaky_relu)},
              {unit(gate(root, {0, 1, 4}), learned({0}, 0)), unit({}, learned({1, 2, 3}, 1)),
               unit(gate(output_of(0), {3, 1})), unit({}, learned({0}, 2))}};
  t.levels = {lower, upper};
  t.tasks = {task({0}, mlp({4, 2}, Act::relu)), task({1, 0}, mlp({2}, Act::sigmoid)),
             task({2}, mlp({3, 2}, Act::relu, false))};
  return decoded(t, {{2, 3}, {3}, {1}});
}

class RandomTable {
 public:
  explicit RandomTable(uint64_t seed) : random_(seed) {}

  Table build() {
    Table t;
    t.slots = 1 + random_.below(3);
    t.width = 1 + random_.below(40);
    t.root = int(random_.below(t.slots));
    int64_t slots = t.slots;
    for (int64_t l = 1 + random_.below(3); l > 0; l--) {
      t.levels.push_back(level(slots));
      slots = int64_t(t.levels.back().units.size());
    }
    const int64_t width = 1 + random_.below(4);
    for (int64_t n = random_.chance(60) ? 1 + random_.below(3) : 0; n > 0; n--) {
      auto tower = layers(int(random_.below(2)));
      tower.push_back(any_layer(width));
      t.tasks.push_back(task(some(slots, 1), tower));
    }
    return decoded(t, statics_);
  }

 private:
  Layer any_layer(int64_t width) {
    return layer(width, Act(random_.below(int64_t(activations.size()))), random_.chance(80));
  }
  std::vector<Layer> layers(int count) {
    std::vector<Layer> result;
    while (count-- > 0) result.push_back(any_layer(1 + random_.below(40)));
    return result;
  }
  // Distinct indices below `count`, at least `least` of them, in any order.
  std::vector<int> some(int64_t count, int64_t least = 0) {
    std::vector<int> all = up_to(count);
    for (int64_t i = count; i-- > 1;) std::swap(all[i], all[random_.below(i + 1)]);
    all.resize(least + random_.below(count - least + 1));
    return all;
  }
  // All outputs of a level have one width, since any unit may read any expert.
  Level level(int64_t slots) {
    Level l;
    const int64_t width = 1 + random_.below(40), experts = 1 + random_.below(5);
    for (int64_t e = 0; e < experts; e++) {
      auto stack = layers(int(random_.below(3)));
      stack.push_back(any_layer(width));
      l.experts.push_back(expert(int(random_.below(slots)), stack));
    }
    for (int64_t u = 1 + random_.below(4); u > 0; u--) {
      Unit next;
      const auto kind = SelectorKind(random_.below(3));
      const int64_t choices = kind == SelectorKind::slot ? slots : kind == SelectorKind::root ? 1 : experts;
      if (random_.chance(80)) {
        const int index = int(random_.below(choices));
        const std::vector<int> sees = some(experts, random_.chance(90));
        const std::vector<Layer> hidden = layers(int(random_.below(2)));
        next.gate = gate({kind, index}, sees, hidden, random_.chance(80));
      }
      if (random_.chance(50)) next.static_weights = static_of(some(experts));
      l.units.push_back(next);
    }
    return l;
  }
  Static static_of(std::vector<int> experts) {
    if (random_.chance(50)) {
      std::vector<double> values;
      for (size_t i = 0; i < experts.size(); i++) values.push_back(random_.normal());
      return fixed(experts, values);
    }
    const int64_t offset = random_.below(3);
    statics_.push_back({offset + int64_t(experts.size()) + random_.below(2)});
    if (statics_.back()[0] == 0) statics_.back()[0] = 1;
    return learned(experts, int(statics_.size()) - 1, offset);
  }

  Random random_;
  std::vector<std::vector<int64_t>> statics_;
};

}  // namespace

Table single(Act act) {
  Table t;
  t.slots = t.width = 1;
  t.levels = {{{expert(0, mlp({1}, act, false))}, {unit({}, fixed({0}, {1.0}))}}};
  return decoded(t);
}

std::vector<Case> cases() {
  std::vector<Case> list = {{"every feature", every_feature(), 70}};
  for (size_t a = 0; a < activations.size(); a++)
    list.push_back({activations[a], mmoe(11, {9, 7}, 3, 2, Act(a), {6}), 37});
  // Around the vectors, tiles and panels of the kernels: as input, hidden and output width, and as
  // columns of gates.
  for (int64_t width : {1, 2, 4, 7, 8, 15, 16, 17, 31, 32, 33, 47, 64, 100})
    list.push_back({"width " + std::to_string(width), mmoe(width, {width, width}, 3, 2, Act::tanh, {width}), 21});
  for (int64_t experts : {1, 3, 7, 16, 30})
    list.push_back({std::to_string(experts) + " experts", mmoe(6, {5}, experts, 1, Act::relu), 40});
  // Around the blocks of rows: few rows, a block and its remainder, chunks of blocks.
  for (int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 255, 256, 257, 300})
    list.push_back({std::to_string(rows) + " rows", two_levels(13, 9, 7, Act::silu), rows, rows % 2 == 1});
  // Reductions of several chains, and rows of weights 4 KB apart.
  list.push_back({"long sums", mmoe(300, {257, 390}, 1, 1, Act::gelu), 34});
  list.push_back({"weights at a stride of 4 KB", mmoe(1024, {33, 5}, 1, 1, Act::relu), 20});
  for (uint64_t seed = 1; seed <= 24; seed++) {
    Random random(seed);
    list.push_back(
        {"random table " + std::to_string(seed), RandomTable(seed).build(), 1 + random.below(80), random.chance(40)});
  }
  return list;
}

}  // namespace fusedmoe::test
