// The backward: row blocks bring the gradients of every pre-activation and of x; then the
// parameters' gradients are summed, linear by linear and tile by tile, over a chunk of rows. Both orders
// are functions of the batch size alone, not of the threads.
#pragma once
#include "forward.h"

namespace fusedmoe::cpu::FUSEDMOE_ISA {

// A block of backward: its panels of gradients.
template <class T>
struct BackwardBlock : Block<T> {
  T* d_panels;
  T* d_linears;

  T* d(int64_t offset) const { return d_panels + offset * this->ld; }
  T* d_z(const Linear& linear) const { return d_linears + linear.d * this->ld; }
  void clear(int64_t offset, int64_t width) const { memset(d(offset), 0, width * this->ld * sizeof(T)); }
};

// From the gradient of the MLP's output, which stands in the dz of its last linear, down to that of
// its input, which is added.
template <class Operands, class T>
void backward_mlp(const BackwardBlock<T>& b, const Mlp& mlp) {
  for (int64_t j = mlp.linears.count; j-- > 0;) {
    const Linear& linear = mlp.linears[j];
    differentiate<T>(linear.act, T(linear.parameter), b.at(linear.z), b.d_z(linear), linear.n * b.ld);
    if (b.call.transposed) Operands::store_dz(b, (const T*)b.d_z(linear), linear);
    if (j == 0 && mlp.reads_x && !b.call.d_x) return;
    // Each linear's sum by itself, then added: as accurate as PyTorch, where one chain through all
    // experts is not.
    Operands::d_input(b, linear, b.d_z(linear), j > 0 ? b.d_z(mlp.linears[j - 1]) : b.d(mlp.d_in), j == 0);
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
  for (int64_t i = 0; i < unit.reads.count; i++) {
    const Read& read = unit.reads[i];
    T* to = dw + i * b.ld;
    if (b.call.d_weights)
      for (int64_t r = 0; r < b.rows; r++)
        to[r] += b.call.d_weights[(b.row + r) * b.plan.table.mixing + unit.weights + read.expert];
    if (read.d_static >= 0) memcpy(b.chunk_row(read.d_static), to, b.rows * sizeof(T));
  }
  if (unit.gate.linears.count == 0) return;
  softmax_backward<T>(unit.reads, p, dw, b.ld, b.d_z(unit.gate.linears[unit.gate.linears.count - 1]));
  backward_mlp<Operands>(b, unit.gate);
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
    if (transposed_input.linear) {
      activate<T>(transposed_input.linear->act, T(transposed_input.linear->parameter), from, b.workspace,
                  transposed_input.from.width * b.ld);
      from = b.workspace;
    }
    Operands::transpose_panel(b, from, transposed_input.from.width, to);
  }
}

template <class Operands, class T>
void backward_segment(const BackwardBlock<T>& b, const Segment& segment) {
  if (b.plan.recompute) {
    run_experts<Transposed<T, Operands>>(b, segment);
    for (const UnitPlan& unit : segment.units)
      for (int64_t j = 0; j + 1 < unit.gate.linears.count; j++)
        Transposed<T, Operands>::linear(b, unit.gate.linears[j]);
  }
  transpose_inputs<Operands>(b, segment.transposes);
  for (int e : segment.order) {
    const Linear& last = segment.experts[e].linears[segment.experts[e].linears.count - 1];
    if (b.at(last.out) != b.at(last.z))
      activate<T>(last.act, T(last.parameter), b.at(last.z), b.at(last.out), last.n * b.ld);
    if (segment.d_expert[e] >= 0) b.clear(segment.d_expert[e], last.n);
    dots(b, segment, e);
  }
  for (const UnitPlan& unit : segment.units)
    if (unit.reads.count >= 0) backward_unit<Operands>(b, unit);
  for (int e : segment.order) {
    const Mlp& mlp = segment.experts[e];
    const Span<Use>& uses = segment.uses[e];
    const T* from_selectors = segment.d_expert[e] >= 0 ? b.d(segment.d_expert[e]) : nullptr;
    auto weight = [&](int, int64_t i) { return (const T*)b.d(segment.units[uses[i].unit].d_w + uses[i].read); };
    auto source = [&](int64_t i) { return (const T*)b.d(segment.units[uses[i].unit].d_out); };
    T* d_z = b.d_z(mlp.linears[mlp.linears.count - 1]);
    mix<T, 1>(uses.count, weight, source, from_selectors, mlp.out.width, b.ld, [&](int) { return d_z; });
    backward_mlp<Operands>(b, mlp);
  }
}

template <class Operands, class T>
void backward_towers(const BackwardBlock<T>& b) {
  const Plan& plan = b.plan;
  const Span<UnitPlan>& last = plan.segments[plan.segments.count - 1].units;
  for (const UnitPlan& unit : last)
    if (unit.reads.count >= 0) b.clear(unit.d_out, unit.out.width);
  const int64_t width = plan.towers[0].mlp.out.width, stride = plan.towers.count * width;
  if (!plan.recompute) transpose_inputs<Operands>(b, plan.tower_transposes);
  for (int64_t t = 0; t < plan.towers.count; t++) {
    const Tower& tower = plan.towers[t];
    const Linear& top = tower.mlp.linears[tower.mlp.linears.count - 1];
    const bool many = tower.units.count > 1;
    if (b.plan.recompute) run_tower<Transposed<T, Operands>>(b, tower);
    transpose(b.call.d_out + b.row * stride + t * width, stride, b.rows, width, b.d_z(top), b.ld, b.ld);
    if (many) b.clear(tower.mlp.d_in, tower.in.width);
    backward_mlp<Operands>(b, tower.mlp);
    const T* from = b.d(tower.mlp.d_in);
    if (many)
      for (int u : tower.units) {
        const int64_t n = last[u].out.width * b.ld;
        T* to = b.d(last[u].d_out);
        for (int64_t i = 0; i < n; i += Lanes<T>::count) store<T>(to + i, load<T>(to + i) + load<T>(from + i));
        from += n;
      }
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
  const Span<UnitPlan>& last = plan.segments[plan.segments.count - 1].units;
  if (plan.recompute) read_inputs<Transposed<T, Operands>>(b);
  if (plan.towers.count) {
    backward_towers<Operands>(b);
  } else {
    const int64_t width = last[0].out.width, stride = last.count * width;
    for (int64_t u = 0; u < last.count; u++)
      transpose(call.d_out + row * stride + u * width, stride, rows, width, b.d(last[u].d_out), ld, ld);
  }
  for (int64_t l = plan.segments.count; l-- > 0;) {
    if (l > 0)
      for (const UnitPlan& below : plan.segments[l - 1].units)
        if (below.reads.count >= 0) b.clear(below.d_out, below.out.width);
    if (l == plan.segments.count - 1 && call.d_x)
      for (int64_t s = 0; s < plan.d_inputs.count; s++) b.clear(plan.d_inputs[s], plan.table.width);
    backward_segment<Operands>(b, plan.segments[l]);
  }
  const int64_t width = plan.table.width, stride = plan.table.slots * width;
  for (int64_t s = 0; s < plan.table.slots && call.d_x; s++)
    transpose(b.d(plan.d_inputs[s]), ld, width, rows, call.d_x + row * stride + s * width, stride, width);
}

// dW[n, k] (+)= sum over rows of dz[n, row] x[row, k], and db.
template <class T, class Operands>
void linear_gradient(const Plan&, const Call<T>& call, const LinearTask& task, int64_t chunk, bool fresh) {
  const Linear& linear = *task.linear;
  if (T* d_weight = call.grads[linear.weight])
    Operands::weight_gradient(call, linear, task.first, task.rows, chunk, d_weight, !fresh);
  T* d_bias = linear.bias >= 0 ? call.grads[linear.bias] : nullptr;
  for (int64_t n = task.first; n < task.first + task.rows && d_bias; n++) {
    T sum = Operands::sum((const T*)call.d_z + (linear.d_z + n) * call.chunk, chunk);
    d_bias[n] = fresh ? sum : d_bias[n] + sum;
  }
}

// dv += sum over rows of dw, over the elements that some unit uses; the caller has zeroed the
// tensors.
template <class T>
void static_gradient(const Plan& plan, const Call<T>& call, int64_t chunk) {
  for (const Segment& segment : plan.segments)
    for (const UnitPlan& unit : segment.units)
      for (int64_t i = 0; i < unit.reads.count; i++) {
        const Read& read = unit.reads[i];
        if (read.d_static >= 0 && call.grads[read.parameter])
          call.grads[read.parameter][read.element] +=
              NativeOperands::sum((const T*)call.d_z + read.d_static * call.chunk, chunk);
      }
}

}  // namespace fusedmoe::cpu::FUSEDMOE_ISA
