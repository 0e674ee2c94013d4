#include "plan.h"

#include <algorithm>
#include <map>
#include <set>

namespace fusedmoe::cpu {
namespace {

// Whether the derivative of an activation can be told from its output, so that the output alone is
// kept.
bool from_output(Act act) {
  return act == Act::identity || act == Act::relu || act == Act::sigmoid || act == Act::tanh;
}

class Builder {
 public:
  Builder(Plan& plan, const Table& table) : plan_(plan), table_(table) {}

  void build() {
    inputs();
    std::vector<Segment> segments;
    int64_t column = 0;
    for (size_t l = 0; l < table_.levels.size(); l++) {
      // What the last level hands out is the output itself, unless towers read it.
      segments.push_back(segment(table_.levels[l], column, l + 1 < table_.levels.size() || table_.has_towers));
      segments.back().transposes = own(std::move(transposes_));
      transposes_.clear();
      column += int64_t(table_.levels[l].experts.size() * table_.levels[l].units.size());
    }
    towers();
    plan_.segments = own(std::move(segments));
    plan_.tower_transposes = own(std::move(transposes_));
    plan_.linears = own(std::move(linears_));
  }

 private:
  template <class T>
  Span<T> own(std::vector<T> items) {
    auto owner = std::make_shared<std::vector<T>>(std::move(items));
    plan_.storage.push_back(owner);
    return {owner->data(), int64_t(owner->size())};
  }

  // Inference rounds widths up, because a few rows are laid out row by row in the same space
  // (forward.h).
  Panel panel(int64_t width, bool save) {
    int64_t size = plan_.training ? width : padded(width);
    int64_t& top = save && plan_.training ? plan_.saved : top_;
    Panel p{top, width, save && plan_.training, panels_++};
    top += size;
    plan_.scratch = std::max(plan_.scratch, top_);
    plan_.widest = std::max(plan_.widest, width);
    return p;
  }
  int64_t d_panel(int64_t width) {
    int64_t offset = plan_.d_scratch;
    plan_.d_scratch += width;
    return offset;
  }

  void inputs() {
    std::vector<int64_t> gradients;
    for (int64_t s = 0; s < table_.slots; s++) {
      bool first = s == 0 || !plan_.expanded;
      slots_.push_back(first ? panel(table_.width, false) : slots_[0]);
      gradients.push_back(d_panel(table_.width));
      source_[slots_.back().id].slot = int(s);
    }
    roots_ = slots_;
    d_slots_ = gradients;
    plan_.inputs = own(slots_);
    std::vector<int64_t> operands;
    for (const Panel& slot : slots_) operands.push_back(plan_.bf16 ? operand(slot).first : -1);
    plan_.input_operands = own(operands);
    plan_.d_inputs = own(gradients);
  }

  // The operand of a panel, and whether this is the first linear to read it: then it is to make it.
  std::pair<int64_t, bool> operand(const Panel& in) {
    auto [at, fresh] = operands_.try_emplace(in.id, top_);
    if (fresh) top_ += (in.width + 1) / 2;
    plan_.scratch = std::max(plan_.scratch, top_);
    return {at->second, fresh};
  }
  // Maps that run again in backward may run without those that made their operands; the inputs' are
  // always made.
  void operand(Linear& linear) {
    auto [at, fresh] = operand(linear.in);
    auto source = source_.find(linear.in.id);
    const bool input = source != source_.end() && source->second.slot >= 0;
    linear.operand = at;
    linear.convert = fresh || (plan_.recompute && !input);
    linear.transposed_weight = plan_.transposed_weights;
    plan_.transposed_weights += linear.k * (linear.n + linear.n % 2);
  }

  // Where backward finds the transpose of a panel; entered once, however many linears read it.
  int64_t transposed(const Panel& in) {
    TransposedInput& source = source_[in.id];
    auto [at, fresh] = transposed_.try_emplace(in.id, plan_.transposed);
    if (fresh) {
      source.from = source.linear ? source.linear->z : in;
      source.from.width = in.width;
      source.to = plan_.transposed;
      transposes_.push_back(source);
      plan_.transposed += leading(in.width);
    }
    return at->second;
  }

  // Whether the panels of a segment are read no more when it is done, so that the next one takes
  // their space.
  bool passing() const { return !plan_.training || plan_.recompute; }

  // The output is placed first and the hidden layers behind it: in inference the next panel then
  // takes their space.
  Mlp mlp(const std::vector<Layer>& layers, const Panel& in, int64_t d_in, bool out_saved) {
    std::vector<Linear> linears(layers.size());
    // Later MLPs read the operand of `in` too, so it stands before the space that they may take.
    const bool makes = plan_.bf16 && operand(in).second;
    place(layers.back(), linears.back(), out_saved);
    int64_t top = top_;
    for (size_t j = 0; j + 1 < layers.size(); j++) place(layers[j], linears[j], !plan_.recompute);
    Panel from = in;
    int64_t d = 0;
    for (Linear& linear : linears) {
      linear.in = from;
      from = linear.out;
      if (plan_.bf16) operand(linear);
      if (makes && linear.in.id == in.id) linear.convert = true;
      linear.d = d;
      d += linear.n;
    }
    plan_.d_linears = std::max(plan_.d_linears, d);
    if (!plan_.training) top_ = top;
    auto source = source_.find(in.id);
    Mlp result{own(std::move(linears)), in, from, d_in, source != source_.end() && source->second.slot >= 0};
    for (const Linear& linear : result.linears) {
      linears_.push_back(&linear);
      if (!plan_.training) continue;
      if (linear.out.id != linear.z.id) source_[linear.out.id].linear = &linear;
    }
    for (Linear& linear : result.linears)
      if (plan_.training) linear.transposed = transposed(linear.in);
    return result;
  }

  void place(const Layer& layer, Linear& linear, bool saved) {
    linear = {layer.k, layer.width, layer.weight, layer.bias, layer.act, layer.parameter, {}, {}, {}};
    linear.z = panel(layer.width, saved);
    linear.out = from_output(layer.act) || !plan_.training ? linear.z : panel(layer.width, false);
    linear.d_z = plan_.d_z;
    plan_.d_z += layer.width;
  }

  Segment segment(const Level& level, int64_t column, bool read_later) {
    std::vector<Panel> outputs;
    for (const Unit& unit : level.units) outputs.push_back(unit.live ? panel(unit.width, read_later) : Panel{});
    int64_t base = top_;
    Segment segment;
    experts(level, segment);
    std::vector<int64_t> gradients;
    std::vector<UnitPlan> units;
    for (size_t u = 0; u < level.units.size(); u++) {
      gradients.push_back(level.units[u].live ? d_panel(level.units[u].width) : -1);
      units.push_back(mix(level.units[u], outputs[u], column + int64_t(u * level.experts.size()), segment));
      units.back().d_out = gradients.back();
    }
    segment.unit_groups = unit_groups(units);
    segment.units = own(std::move(units));
    uses(segment);
    slots_ = outputs;
    d_slots_ = gradients;
    if (passing()) top_ = base;
    return segment;
  }

  void experts(const Level& level, Segment& segment) {
    std::vector<Mlp> mlps(level.experts.size());
    std::vector<int> order;
    std::vector<int64_t> d_expert(level.experts.size(), -1);
    for (size_t e = 0; e < level.experts.size(); e++) {
      const Expert& expert = level.experts[e];
      if (!expert.live) continue;
      order.push_back(int(e));
      mlps[e] = mlp(expert.layers, slots_.at(expert.slot), d_slots_.at(expert.slot), !plan_.recompute);
    }
    for (const Unit& unit : level.units)
      if (unit.live && unit.gate && !unit.gate->sees.empty() && unit.gate->selector.kind == SelectorKind::expert) {
        int64_t& at = d_expert[unit.gate->selector.index];
        if (at < 0) at = d_panel(level.experts[unit.gate->selector.index].layers.back().width);
      }
    segment.experts = own(std::move(mlps));
    segment.order = own(std::move(order));
    segment.d_expert = own(std::move(d_expert));
  }

  UnitPlan mix(const Unit& unit, const Panel& out, int64_t weights, const Segment& segment) {
    UnitPlan mix{};
    mix.weights = weights;
    mix.reads.count = -1;
    if (!unit.live) return mix;
    mix.out = out;
    std::map<int, Read> reads;
    if (unit.gate && !unit.gate->sees.empty()) {
      const Gate& gate = *unit.gate;
      for (size_t j = 0; j < gate.sees.size(); j++) reads[gate.sees[j]] = {gate.sees[j], int(j), 0.0, -1, 0};
      const Selector& s = gate.selector;
      Panel in = s.kind == SelectorKind::root   ? roots_.at(table_.root)
                 : s.kind == SelectorKind::slot ? slots_.at(s.index)
                                                : segment.experts[s.index].out;
      int64_t d_in = s.kind == SelectorKind::root   ? plan_.d_inputs[table_.root]
                     : s.kind == SelectorKind::slot ? d_slots_.at(s.index)
                                                    : segment.d_expert[s.index];
      mix.gate = mlp(gate.layers, in, d_in, false);
      mix.p = panel(int64_t(gate.sees.size()), true);
    }
    if (unit.static_weights)
      for (size_t j = 0; j < unit.static_weights->experts.size(); j++) {
        int e = unit.static_weights->experts[j];
        Read& read = reads.try_emplace(e, Read{e, -1, 0.0, -1, 0}).first->second;
        read.parameter = unit.static_weights->parameter;
        if (unit.static_weights->parameter < 0) read.value = unit.static_weights->values.at(j);
        read.element = unit.static_weights->offset + int64_t(j);
        if (unit.static_weights->parameter >= 0) read.d_static = plan_.d_z++;
      }
    std::vector<Read> list;
    for (const auto& entry : reads) list.push_back(entry.second);
    mix.reads = own(std::move(list));
    // Of few rows, too, the weights have whole vectors of lanes.
    mix.w = panel(mix.reads.count * (plan_.training ? 1 : lane_multiple / few_rows), false);
    mix.d_w = d_panel(2 * mix.reads.count);
    return mix;
  }

  Span<UnitGroup> unit_groups(const std::vector<UnitPlan>& units) {
    std::vector<UnitGroup> result;
    for (size_t first = 0, next = 0; first < units.size(); first = next) {
      std::vector<int> members;
      std::set<int> experts;
      for (next = first; next < units.size() && members.size() < mixed_units; next++) {
        if (units[next].reads.count < 0) continue;
        if (!members.empty() && units[next].out.width != units[members[0]].out.width) break;
        members.push_back(int(next));
        for (const Read& read : units[next].reads) experts.insert(read.expert);
      }
      if (members.empty()) continue;
      std::vector<int> reads;
      for (int u : members)
        for (int e : experts) {
          const Read* at = std::find_if(units[u].reads.begin(), units[u].reads.end(),
                                        [&](const Read& read) { return read.expert == e; });
          reads.push_back(at == units[u].reads.end() ? -1 : int(at - units[u].reads.begin()));
        }
      result.push_back(
          {own(std::move(members)), own(std::vector<int>(experts.begin(), experts.end())), own(std::move(reads))});
    }
    return own(std::move(result));
  }

  void uses(Segment& segment) {
    std::vector<std::vector<Use>> lists(segment.experts.count);
    for (int64_t u = 0; u < segment.units.count; u++)
      for (int64_t i = 0; i < segment.units[u].reads.count; i++)
        lists[segment.units[u].reads[i].expert].push_back({int(u), i});
    std::vector<Span<Use>> spans;
    for (auto& list : lists) spans.push_back(own(std::move(list)));
    segment.uses = own(std::move(spans));
  }

  void towers() {
    std::vector<Tower> towers;
    for (const Task& task : table_.tasks) {
      if (!table_.has_towers) break;
      Tower tower;
      std::vector<int> units = task.units;
      int64_t width = 0;
      for (int u : units) width += slots_.at(u).width;
      bool one = units.size() == 1;
      tower.in = one ? slots_[units[0]] : panel(width, !plan_.recompute);
      // The derivative of the identity needs no output.
      tower.mlp = mlp(task.tower, tower.in, one ? d_slots_[units[0]] : d_panel(width),
                      task.tower.back().act != Act::identity && !plan_.recompute);
      tower.units = own(std::move(units));
      towers.push_back(tower);
    }
    plan_.towers = own(std::move(towers));
  }

  Plan& plan_;
  const Table& table_;
  int64_t top_ = 0;
  int panels_ = 0;
  std::vector<Panel> slots_, roots_;
  std::vector<int64_t> d_slots_;
  // By the panel's id.
  std::map<int, TransposedInput> source_;
  std::map<int, int64_t> transposed_, operands_;
  std::vector<TransposedInput> transposes_;
  std::vector<const Linear*> linears_;
};

}  // namespace

std::unique_ptr<Plan> make_plan(const Table& table, PlanKind kind) {
  auto plan = std::make_unique<Plan>();
  plan->table = table;
  plan->training = kind.training;
  plan->expanded = kind.expanded;
  plan->recompute = kind.training && kind.recompute;
  plan->bf16 = kind.bf16;
  Builder(*plan, plan->table).build();
  return plan;
}

}  // namespace fusedmoe::cpu
