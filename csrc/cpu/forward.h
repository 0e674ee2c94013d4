// The forward of a whole network for a block of rows. Two layouts of an activation share one walk
// through the plan: `Transposed`, [width, ld], for any number of rows, and `RowByRow`, [R,
// padded(width)], for the few rows of online serving.
#pragma once
#include "stages.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

template <class T, class Operands>
struct Transposed {
  static int64_t lanes_of(int64_t rows) { return padded(rows); }

  static void input(const Block<T>& b, int64_t slot, const Panel& to) {
    const T* x = b.call.x + b.row * b.call.row_stride + slot * b.call.slot_stride;
    transpose(x, b.call.row_stride, b.rows, to.width, b.at(to), b.ld, b.ld);
    Operands::input(b, slot);
  }
  static void stage(const Block<T>& b, const Stage& stage) {
    T* z = b.at(stage.z);
    bool relu = false;
    if (stage.kind == graph::StageKind::linear) {
      Operands::linear(b, stage);
      relu = stage.act == Act::relu;
    } else if (stage.kind == graph::StageKind::norm) {
      layer_norm(b, stage);
    } else {
      copied(b, stage);
    }
    if (stage.slope >= 0 || (!relu && stage.act != Act::identity))
      activated(b, stage, z, b.at(stage.out));
    else
      drop_out(b, stage, z);
  }
  static void weights(const Block<T>& b, const UnitPlan& unit) {
    if (!unit.gate.stages.count) other_logits(b, unit);
    if (unit.p.width) softmax_of(b, unit);
    mixing_weights(unit.reads, b.call.params, b.at(unit.p), b.ld, b.at(unit.w));
  }
  static int64_t weight_lanes(const Block<T>& b) { return b.ld; }
  static void combine(const Block<T>& b, const Segment& segment, const UnitGroup& group) {
    const int64_t count = group.experts.count;
    in_groups<mixed_units>(0, group.units.count, [&](int64_t, auto units) {
      const T* w[mixed_units];
      T* out[mixed_units];
      for (int u = 0; u < units; u++) {
        w[u] = b.at(segment.units[group.units[u]].w);
        out[u] = b.at(segment.units[group.units[u]].out);
      }
      auto weight = [&](int u, int64_t i) {
        const int at = group.reads[u * count + i];
        return at < 0 ? nullptr : w[u] + at * b.ld;
      };
      auto source = [&](int64_t i) { return (const T*)b.at(segment.experts[group.experts[i]].out); };
      mix<T, units>(count, weight, source, nullptr, segment.units[group.units[0]].out.width, b.ld,
                    [&](int u) { return out[u]; });
    });
  }
  static void copy(const Block<T>& b, const Part& part, int64_t at, const Panel& to) {
    memcpy(b.at(to) + at * b.ld, b.at(part.from) + part.first * b.ld, part.width * b.ld * sizeof(T));
  }
  static void output(const Block<T>& b, const Panel& from, T* to, int64_t stride) {
    transpose(b.at(from), b.ld, from.width, b.rows, to, stride, from.width);
  }
};

struct RowByRow {
  static int64_t lanes_of(int64_t) { return few_rows; }
  static float* line(const Block<float>& b, const Panel& p, int64_t r) { return b.at(p) + r * padded(p.width); }

  static void input(const Block<float>& b, int64_t slot, const Panel& to) {
    const float* x = b.call.x + b.row * b.call.row_stride + slot * b.call.slot_stride;
    for (int64_t r = 0; r < few_rows; r++)
      if (r < b.rows)
        memcpy(line(b, to, r), x + r * b.call.row_stride, to.width * sizeof(float));
      else
        memset(line(b, to, r), 0, to.width * sizeof(float));
  }
  static void stage(const Block<float>& b, const Stage& linear) {
    Product<float> p = product(b, linear);
    p.ldb = padded(linear.in.width);
    p.ldc = padded(linear.n);
    const int64_t rows = with_few_rows(b.rows, [&](auto r) { few<r>(p, linear.n); });
    if (!p.relu && linear.act != Act::identity)
      activate<float>(linear.act, float(linear.parameter), p.c, p.c, rows * p.ldc);
  }
  // The logits are transposed, so that softmax and mixing weights are computed by the same code,
  // and come out in the same bits.
  static void weights(const Block<float>& b, const UnitPlan& unit) {
    float* p = b.workspace;
    if (unit.gate.stages.count) {
      for (int64_t e = 0; e < unit.p.width; e++)
        for (int64_t r = 0; r < lane_multiple; r++)
          p[e * lane_multiple + r] = r < b.rows ? line(b, unit.gate.out, r)[e] : 0.0f;
      softmax(p, float(unit.factor), unit.p.width, lane_multiple, p);
    }
    mixing_weights(unit.reads, b.call.params, p, lane_multiple, b.at(unit.w));
  }
  static int64_t weight_lanes(const Block<float>&) { return lane_multiple; }
  static void combine(const Block<float>& b, const Segment& segment, const UnitGroup& group) {
    constexpr int lanes = Lanes<float>::count;
    for (int u : group.units) {
      const UnitPlan& unit = segment.units[u];
      const float* w = b.at(unit.w);
      for (int64_t r = 0; r < b.rows; r++)
        for (int64_t n = 0; n < unit.out.width; n += lanes) {
          vec<float> sum = splat<float>(0);
          for (int64_t i = 0; i < unit.reads.count; i++)
            sum =
                sum + w[i * lane_multiple + r] * load<float>(line(b, segment.experts[unit.reads[i].expert].out, r) + n);
          store<float>(line(b, unit.out, r) + n, sum);
        }
    }
  }
  static void copy(const Block<float>& b, const Part& part, int64_t at, const Panel& to) {
    for (int64_t r = 0; r < b.rows; r++)
      memcpy(line(b, to, r) + at, line(b, part.from, r) + part.first, part.width * sizeof(float));
  }
  static void output(const Block<float>& b, const Panel& from, float* to, int64_t stride) {
    for (int64_t r = 0; r < b.rows; r++) memcpy(to + r * stride, line(b, from, r), from.width * sizeof(float));
  }
};

// weights[row, column + e] = w of expert e, zero outside reads and in units that nothing depends
// on.
template <class T>
void write_weights(const Block<T>& b, const Segment& segment, const UnitPlan& unit, const T* w, int64_t lanes) {
  for (int64_t r = 0; r < b.rows; r++) {
    T* to = b.call.weights + (b.row + r) * b.plan.graph.mixing + unit.weights;
    for (int64_t e = 0; e < segment.experts.count; e++) to[e] = 0;
    for (int64_t i = 0; i < unit.reads.count; i++) to[unit.reads[i].expert] = w[i * lanes + r];
  }
}

// The concatenations that an MLP or a gate is the first to read.
template <class Layout, class T>
void gather(const Block<T>& b, const Span<Gather>& gathers) {
  for (const Gather& joined : gathers) {
    int64_t at = 0;
    for (const Part& part : joined.parts) {
      Layout::copy(b, part, at, joined.to);
      at += part.width;
    }
  }
}

template <class Layout, class T>
void run_mlp(const Block<T>& b, const Mlp& mlp) {
  gather<Layout>(b, mlp.gather);
  for (const Stage& stage : mlp.stages) Layout::stage(b, stage);
}

template <class Layout, class T>
void run_experts(const Block<T>& b, const Segment& segment) {
  for (int e : segment.order) run_mlp<Layout>(b, segment.experts[e]);
}

template <class Layout, class T>
void read_inputs(const Block<T>& b) {
  for (int64_t s = 0; s < b.plan.inputs.count; s++)
    if (s == 0 || !b.plan.expanded) Layout::input(b, s, b.plan.inputs[s]);
}

template <class T, class Layout>
void run_segment(const Block<T>& b, const Segment& segment) {
  run_experts<Layout>(b, segment);
  for (const UnitPlan& unit : segment.units) {
    if (unit.reads.count < 0) {
      if (b.call.weights) write_weights<T>(b, segment, unit, nullptr, 0);
      continue;
    }
    run_mlp<Layout>(b, unit.gate);
    gather<Layout>(b, unit.gathers);
    Layout::weights(b, unit);
    if (b.call.weights) write_weights<T>(b, segment, unit, b.at(unit.w), Layout::weight_lanes(b));
  }
  for (const UnitGroup& group : segment.unit_groups) Layout::combine(b, segment, group);
  if (!b.plan.linear)
    for (const UnitPlan& unit : segment.units)
      if (unit.reads.count >= 0) beside_the_mix(b, segment, unit);
}

template <class T, class Layout>
void forward(const Plan& plan, const Call<T>& call, int64_t row, int64_t rows, T* scratch) {
  const int64_t ld = Layout::lanes_of(rows);
  T* saved = plan.training ? call.saved_of(plan, row) : scratch;
  Block<T> b{plan, call, row, rows, ld, saved, scratch, scratch + plan.scratch * ld};
  read_inputs<Layout>(b);
  for (const Segment& segment : plan.segments) run_segment<T, Layout>(b, segment);
  const Span<UnitPlan>& last = plan.segments[plan.segments.count - 1].units;
  if (plan.towers.count == 0) {
    const int64_t width = last[0].out.width, stride = last.count * width;
    for (int64_t u = 0; u < last.count; u++)
      Layout::output(b, last[u].out, call.out + row * stride + u * width, stride);
    return;
  }
  const int64_t width = plan.towers[0].mlp.out.width, stride = plan.towers.count * width;
  for (int64_t t = 0; t < plan.towers.count; t++) {
    const Tower& tower = plan.towers[t];
    run_mlp<Layout>(b, tower.mlp);
    Layout::output(b, tower.mlp.out, call.out + row * stride + t * width, stride);
  }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
