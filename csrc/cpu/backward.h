// The backward: row blocks bring the gradients of every pre-activation and of x; then the parameters' gradients are summed, map by
// map and tile by tile, over a chunk of rows. Both orders are functions of the batch size alone, not of the threads.
#pragma once
#include "forward.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// A block of backward: its panels of gradients.
template <class T>
struct BackwardBlock : Block<T> {
  T* d_panels;
  T* d_steps;

  T* d(int64_t offset) const { return d_panels + offset * this->ld; }
  T* d_z(const Step& step) const { return d_steps + step.d * this->ld; }
  void clear(int64_t offset, int64_t width) const { memset(d(offset), 0, width * this->ld * sizeof(T)); }
};

// From the gradient of the chain's output, which stands in the dz of its last step, down to that of its input, which is added.
template <class Operands, class T>
void backward_chain(const BackwardBlock<T>& b, const Chain& chain) {
  for (int64_t j = chain.steps.count; j-- > 0;) {
    const Step& step = chain.steps[j];
    differentiate<T>(step.act, T(step.parameter), b.at(step.z), b.d_z(step), step.n * b.ld);
    if (b.call.turned) Operands::keep(b, (const T*)b.d_z(step), step);
    if (j == 0 && chain.reads_x && !b.call.d_x) return;
    // Each map's sum by itself, then added: as accurate as PyTorch, where one chain through all experts is not.
    Operands::d_input(b, step, b.d_z(step), j > 0 ? b.d_z(chain.steps[j - 1]) : b.d(chain.d_in), j == 0);
  }
}

// dw of an expert for every unit that reads it: the panels of its output are read once for all.
template <class T>
void dots(const BackwardBlock<T>& b, const Stage& stage, int expert) {
  const Span<Use>& uses = stage.uses[expert];
  const Panel& out = stage.experts[expert].out;
  in_groups<shared_numbers>(0, uses.count, [&](int64_t first, auto count) {
    const T* g[count];
    T* dw[count];
    for (int u = 0; u < count; u++) {
      const Mix& unit = stage.units[uses[first + u].unit];
      g[u] = b.d(unit.d_out);
      dw[u] = b.d(unit.d_w + unit.reads.count + uses[first + u].read);
    }
    dot<T, count>([&](int u) { return g[u]; }, b.at(out), out.width, b.ld, [&](int u) { return dw[u]; });
  });
}

template <class Operands, class T>
void backward_unit(const BackwardBlock<T>& b, const Mix& unit) {
  const T* p = b.at(unit.p);
  T* w = b.d(unit.d_w);
  T* dw = w + unit.reads.count * b.ld;
  mixing_weights(unit.reads, b.call.params, p, b.ld, w);
  for (int64_t i = 0; i < unit.reads.count; i++) {
    const Read& read = unit.reads[i];
    T* to = dw + i * b.ld;
    if (b.call.d_weights)
      for (int64_t r = 0; r < b.rows; r++) to[r] += b.call.d_weights[(b.row + r) * b.plan.table.mixing + unit.weights + read.expert];
    if (read.d_static >= 0) memcpy(b.chunk_row(read.d_static), to, b.rows * sizeof(T));
  }
  if (unit.gate.steps.count == 0) return;
  softmax_backward<T>(unit.reads, p, dw, b.ld, b.d_z(unit.gate.steps[unit.gate.steps.count - 1]));
  backward_chain<Operands>(b, unit.gate);
}

// Row-major copies of what the maps read, for the reduction over rows.
template <class Operands, class T>
void turn_inputs(const BackwardBlock<T>& b, const Span<Turn>& turns) {
  if (!b.call.turned) return;
  for (const Turn& turn : turns) {
    T* to = b.call.turned + turn.to * b.call.turned_rows;
    if (turn.slot >= 0) {
      Operands::turn_rows(b, b.call.x + b.row * b.call.row_stride + turn.slot * b.call.slot_stride, turn.from.width, to);
      continue;
    }
    T* from = b.at(turn.from);
    if (turn.step) {
      activate<T>(turn.step->act, T(turn.step->parameter), from, b.spare, turn.from.width * b.ld);
      from = b.spare;
    }
    Operands::turn_panel(b, from, turn.from.width, to);
  }
}

template <class Operands, class T>
void backward_stage(const BackwardBlock<T>& b, const Stage& stage) {
  if (b.plan.recompute) {
    run_experts<Transposed<T, Operands>>(b, stage);
    for (const Mix& unit : stage.units)
      for (int64_t j = 0; j + 1 < unit.gate.steps.count; j++) Transposed<T, Operands>::map(b, unit.gate.steps[j]);
  }
  turn_inputs<Operands>(b, stage.turns);
  for (int e : stage.order) {
    const Step& last = stage.experts[e].steps[stage.experts[e].steps.count - 1];
    if (b.at(last.out) != b.at(last.z)) activate<T>(last.act, T(last.parameter), b.at(last.z), b.at(last.out), last.n * b.ld);
    if (stage.d_expert[e] >= 0) b.clear(stage.d_expert[e], last.n);
    dots(b, stage, e);
  }
  for (const Mix& unit : stage.units)
    if (unit.reads.count >= 0) backward_unit<Operands>(b, unit);
  for (int e : stage.order) {
    const Chain& chain = stage.experts[e];
    const Span<Use>& uses = stage.uses[e];
    const T* from_selectors = stage.d_expert[e] >= 0 ? b.d(stage.d_expert[e]) : nullptr;
    auto weight = [&](int, int64_t i) { return (const T*)b.d(stage.units[uses[i].unit].d_w + uses[i].read); };
    auto source = [&](int64_t i) { return (const T*)b.d(stage.units[uses[i].unit].d_out); };
    T* d_z = b.d_z(chain.steps[chain.steps.count - 1]);
    mix<T, 1>(uses.count, weight, source, from_selectors, chain.out.width, b.ld, [&](int) { return d_z; });
    backward_chain<Operands>(b, chain);
  }
}

template <class Operands, class T>
void backward_towers(const BackwardBlock<T>& b) {
  const Plan& plan = b.plan;
  const Span<Mix>& last = plan.stages[plan.stages.count - 1].units;
  for (const Mix& unit : last)
    if (unit.reads.count >= 0) b.clear(unit.d_out, unit.out.width);
  const int64_t width = plan.towers[0].chain.out.width, stride = plan.towers.count * width;
  if (!plan.recompute) turn_inputs<Operands>(b, plan.tower_turns);
  for (int64_t t = 0; t < plan.towers.count; t++) {
    const Tower& tower = plan.towers[t];
    const Step& top = tower.chain.steps[tower.chain.steps.count - 1];
    const bool many = tower.units.count > 1;
    if (b.plan.recompute) run_tower<Transposed<T, Operands>>(b, tower);
    transpose(b.call.d_out + b.row * stride + t * width, stride, b.rows, width, b.d_z(top), b.ld, b.ld);
    if (many) b.clear(tower.chain.d_in, tower.in.width);
    backward_chain<Operands>(b, tower.chain);
    const T* from = b.d(tower.chain.d_in);
    if (many)
      for (int u : tower.units) {
        const int64_t n = last[u].out.width * b.ld;
        T* to = b.d(last[u].d_out);
        for (int64_t i = 0; i < n; i += Lanes<T>::count) store<T>(to + i, load<T>(to + i) + load<T>(from + i));
        from += n;
      }
  }
  // The towers of a table have panels of their own, so that all are still there.
  if (plan.recompute) turn_inputs<Operands>(b, plan.tower_turns);
}

template <class T, class Operands>
void backward(const Plan& plan, const Call<T>& call, int64_t row, int64_t rows, T* scratch) {
  const int64_t ld = padded(rows);
  T* d_panels = scratch + plan.scratch * ld;
  T* d_steps = d_panels + plan.d_scratch * ld;
  BackwardBlock<T> b{{plan, call, row, rows, ld, call.kept_of(plan, row), scratch, d_steps + plan.d_steps * ld}, d_panels, d_steps};
  const Span<Mix>& last = plan.stages[plan.stages.count - 1].units;
  if (plan.recompute) read_inputs<Transposed<T, Operands>>(b);
  if (plan.towers.count) {
    backward_towers<Operands>(b);
  } else {
    const int64_t width = last[0].out.width, stride = last.count * width;
    for (int64_t u = 0; u < last.count; u++) transpose(call.d_out + row * stride + u * width, stride, rows, width, b.d(last[u].d_out), ld, ld);
  }
  for (int64_t l = plan.stages.count; l-- > 0;) {
    if (l > 0)
      for (const Mix& below : plan.stages[l - 1].units)
        if (below.reads.count >= 0) b.clear(below.d_out, below.out.width);
    if (l == plan.stages.count - 1 && call.d_x)
      for (int64_t s = 0; s < plan.d_inputs.count; s++) b.clear(plan.d_inputs[s], plan.table.width);
    backward_stage<Operands>(b, plan.stages[l]);
  }
  const int64_t width = plan.table.width, stride = plan.table.slots * width;
  for (int64_t s = 0; s < plan.table.slots && call.d_x; s++)
    transpose(b.d(plan.d_inputs[s]), ld, width, rows, call.d_x + row * stride + s * width, stride, width);
}

// dW[n, k] (+)= sum over rows of dz[n, row] x[row, k], and db.
template <class T, class Operands>
void map_gradient(const Plan&, const Call<T>& call, const MapTask& task, int64_t chunk, bool fresh) {
  const Step& step = *task.map;
  if (T* d_weight = call.grads[step.weight]) Operands::weight_gradient(call, step, task.first, task.rows, chunk, d_weight, !fresh);
  T* d_bias = step.bias >= 0 ? call.grads[step.bias] : nullptr;
  for (int64_t n = task.first; n < task.first + task.rows && d_bias; n++) {
    T sum = Operands::sum((const T*)call.d_z + (step.d_z + n) * call.chunk, chunk);
    d_bias[n] = fresh ? sum : d_bias[n] + sum;
  }
}

// dv += sum over rows of dw, over the elements that some unit uses; the caller has zeroed the tensors.
template <class T>
void static_gradient(const Plan& plan, const Call<T>& call, int64_t chunk) {
  for (const Stage& stage : plan.stages)
    for (const Mix& unit : stage.units)
      for (int64_t i = 0; i < unit.reads.count; i++) {
        const Read& read = unit.reads[i];
        if (read.d_static >= 0 && call.grads[read.parameter])
          call.grads[read.parameter][read.element] += Exact::sum((const T*)call.d_z + read.d_static * call.chunk, chunk);
      }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
