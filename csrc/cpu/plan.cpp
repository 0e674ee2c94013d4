#include "plan.h"

#include "allocation.h"
#include "groups.h"

#include <algorithm>
#include <map>
#include <set>

namespace fusedmoe::cpu {
namespace {

class Builder : Allocation {
 public:
  Builder(Plan& plan, const Graph& graph) : Allocation(plan), graph_(graph) {}

  void build() {
    inputs();
    std::vector<Segment> segments;
    int64_t column = 0;
    for (size_t l = 0; l < graph_.levels.size(); l++) {
      const graph::Level& level = graph_.levels[l];
      // What the last level hands out is the output itself, unless towers read it.
      segments.push_back(segment(level, column, l + 1 < graph_.levels.size() || !graph_.towers.empty()));
      segments.back().transposes = own(std::move(transposes_));
      transposes_.clear();
      column += int64_t(level.experts.size() * level.units.size());
    }
    towers();
    plan_.segments = own(std::move(segments));
    plan_.tower_transposes = own(std::move(transposes_));
    plan_.gradients = gradients();
    plan_.linears = own(std::vector<const Stage*>(linears_.begin(), linears_.end()));
    plan_.row_sums = own(std::move(row_sums_));
    plan_.plain = own(std::vector<int>(plain_.begin(), plain_.end()));
  }

 private:
  // A value and its gradient: the panel of d, or -1 where nothing asks for it.
  struct Value {
    Panel panel;
    int64_t d = -1;
  };

  void inputs() {
    const graph::Input& input = graph_.inputs[0];
    std::vector<Panel> panels;
    std::vector<int64_t> gradients, operands;
    for (int64_t s = 0; s < input.slots; s++) {
      bool first = s == 0 || !plan_.expanded;
      panels.push_back(first ? panel(input.width, false) : panels[0]);
      gradients.push_back(d_panel(input.width));
      inputs_.push_back({panels.back(), gradients.back()});
      source_[panels.back().id].slot = int(s);
    }
    for (const Panel& slot : panels) operands.push_back(plan_.bf16 ? operand(slot).first : -1);
    plan_.inputs = own(panels);
    plan_.input_operands = own(operands);
    plan_.d_inputs = own(gradients);
  }

  // What a vector is some columns of.
  const Value& value(const graph::Vector& vector) const {
    if (vector.kind == graph::VectorKind::input) return inputs_.at(vector.index);
    return vector.kind == graph::VectorKind::unit ? units_.at(vector.place).at(vector.index)
                                                  : experts_.at(vector.index);
  }

  // What an MLP reads: a whole vector as it stands, or a concatenation, which the first one that
  // reads it gathers.
  struct Joined {
    Value value;
    Span<Gather> gather;
  };
  Joined read(const std::vector<graph::Vector>& sources) {
    const Value& first = value(sources[0]);
    if (sources.size() == 1 && sources[0].width == first.panel.width)
      return {{first.panel, sources[0].detached ? -1 : first.d}, {}};
    std::vector<int64_t> key;
    for (const graph::Vector& v : sources)
      key.insert(key.end(), {int64_t(v.kind), v.place, v.index, v.first, v.width, v.detached});
    if (auto known = gathered_.find(key); known != gathered_.end()) return {known->second, {}};
    std::vector<Part> parts;
    int64_t width = 0;
    bool differentiated = false;
    for (const graph::Vector& v : sources) {
      const Value& from = value(v);
      parts.push_back({from.panel, v.first, v.width, v.detached ? -1 : from.d, v.kind == graph::VectorKind::input});
      differentiated = differentiated || parts.back().d >= 0;
      width += v.width;
    }
    Value joined{panel(width, !plan_.recompute), differentiated ? d_panel(width) : -1};
    gathered_[key] = joined;
    return {joined, own(std::vector<Gather>{{joined.panel, joined.d, own(std::move(parts))}})};
  }

  // The output is placed first and the hidden layers behind it: in inference the next panel then
  // takes their space.
  Mlp mlp(const graph::Mlp& from, bool out_saved, bool differentiated) {
    const auto [in, gather] = read(from.sources);
    Mlp result;
    result.in = result.out = in.panel;
    result.d_in = in.d;
    result.gather = gather;
    result.differentiated = differentiated;
    result.reads_x = is_input(in.panel);
    if (from.stages.empty()) {
      plan_.backward_reads_inputs = plan_.backward_reads_inputs || result.reads_x;
      return result;
    }
    const std::vector<graph::Stage> given = plan_.training ? dropout_apart(from.stages) : from.stages;
    std::vector<Stage> stages(given.size());
    // Later MLPs read the operand of `in` too, so it stands before the space that they may take.
    const bool makes =
        plan_.bf16 && given[0].kind == graph::StageKind::linear && operand(in.panel).second;
    place(given.back(), stages.back(), out_saved, differentiated);
    int64_t top = top_;
    for (size_t j = 0; j + 1 < stages.size(); j++) place(given[j], stages[j], !plan_.recompute, differentiated);
    Panel next = in.panel;
    int64_t d = 0;
    for (Stage& stage : stages) {
      stage.in = next;
      next = stage.out;
      if (plan_.bf16 && stage.kind == graph::StageKind::linear) operand(stage);
      if (makes && stage.in.id == in.panel.id) stage.convert = true;
      stage.d = d;
      d += stage.n;
    }
    plan_.d_linears = std::max(plan_.d_linears, d);
    if (!plan_.training) top_ = top;
    result.stages = own(std::move(stages));
    result.out = next;
    for (Stage& stage : result.stages) {
      const bool linear = stage.kind == graph::StageKind::linear;
      if (linear) linears_.push_back(&stage);
      if (!plan_.training) continue;
      if (linear && differentiated) differentiated_.push_back(&stage);
      if (stage.out.id != stage.z.id) source_[stage.out.id].stage = &stage;
    }
    for (Stage& stage : result.stages)
      if (plan_.training && differentiated && stage.kind == graph::StageKind::linear)
        stage.transposed = transposed(stage.in);
    return result;
  }

  void place(const graph::Stage& from, Stage& stage, bool saved, bool differentiated) {
    stage = {from.kind, from.k, from.width, from.weight, from.bias, from.act, from.parameter, {}, {}, {}};
    stage.z = panel(from.width, saved);
    stage.slope = from.slope;
    stage.eps = from.eps;
    stage.stream = from.stream;
    if (from.dropout > 0) {
      stage.threshold = uint32_t(from.dropout * 4294967296.0);
      stage.kept = 1 / (1 - from.dropout);
    }
    const bool in_place = (from_output(from.act) && from.slope < 0) || !plan_.training;
    stage.out = in_place ? stage.z : panel(from.width, false);
    stage.d_z = rows(from.width);
    plan_.linear = plan_.linear && from.kind == graph::StageKind::linear && from.slope < 0;
    if (from.slope >= 0) {
      stage.slope_per_column = graph_.shapes[from.slope] == std::vector<int64_t>{from.width};
      stage.d_slope = summed(from.slope, differentiated, from.width, stage.slope_per_column ? 1 : 0);
    }
    if (from.kind == graph::StageKind::linear) return;
    if (from.bias >= 0) stage.d_beta = summed(from.bias, differentiated, from.width, 1);
    if (from.kind == graph::StageKind::copy) return;
    stage.normal = plan_.training ? panel(from.width, saved) : stage.z;
    stage.r = panel(1, saved);
    if (from.weight >= 0) stage.d_gamma = summed(from.weight, differentiated, from.width, 1);
  }
  Segment segment(const graph::Level& level, int64_t column, bool read_later) {
    std::vector<Value> outputs;
    for (const graph::Unit& unit : level.units)
      outputs.push_back(unit.computed ? Value{panel(unit.width, read_later)} : Value{});
    int64_t base = top_;
    gathered_.clear();
    Segment segment;
    experts(level, segment);
    std::vector<UnitPlan> units;
    for (size_t u = 0; u < level.units.size(); u++) {
      const graph::Unit& unit = level.units[u];
      outputs[u].d = unit.computed ? d_panel(unit.width) : -1;
      units.push_back(mix(unit, outputs[u], column + int64_t(u * level.experts.size())));
    }
    segment.unit_groups = unit_groups(units);
    segment.units = own(std::move(units));
    uses(segment);
    units_.push_back(outputs);
    if (!passing()) return segment;
    top_ = base;
    // The operands made here go with the space: a later segment that reads one of the units below
    // makes its own.
    std::erase_if(operands_, [&](const auto& operand) { return operand.second >= base; });
    return segment;
  }

  void experts(const graph::Level& level, Segment& segment) {
    const std::set<int> beside = read_beside_the_mix(level);
    std::vector<Mlp> mlps(level.experts.size());
    std::vector<int> order;
    experts_.assign(level.experts.size(), {});
    for (size_t e = 0; e < level.experts.size(); e++) {
      const graph::Expert& expert = level.experts[e];
      if (!expert.computed) continue;
      order.push_back(int(e));
      mlps[e] = mlp(expert.mlp, !plan_.recompute, expert.differentiated);
      experts_[e] = {mlps[e].out, beside.count(int(e)) ? d_panel(expert.mlp.width) : -1};
    }
    std::vector<int64_t> d_expert;
    for (const Value& expert : experts_) d_expert.push_back(expert.d);
    segment.experts = own(std::move(mlps));
    segment.order = own(std::move(order));
    segment.d_expert = own(std::move(d_expert));
  }

  UnitPlan mix(const graph::Unit& unit, const Value& out, int64_t weights) {
    UnitPlan mix{};
    mix.weights = weights;
    mix.reads.count = -1;
    if (!unit.computed) return mix;
    mix.differentiated = unit.differentiated;
    mix.out = out.panel;
    mix.d_out = out.d;
    std::map<int, Read> reads;
    if (unit.gate && !unit.gate->sees.empty()) {
      const graph::Gate& gate = *unit.gate;
      std::vector<int> open;
      for (size_t j = 0; j < gate.sees.size(); j++) {
        if (gate.closes(int(j))) continue;
        reads[gate.sees[j]] = {gate.sees[j], int(j), 0.0, -1, 0};
        open.push_back(int(j));
      }
      if (!gate.closed.empty()) {
        mix.open = own(std::move(open));
        plan_.linear = false;
        plan_.widest = std::max(plan_.widest, int64_t(gate.sees.size()));
      }
      logits(gate, mix);
      mix.factor = gate.factor;
      mix.p = panel(int64_t(gate.sees.size()), true);
    }
    if (unit.static_weights && unit.static_weights->channels)
      mix.channels = channels(unit);
    else if (unit.static_weights)
      static_weights(unit, reads);
    mix.product = own(unit.product);
    plan_.linear = plan_.linear && mix.product.count == 0 && mix.channels.count == 0;
    std::vector<Read> list;
    for (const auto& entry : reads) list.push_back(entry.second);
    mix.reads = own(std::move(list));
    // Of few rows, too, the weights have whole vectors of lanes.
    mix.w = panel(mix.reads.count * (plan_.training ? 1 : lane_multiple / few_rows), false);
    mix.d_w = d_panel(2 * mix.reads.count);
    return mix;
  }

  void logits(const graph::Gate& gate, UnitPlan& mix) {
    const int64_t count = int64_t(gate.sees.size());
    if (!gate.mlps.empty()) {
      mix.gate = mlp(gate.mlps[gate.choice], false, true);
      mix.logits = mix.gate.out;
      return;
    }
    plan_.linear = false;
    plan_.d_linears = std::max(plan_.d_linears, count);
    mix.logits = panel(count, false);
    if (gate.free >= 0) {
      mix.free = gate.free;
      mix.d_free = summed(gate.free, true, count, 1);
      return;
    }
    std::vector<Attended> query, keys;
    std::vector<Gather> gathers;
    const auto attend = [&](const std::vector<graph::Vector>& sources) {
      const auto [in, gather] = read(sources);
      gathers.insert(gathers.end(), gather.begin(), gather.end());
      plan_.backward_reads_inputs = plan_.backward_reads_inputs || is_input(in.panel);
      return Attended{in.panel, in.d};
    };
    query.push_back(attend(gate.query));
    for (size_t j = 0; j < gate.keys.size(); j++)
      keys.push_back(gate.closes(int(j)) ? Attended{{}, -1} : attend(gate.keys[j]));
    mix.query = own(std::move(query));
    mix.keys = own(std::move(keys));
    mix.gathers = own(std::move(gathers));
  }

  Span<Channels> channels(const graph::Unit& unit) {
    const graph::Static& given = *unit.static_weights;
    const int64_t width = unit.width;
    std::vector<Channels> result;
    for (size_t j = 0; j < given.experts.size(); j++) {
      if (!unit.reads_expert(given.experts[j])) continue;
      const int64_t element = given.offset + int64_t(j) * width;
      const int64_t d = summed(given.parameter, unit.differentiated, width, 1, element);
      result.push_back({given.experts[j], given.parameter, element, d});
    }
    return own(std::move(result));
  }

  void static_weights(const graph::Unit& unit, std::map<int, Read>& reads) {
    const graph::Static& given = *unit.static_weights;
    const bool learned = given.parameter >= 0;
    for (size_t j = 0; j < given.experts.size(); j++) {
      const int e = given.experts[j];
      if (!unit.reads_expert(e)) continue;
      Read& read = reads.try_emplace(e, Read{e, -1, 0.0, -1, 0}).first->second;
      read.parameter = given.parameter;
      read.element = given.offset + int64_t(j);
      if (!learned) read.value = given.values.at(j);
      if (learned) {
        read.d_static = summed(read.parameter, true, 1, 1, read.element);
      }
    }
  }

  Span<UnitGroup> unit_groups(const std::vector<UnitPlan>& units) {
    std::vector<UnitGroup> result;
    for (Mixed& mixed : mixed_together(units))
      result.push_back({own(std::move(mixed.units)), own(std::move(mixed.experts)), own(std::move(mixed.reads))});
    return own(std::move(result));
  }

  void uses(Segment& segment) {
    std::vector<std::vector<Use>> lists(segment.experts.count);
    for (int64_t u = 0; u < segment.units.count; u++)
      for (int64_t i = 0; i < segment.units[u].reads.count && segment.units[u].differentiated; i++)
        lists[segment.units[u].reads[i].expert].push_back({int(u), i});
    std::vector<Span<Use>> spans;
    for (auto& list : lists) spans.push_back(own(std::move(list)));
    segment.uses = own(std::move(spans));
  }

  void towers() {
    std::vector<Tower> towers;
    for (const graph::Mlp& tower : graph_.towers) {
      gathered_.clear();
      // The derivative of the identity needs no output; that of PReLU and of a LayerNorm does.
      const graph::Stage& last = tower.stages.back();
      const bool read = last.act != Act::identity || last.slope >= 0 || last.kind == graph::StageKind::norm;
      towers.push_back({mlp(tower, read && !plan_.recompute, true)});
    }
    plan_.towers = own(std::move(towers));
  }

  Span<Span<const Stage*>> gradients() {
    std::vector<Span<const Stage*>> spans;
    for (auto& group : sharing(differentiated_)) spans.push_back(own(std::move(group)));
    return own(std::move(spans));
  }

  const Graph& graph_;
  // What can be read: input slots, units by level, and the experts of the level that is built.
  std::vector<Value> inputs_, experts_;
  std::vector<std::vector<Value>> units_;
  std::map<std::vector<int64_t>, Value> gathered_;
  std::vector<Stage*> linears_, differentiated_;
};

}  // namespace

std::unique_ptr<Plan> make_plan(const Graph& graph, PlanKind kind) {
  auto plan = std::make_unique<Plan>();
  plan->graph = graph;
  plan->training = kind.training;
  plan->expanded = kind.expanded;
  plan->recompute = kind.training && kind.recompute;
  plan->bf16 = kind.bf16;
  Builder(*plan, plan->graph).build();
  return plan;
}

}  // namespace fusedmoe::cpu
