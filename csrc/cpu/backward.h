// The backward: row blocks bring the gradients of every pre-activation and of x; then the
// parameters' gradients are summed, linear by linear and tile by tile, over a chunk of rows. Both orders
// are functions of the batch size alone, not of the threads.
#pragma once
#include "forward.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// to += from, panels of so many columns.
template <class T>
void add_panel(const BackwardBlock<T>& b, const T* from, int64_t width, T* to) {
  for (int64_t i = 0; i < width * b.ld; i += Lanes<T>::count) store<T>(to + i, load<T>(to + i) + load<T>(from + i));
}

// The gradient of a stage without a linear map, to the stage before it or to what the MLP reads. A
// LayerNorm has left that of its input there or behind the workspace's first panel.
template <class T>
void hand_down(const BackwardBlock<T>& b, const Mlp& mlp, int64_t j, const T* d_z) {
  const Stage& stage = mlp.stages[j];
  const bool norm = stage.kind == graph::StageKind::norm;
  if (j == 0)
    add_panel(b, norm ? b.workspace + b.plan.widest * b.ld : d_z, stage.k, b.d(mlp.d_in));
  else if (!norm)
    memcpy(b.d_z(mlp.stages[j - 1]), d_z, stage.k * b.ld * sizeof(T));
}

// From the gradient of the MLP's output, which stands in the dz of its last linear, down to that of
// its input, which is added.
template <class Operands, class T>
void backward_mlp(const BackwardBlock<T>& b, const Mlp& mlp) {
  for (int64_t j = mlp.stages.count; j-- > 0;) {
    const Stage& stage = mlp.stages[j];
    T* d_z = b.d_z(stage);
    const bool linear = stage.kind == graph::StageKind::linear;
    differentiated(b, stage, d_z);
    if (linear && b.call.transposed) Operands::store_dz(b, (const T*)d_z, stage);
    if (stage.d_beta >= 0) b.store_rows(d_z, stage.d_beta, stage.n);
    if (stage.kind == graph::StageKind::norm)
      layer_norm_backward<T>(b, stage, d_z, j > 0 ? b.d_z(mlp.stages[j - 1]) : b.workspace + b.plan.widest * b.ld);
    if (j == 0 && (mlp.d_in < 0 || (mlp.reads_x && !b.call.d_x))) return;
    // Each linear's sum by itself, then added: as accurate as PyTorch, where one chain through all
    // experts is not.
    if (linear)
      Operands::d_input(b, stage, d_z, j > 0 ? b.d_z(mlp.stages[j - 1]) : b.d(mlp.d_in), j == 0);
    else
      hand_down(b, mlp, j, d_z);
  }
}

// dw of an expert for every unit that reads it: the panels of its output are read once for all.
template <class T>
void dots(const BackwardBlock<T>& b, const Segment& segment, int expert) {
  const Span<Use>& uses = segment.uses[expert];
  const Panel& out = segment.experts[expert].out;
  in_groups<shared_numbers>(0, uses.count, [&](int64_t first, auto count) {
    const T* g[count];
    T* dw[count];
    for (int u = 0; u < count; u++) {
      const UnitPlan& unit = segment.units[uses[first + u].unit];
      g[u] = b.d(unit.d_out);
      dw[u] = b.d(unit.d_w + unit.reads.count + uses[first + u].read);
    }
    dot<T, count>([&](int u) { return g[u]; }, b.at(out), out.width, b.ld, [&](int u) { return dw[u]; });
  });
}

template <class Operands, class T>
void backward_unit(const BackwardBlock<T>& b, const UnitPlan& unit) {
  const T* p = b.at(unit.p);
  T* w = b.d(unit.d_w);
  T* dw = w + unit.reads.count * b.ld;
  mixing_weights(unit.reads, b.call.params, p, b.ld, w);
  // Not a product with zero, which is NaN where an expert's output is infinite.
  if (!unit.differentiated) memset(dw, 0, unit.reads.count * b.ld * sizeof(T));
  for (int64_t i = 0; i < unit.reads.count; i++) {
    const Read& read = unit.reads[i];
    T* to = dw + i * b.ld;
    if (b.call.d_weights)
      for (int64_t r = 0; r < b.rows; r++)
        to[r] += b.call.d_weights[(b.row + r) * b.plan.graph.mixing + unit.weights + read.expert];
    if (read.d_static >= 0) memcpy(b.chunk_row(read.d_static), to, b.rows * sizeof(T));
  }
  if (unit.p.width == 0) return;
  const bool linear = unit.gate.stages.count > 0;
  T* d_z = linear ? b.d_z(unit.gate.stages[unit.gate.stages.count - 1]) : b.d_linears;
  // What a route leaves out has no gradient.
  if (unit.open.count) memset(d_z, 0, unit.p.width * b.ld * sizeof(T));
  softmax_backward<T>(unit.reads, p, dw, T(unit.factor), b.ld, d_z);
  if (linear)
    backward_mlp<Operands>(b, unit.gate);
  else
    other_logits_backward(b, unit, (const T*)d_z);
}

// Concatenations: their gradients begin at zero, and go to what they were gathered from.
template <class T>
void clear_gathered(const BackwardBlock<T>& b, const Span<Gather>& gathers) {
  for (const Gather& joined : gathers)
    if (joined.d >= 0) b.clear(joined.d, joined.to.width);
}
template <class T>
void scatter(const BackwardBlock<T>& b, const Span<Gather>& gathers) {
  for (const Gather& joined : gathers) {
    if (joined.d < 0) continue;
    const T* from = b.d(joined.d);
    for (const Part& part : joined.parts) {
      if (part.d >= 0 && (!part.reads_x || b.call.d_x)) add_panel(b, from, part.width, b.d(part.d) + part.first * b.ld);
      from += part.width * b.ld;
    }
  }
}

// Row-major copies of what the linears read, for the reduction over rows.
template <class Operands, class T>
void transpose_inputs(const BackwardBlock<T>& b, const Span<TransposedInput>& transposes) {
  if (!b.call.transposed) return;
  for (const TransposedInput& transposed_input : transposes) {
    T* to = b.call.transposed + transposed_input.to * b.call.transposed_rows;
    if (transposed_input.slot >= 0) {
      Operands::transpose_rows(b, b.call.x + b.row * b.call.row_stride + transposed_input.slot * b.call.slot_stride,
                               transposed_input.from.width, to);
      continue;
    }
    T* from = b.at(transposed_input.from);
    if (transposed_input.stage) {
      activated(b, *transposed_input.stage, (const T*)from, b.workspace);
      from = b.workspace;
    }
    Operands::transpose_panel(b, from, transposed_input.from.width, to);
  }
}

// From the gradients of the units that read an expert, and of what else does, down to its sources.
template <class Operands, class T>
void backward_expert(const BackwardBlock<T>& b, const Segment& segment, int e) {
  const Mlp& mlp = segment.experts[e];
  // Others that read the concatenation it gathers may have a gradient.
  if (!mlp.differentiated) return scatter(b, mlp.gather);
  const Span<Use>& uses = segment.uses[e];
  const T* from_others = segment.d_expert[e] >= 0 ? b.d(segment.d_expert[e]) : nullptr;
  const bool copies = mlp.stages.count == 0;
  if (copies && mlp.d_in < 0) return;
  T* d = copies ? b.workspace : b.d_z(mlp.stages[mlp.stages.count - 1]);
  auto weight = [&](int, int64_t i) { return (const T*)b.d(segment.units[uses[i].unit].d_w + uses[i].read); };
  auto source = [&](int64_t i) { return (const T*)b.d(segment.units[uses[i].unit].d_out); };
  mix<T, 1>(uses.count, weight, source, from_others, mlp.out.width, b.ld, [&](int) { return d; });
  if (copies)
    add_panel(b, (const T*)d, mlp.out.width, b.d(mlp.d_in));
  else
    backward_mlp<Operands>(b, mlp);
  scatter(b, mlp.gather);
}

template <class Operands, class T>
void backward_segment(const BackwardBlock<T>& b, const Segment& segment) {
  if (b.plan.recompute) {
    run_experts<Transposed<T, Operands>>(b, segment);
    for (const UnitPlan& unit : segment.units) {
      gather<Transposed<T, Operands>>(b, unit.gate.gather);
      gather<Transposed<T, Operands>>(b, unit.gathers);
      for (int64_t j = 0; j + 1 < unit.gate.stages.count; j++)
        Transposed<T, Operands>::stage(b, unit.gate.stages[j]);
    }
  }
  transpose_inputs<Operands>(b, segment.transposes);
  for (int e : segment.order) {
    const Mlp& mlp = segment.experts[e];
    clear_gathered(b, mlp.gather);
    if (mlp.stages.count) {
      const Stage& last = mlp.stages[mlp.stages.count - 1];
      if (b.at(last.out) != b.at(last.z)) activated(b, last, (const T*)b.at(last.z), b.at(last.out));
    }
    if (segment.d_expert[e] >= 0) b.clear(segment.d_expert[e], mlp.out.width);
    dots(b, segment, e);
  }
  for (const UnitPlan& unit : segment.units) {
    clear_gathered(b, unit.gate.gather);
    clear_gathered(b, unit.gathers);
  }
  for (const UnitPlan& unit : segment.units) {
    if (unit.reads.count < 0) continue;
    backward_unit<Operands>(b, unit);
    if (!b.plan.linear && unit.differentiated) beside_the_mix_backward(b, segment, unit);
  }
  for (const UnitPlan& unit : segment.units) {
    scatter(b, unit.gate.gather);
    scatter(b, unit.gathers);
  }
  // An expert may read those before it.
  for (int64_t i = segment.order.count; i-- > 0;) backward_expert<Operands>(b, segment, segment.order[i]);
}

template <class Operands, class T>
void backward_towers(const BackwardBlock<T>& b) {
  const Plan& plan = b.plan;
  const int64_t width = plan.towers[0].mlp.out.width, stride = plan.towers.count * width;
  if (!plan.recompute) transpose_inputs<Operands>(b, plan.tower_transposes);
  for (int64_t t = 0; t < plan.towers.count; t++) {
    const Mlp& tower = plan.towers[t].mlp;
    const Stage& top = tower.stages[tower.stages.count - 1];
    if (b.plan.recompute) run_mlp<Transposed<T, Operands>>(b, tower);
    transpose(b.call.d_out + b.row * stride + t * width, stride, b.rows, width, b.d_z(top), b.ld, b.ld);
    clear_gathered(b, tower.gather);
    backward_mlp<Operands>(b, tower);
    scatter(b, tower.gather);
  }
  // The towers of a table have panels of their own, so that all are still there.
  if (plan.recompute) transpose_inputs<Operands>(b, plan.tower_transposes);
}

template <class T, class Operands>
void backward(const Plan& plan, const Call<T>& call, int64_t row, int64_t rows, T* scratch) {
  const int64_t ld = padded(rows);
  T* d_panels = scratch + plan.scratch * ld;
  T* d_linears = d_panels + plan.d_scratch * ld;
  BackwardBlock<T> b{{plan, call, row, rows, ld, call.saved_of(plan, row), scratch, d_linears + plan.d_linears * ld},
                     d_panels,
                     d_linears};
  const int64_t last = plan.segments.count - 1;
  if (plan.recompute || plan.backward_reads_inputs) read_inputs<Transposed<T, Operands>>(b);
  for (int64_t l = 0; l <= last; l++)
    for (const UnitPlan& unit : plan.segments[l].units)
      if (unit.reads.count >= 0 && (l < last || plan.towers.count)) b.clear(unit.d_out, unit.out.width);
  const int64_t width = plan.inputs[0].width, stride = plan.d_inputs.count * width;
  for (int64_t s = 0; s < plan.d_inputs.count && call.d_x; s++) b.clear(plan.d_inputs[s], width);
  if (plan.towers.count) {
    backward_towers<Operands>(b);
  } else {
    const Span<UnitPlan>& units = plan.segments[last].units;
    const int64_t columns = units[0].out.width;
    for (int64_t u = 0; u < units.count; u++)
      transpose(call.d_out + (row * units.count + u) * columns, units.count * columns, rows, columns,
                b.d(units[u].d_out), ld, ld);
  }
  for (int64_t l = last; l >= 0; l--) backward_segment<Operands>(b, plan.segments[l]);
  for (int64_t s = 0; s < plan.d_inputs.count && call.d_x; s++)
    transpose(b.d(plan.d_inputs[s]), ld, width, rows, call.d_x + row * stride + s * width, stride, width);
}

// dW[n, k] (+)= sum over rows of dz[n, row] x[row, k], and db, of linear maps that share parameters.
template <class T, class Operands>
void linear_gradient(const Plan&, const Call<T>& call, const LinearTask& task, int64_t chunk, bool fresh) {
  for (const Stage* stage : task.stages) {
    if (T* d_weight = call.grads[stage->weight])
      Operands::weight_gradient(call, *stage, task.first, task.rows, chunk, d_weight,
                                !(fresh && stage->first_of_weight));
    T* d_bias = stage->bias >= 0 ? call.grads[stage->bias] : nullptr;
    for (int64_t n = task.first; n < task.first + task.rows && d_bias; n++) {
      T sum = Operands::sum((const T*)call.d_z + (stage->d_z + n) * call.chunk, chunk);
      d_bias[n] = fresh && stage->first_of_bias ? sum : d_bias[n] + sum;
    }
  }
}

// Sums over the chunk's rows, added to elements of parameters; the caller has zeroed the tensors.
template <class T>
void row_sums(const Plan& plan, const Call<T>& call, int64_t chunk) {
  for (const RowSum& sum : plan.row_sums)
    if (T* d = call.grads[sum.parameter])
      d[sum.element] += NativeOperands::sum((const T*)call.d_z + sum.row * call.chunk, chunk);
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
