#include "table.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <string_view>

namespace fusedmoe {
namespace {

using namespace graph;

const char* const activations[] = {"identity", "relu",      "sigmoid",    "tanh", "silu",
                                   "gelu",     "gelu_tanh", "leaky_relu", "elu",  "softplus"};
const char* const vectors[] = {"input", "unit", "expert"};
const char* const stages[] = {"copy", "linear", "norm"};

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
  // A word of `count` digits: 1 for what is computed, 2 more for what has a gradient.
  std::string_view digits(size_t count) {
    const std::string_view t = token();
    if (t.size() != count || t.find_first_not_of("0123") != t.npos) fail();
    return t;
  }
  int index_or_none() {
    int64_t value = integer();
    if (value < -1 || value >= 1 << 20) fail();
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
  // Whether a value follows that may be missing; its type's name says so.
  bool present(const char* type) {
    const char* const names[] = {"NoneType", type};
    return name(names) == 1;
  }
  template <class F>
  auto list(F item) {
    std::vector<decltype(item())> result;
    for (int64_t n = natural(); n > 0; n--) result.push_back(item());
    return result;
  }
  std::vector<int> indices() {
    return list([&] { return index(); });
  }
  void skip() { token(); }
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

// Braces evaluate in order, as the fields stand in the text.
std::vector<Vector> sources(TokenReader& r) {
  return r.list([&] {
    return Vector{VectorKind(r.name(vectors)), r.index(), r.index(), r.natural(), r.natural(), r.flag(), r.flag()};
  });
}

Mlp mlp(TokenReader& r) {
  std::vector<Vector> from = sources(r);
  auto list = r.list([&] {
    return Stage{StageKind(r.name(stages)), r.natural(), r.natural(), r.index_or_none(), r.index_or_none(),
                 Act(r.name(activations)), r.number(), r.index_or_none(), r.number(), r.number(), r.index_or_none()};
  });
  return {std::move(from), std::move(list), r.natural()};
}

Gate gate(TokenReader& r) {
  Gate g;
  g.sees = r.indices();
  g.mlps = r.list([&] { return mlp(r); });
  g.free = r.index_or_none();
  g.query = sources(r);
  g.keys = r.list([&] { return sources(r); });
  g.factor = r.number();
  g.choice = r.index();
  g.closed = r.indices();
  return g;
}

Static static_weights(TokenReader& r) {
  Static s;
  s.experts = r.indices();
  s.values = r.list([&] { return r.number(); });
  s.parameter = r.index_or_none();
  s.offset = r.natural();
  s.channels = r.flag();
  return s;
}

Level level(TokenReader& r) {
  Level l;
  l.experts = r.list([&] {
    Mlp m = mlp(r);
    return Expert{std::move(m), r.flag(), r.flag()};
  });
  l.units = r.list([&] {
    Unit u;
    if (r.present("Gate")) u.gate = gate(r);
    if (r.present("Static")) u.static_weights = static_weights(r);
    u.product = r.indices();
    u.reads = r.indices();
    u.width = r.natural();
    u.computed = r.flag();
    u.differentiated = r.flag();
    return u;
  });
  return l;
}

Graph graph_of(TokenReader& r) {
  Graph g;
  g.inputs = r.list([&] { return Input{r.natural(), r.natural()}; });
  g.levels = r.list([&] { return level(r); });
  g.towers = r.list([&] { return mlp(r); });
  r.list([&] { return r.indices().size(); });  // the tasks, which take what the operator returns
  r.list([&] {
    r.skip();  // the name
    g.shapes.push_back(r.list([&] { return r.natural(); }));
    r.flag();  // computed
    g.live.push_back(r.flag());
    return 0;
  });
  g.output = r.list([&] { return r.natural(); });
  for (const Level& l : g.levels) g.mixing += int64_t(l.experts.size() * l.units.size());
  return g;
}

// What the kernels rely on for memory safety; the messages are given by fusedmoe/resolve.py.
class Rules {
 public:
  explicit Rules(const Graph& g) : g_(g) {}

  bool hold() {
    if (g_.inputs.empty() || g_.levels.empty() || g_.output.size() != 2) return false;
    for (const Input& input : g_.inputs)
      if (input.slots < 1 || input.slots > 1 << 20 || input.width < 1) return false;
    for (; level_ < g_.levels.size(); level_++)
      if (!level(g_.levels[level_])) return false;
    const std::vector<Unit>& last = g_.levels.back().units;
    for (const Mlp& tower : g_.towers)
      if (!mlp(tower, 0, 0) || tower.stages.empty() || tower.width != g_.output[1]) return false;
    for (const Unit& unit : last)
      if (g_.towers.empty() && (!unit.computed || unit.width != g_.output[1])) return false;
    return g_.output[0] == int64_t(g_.towers.empty() ? last.size() : g_.towers.size());
  }

 private:
  bool level(const Level& l) {
    if (l.experts.empty() || l.units.empty()) return false;
    for (size_t e = 0; e < l.experts.size(); e++)
      if (!mlp(l.experts[e].mlp, e, l.experts[e].computed ? 0 : any_source)) return false;
    for (const Unit& unit : l.units)
      if (!this->unit(unit, l)) return false;
    return true;
  }
  bool unit(const Unit& unit, const Level& l) {
    std::vector<int> reads = unit.product;
    if (unit.product.size() != 0 && (unit.product.size() != 2 || unit.gate || unit.static_weights)) return false;
    if (unit.gate) reads.insert(reads.end(), unit.gate->sees.begin(), unit.gate->sees.end());
    if (unit.static_weights)
      reads.insert(reads.end(), unit.static_weights->experts.begin(), unit.static_weights->experts.end());
    std::sort(reads.begin(), reads.end());
    reads.erase(std::unique(reads.begin(), reads.end()), reads.end());
    for (int j : unit.gate ? unit.gate->closed : std::vector<int>{}) std::erase(reads, unit.gate->sees.at(j));
    if (reads != unit.reads || unit.width < 1) return false;
    for (int e : reads)
      if (l.experts.at(e).mlp.width != unit.width || (unit.computed && !l.experts[e].computed)) return false;
    const int flags = unit.computed ? 0 : any_source;
    return (!unit.gate || gate(*unit.gate, l, unit.gate->sees.empty() ? any_source : flags)) &&
           (!unit.static_weights || static_weights(*unit.static_weights, unit.width));
  }
  bool gate(const Gate& gate, const Level& l, int flags) {
    const int64_t count = int64_t(gate.sees.size());
    if (repeated(gate.sees) || repeated(gate.closed)) return false;
    for (int j : gate.closed)
      if (j >= count) return false;
    // One expert is left, or there was none.
    if (count > 0 && int64_t(gate.closed.size()) == count) return false;
    if (gate.choice != 0 && size_t(gate.choice) >= gate.mlps.size()) return false;
    if ((gate.mlps.empty() ? 0 : 1) + (gate.free >= 0) + !gate.query.empty() != 1) return false;
    // What is not chosen may read what is not computed.
    for (size_t i = 0; i < gate.mlps.size(); i++) {
      const Mlp& m = gate.mlps[i];
      if (!mlp(m, l.experts.size(), i == size_t(gate.choice) ? flags : any_source)) return false;
      if (m.width != count || m.stages.empty()) return false;
    }
    if (gate.free >= 0 && g_.shapes.at(gate.free) != std::vector<int64_t>{count}) return false;
    if (gate.query.empty()) return gate.keys.empty();
    if (int64_t(gate.keys.size()) != count) return false;
    const int64_t width = this->width(gate.query, l.experts.size(), flags);
    for (size_t j = 0; j < gate.keys.size(); j++)
      if (this->width(gate.keys[j], l.experts.size(), gate.closes(int(j)) ? any_source : flags) != width) return false;
    return width > 0;
  }
  bool static_weights(const Static& s, int64_t width) {
    if (repeated(s.experts)) return false;
    const int64_t count = int64_t(s.experts.size()) * (s.channels ? width : 1);
    if (s.parameter < 0) return !s.channels && s.values.size() == s.experts.size();
    return s.values.empty() && s.offset + count <= count_of(g_.shapes.at(s.parameter));
  }
  // `experts`: how many of the level's experts may be read.
  bool mlp(const Mlp& mlp, size_t experts, int flags) {
    int64_t k = width(mlp.sources, experts, flags);
    if (k < 1) return false;
    for (const Stage& s : mlp.stages) {
      if (s.k != k || s.width < 0 || (s.kind != StageKind::linear && s.width != k)) return false;
      const std::vector<int64_t> row{s.width};
      const std::vector<int64_t> weight = s.kind == StageKind::linear ? std::vector<int64_t>{s.width, s.k} : row;
      if (s.kind == StageKind::linear ? s.weight < 0 : s.kind == StageKind::copy && s.weight >= 0)
        return false;
      if ((s.weight >= 0 && g_.shapes.at(s.weight) != weight) || (s.bias >= 0 && g_.shapes.at(s.bias) != row))
        return false;
      if (s.slope >= 0 && g_.shapes.at(s.slope) != row && g_.shapes.at(s.slope) != std::vector<int64_t>{1})
        return false;
      k = s.width;
    }
    return k == mlp.width;
  }
  // Columns of sources; 0 if one is not there.
  int64_t width(const std::vector<Vector>& sources, size_t experts, int flags) {
    int64_t total = 0;
    for (const Vector& v : sources) {
      const int64_t whole = columns(v, experts, flags);
      if (v.width < 1 || v.first > whole - v.width || v.whole != (v.width == whole)) return 0;
      total += v.width;
    }
    return total;
  }
  int64_t columns(const Vector& v, size_t experts, int flags) {
    if (v.kind == VectorKind::input) return v.index < g_.inputs.at(v.place).slots ? g_.inputs[v.place].width : 0;
    if (v.kind == VectorKind::unit) {
      if (size_t(v.place) >= level_) return 0;
      const Unit& unit = g_.levels[v.place].units.at(v.index);
      return unit.computed || flags == any_source ? unit.width : 0;
    }
    if (level_ == g_.levels.size() || size_t(v.index) >= experts) return 0;
    const Expert& expert = g_.levels[level_].experts[v.index];
    return expert.computed || flags == any_source ? expert.mlp.width : 0;
  }
  static bool repeated(std::vector<int> indices) {
    std::sort(indices.begin(), indices.end());
    return std::adjacent_find(indices.begin(), indices.end()) != indices.end();
  }

  // What is not computed may read what is not.
  static constexpr int any_source = 1;
  const Graph& g_;
  size_t level_ = 0;
};

}  // namespace

Graph decode(const std::string& text) {
  TokenReader r(text);
  try {
    r.name({"fusedmoe-table"});
    if (r.integer() != table_version) r.fail();
    for (int64_t n = r.natural(); n > 0; n--) r.skip();  // the table itself, which Python reads
    Graph g = graph_of(r);
    r.end();
    if (!Rules(g).hold()) r.fail();
    return g;
  } catch (const std::logic_error&) {  // an index out of range, or no number where one belongs
    r.fail();
  }
}

void take_route(Graph& graph, const std::string& words) {
  TokenReader r(words);
  const auto flags = [](char digit, auto& to) {
    to.computed = (digit - '0') & 1;
    to.differentiated = (digit - '0') >> 1;
  };
  r.name({"route"});
  for (Level& level : graph.levels) {
    const std::string_view experts = r.digits(level.experts.size());
    for (size_t e = 0; e < experts.size(); e++) flags(experts[e], level.experts[e]);
    for (Unit& unit : level.units) {
      flags(r.digits(1)[0], unit);
      const int choice = r.index();
      const std::vector<int> closed = r.indices();
      if (!unit.gate) continue;
      unit.gate->choice = choice;
      unit.gate->closed = closed;
      for (int j : closed) {
        if (size_t(j) >= unit.gate->sees.size()) r.fail();
        std::erase(unit.reads, unit.gate->sees[j]);
      }
    }
  }
  const std::string_view parameters = r.digits(graph.live.size());
  for (size_t i = 0; i < parameters.size(); i++) graph.live[i] = (parameters[i] - '0') >> 1;
  r.end();
  if (!Rules(graph).hold()) r.fail();
}

}  // namespace fusedmoe
