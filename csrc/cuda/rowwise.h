// The row-wise operations of a segment in one launch; their twin in Triton, which reads the same
// plans: kernels/triton/rowwise.py. Formulas of the backward: fusedmoe/reference/operator.py.
//
// Grid: blocks of warps. A warp has one row and does all operations in the plan's order; lane l has
// columns l, l + 32, ... of a vector, and sums go over the lanes in the order of a butterfly.
//
//   gather   out = columns of vectors side by side
//   stage    out = s a(z)    z = h + b, or gamma o + beta with o = (h - mean(h)) l, l = 1 / sqrt(var(h) + eps);
//                            s = 1, or of a dropout 1 / (1 - its p) where a number is kept, else 0
//   mix      p = softmax of factor z, z a vector, a parameter or q . k; out = sum of (p + v) y
//   product  out = y y'
//   zero     gradients that the operations behind it add to
//
// What a row adds to the gradient of a parameter it leaves in dw, whose rows gradients.h sums.
#pragma once
#include "activation.h"
#include "philox.h"
#include "rowwise_mix.h"

namespace fusedmoe::cuda {

template <class T>
struct Rowwise : RowwiseRow<T> {
  using Row = RowwiseRow<T>;
  using Row::add, Row::block, Row::call, Row::gradients, Row::number, Row::parameter, Row::plan, Row::put, Row::put_dw,
      Row::value, Row::values;

  __device__ __forceinline__ void gather(int record) const {
    T* to = values(record + GatherRecord::place);
    each_part(record, [&](int part, int column, int width) {
      const T* from = values(part + PartRecord::place) + plan(part + PartRecord::first);
      each_column(width, [&](int c) { store_global(to + column + c, load_global(from + c)); });
    });
  }
  __device__ __forceinline__ void gather_backward(int record) const {
    const T* g = gradients(record + GatherRecord::place);
    each_part(record, [&](int part, int column, int width) {
      if (plan(part + PartRecord::sends) == 0) return;
      // Parts may have columns of the same vector.
      sync_warp();
      T* to = gradients(part + PartRecord::place) + plan(part + PartRecord::first);
      each_column(width, [&](int c) { add(to, c, value(g, column + c)); });
    });
  }
  // f(part, its first column in the result, its width).
  template <class F>
  __device__ __forceinline__ void each_part(int record, F&& f) const {
    int part = record + GatherRecord::size;
    FUSEDMOE_CUDA_ROLLED
    for (int left = plan(record + GatherRecord::parts); left > 0; left--, part += PartRecord::size)
      f(part, plan(part + PartRecord::column), plan(part + PartRecord::width));
  }

  // What lanes know of a stage.
  struct Stage {
    const T *h, *weight, *bias, *slope;
    int width, slopes, activation;
    float parameter, mean, scale;
    bool norm, drops;

    __device__ __forceinline__ float normal(int column) const { return (value(h, column) - mean) * scale; }
    __device__ __forceinline__ float z(int column) const {
      float z = norm ? normal(column) : value(h, column);
      if (weight) z *= value(weight, column);
      return bias ? z + value(bias, column) : z;
    }
    __device__ __forceinline__ float slope_of(int column) const { return value(slope, slopes * column); }
    __device__ __forceinline__ float activated(float z, int column) const {
      if (slope) return z > 0.0f ? z : slope_of(column) * z;
      choose(activation, [&](auto act) { z = act.value(z, parameter); });
      return z;
    }
    // d a'(z).
    __device__ __forceinline__ float through(float d, float z, int column) const {
      if (slope) return z > 0.0f ? d : slope_of(column) * d;
      // Chosen, not multiplied: an infinite d must not turn into NaN where a ReLU is off.
      if (Act(activation) == Act::relu) return z <= 0.0f ? 0.0f : d;
      choose(activation, [&](auto act) { d *= act.slope(z, parameter); });
      return d;
    }
  };
  __device__ __forceinline__ Stage stage_of(int record) const {
    using Of = StageRecord;
    Stage of{values(record + Of::source), parameter(record + Of::weight), parameter(record + Of::bias),
             parameter(record + Of::slope), plan(record + Of::width), plan(record + Of::slopes),
             plan(record + Of::activation), number(record + Of::parameter), 0.0f, 1.0f, plan(record + Of::norm) != 0,
             call.seed && plan(record + Of::stream) >= 0};
    if (!of.norm) return of;
    float sum = 0.0f, squares = 0.0f;
    each_column(of.width, [&](int column) { sum += value(of.h, column); });
    of.mean = sum_lanes(sum) / float(of.width);
    each_column(of.width, [&](int column) {
      const float off = value(of.h, column) - of.mean;
      squares += off * off;
    });
    of.scale = 1.0f / sqrtf(sum_lanes(squares) / float(of.width) + number(record + Of::eps));
    return of;
  }
  // s x: of a number that is dropped 0, whatever it is.
  __device__ __forceinline__ float dropped(const Stage& of, int record, int column, float x) const {
    if (!of.drops) return x;
    const int stream = plan(record + StageRecord::stream);
    const uint32_t word = random_word(uint64_t(load_global(call.seed)), block.row, column, stream);
    return word < uint32_t(plan(record + StageRecord::threshold)) ? 0.0f : x * number(record + StageRecord::scale);
  }

  __device__ __forceinline__ void stage(int record) const {
    const Stage of = stage_of(record);
    T* to = values(record + StageRecord::place);
    each_column(of.width, [&](int column) {
      put(to, column, dropped(of, record, column, of.activated(of.z(column), column)));
    });
  }
  __device__ __forceinline__ void stage_backward(int record) const {
    const Stage of = stage_of(record);
    const T* g = gradients(record + StageRecord::place);
    T* to = gradients(record + StageRecord::source);
    const int d_weight = plan(record + StageRecord::d_weight), d_bias = plan(record + StageRecord::d_bias),
              d_slope = plan(record + StageRecord::d_slope);
    float slope = 0.0f, mean = 0.0f, along = 0.0f;
    // Twice of a LayerNorm, whose means come first.
    FUSEDMOE_CUDA_ROLLED
    for (int pass = of.norm ? 0 : 1; pass < 2; pass++) {
      const bool first = pass == 0 || !of.norm;
      each_column(of.width, [&](int column) {
        const float z = of.z(column), o = of.norm ? of.normal(column) : 0.0f,
                    d = dropped(of, record, column, value(g, column));
        float d_z = of.through(d, z, column);
        if (first) {
          const float below = z > 0.0f || d == 0.0f ? 0.0f : d * z;
          if (of.slopes && d_slope >= 0) put_dw(d_slope + column, below);
          slope += below;
          if (d_bias >= 0) put_dw(d_bias + column, d_z);
          if (d_weight >= 0) put_dw(d_weight + column, d_z * o);
        }
        if (of.weight) d_z *= value(of.weight, column);
        if (pass == 1) add(to, column, of.norm ? of.scale * (d_z - mean - o * along) : d_z);
        else mean += d_z, along += d_z * o;
      });
      if (pass == 0) mean = sum_lanes(mean) / float(of.width), along = sum_lanes(along) / float(of.width);
    }
    slope = sum_lanes(slope);
    if (!of.slopes && d_slope >= 0 && lane() == 0) put_dw(d_slope, slope);
  }

  __device__ __forceinline__ void product(int record) const {
    const T *a = values(record + ProductRecord::a), *b = values(record + ProductRecord::b);
    T* to = values(record + ProductRecord::place);
    each_column(plan(record + ProductRecord::width),
                [&](int column) { put(to, column, value(a, column) * value(b, column)); });
  }
  __device__ __forceinline__ void product_backward(int record) const {
    const T *a = values(record + ProductRecord::a), *b = values(record + ProductRecord::b),
            *g = gradients(record + ProductRecord::place);
    T *d_a = gradients(record + ProductRecord::a), *d_b = gradients(record + ProductRecord::b);
    each_column(plan(record + ProductRecord::width), [&](int column) {
      add(d_a, column, value(g, column) * value(b, column));
      add(d_b, column, value(g, column) * value(a, column));
    });
  }
  __device__ __forceinline__ void zero(int record) const {
    T* to = gradients(record + ZeroRecord::place);
    each_column(plan(record + ZeroRecord::width), [&](int column) { put(to, column, 0.0f); });
  }

  template <bool BACKWARD>
  __device__ __forceinline__ void run() const {
    const RowwiseMix<T> mix{{call, block}};
    FUSEDMOE_CUDA_ROLLED
    for (int at = plan(call.place); at < plan(call.place + 1); at += OperationRecord::size) {
      const int kind = plan(at + OperationRecord::kind), record = plan(at + OperationRecord::record);
      // The warp sees what the operation before wrote.
      sync_warp();
      if (kind == gather_kind) BACKWARD ? gather_backward(record) : gather(record);
      else if (kind == stage_kind) BACKWARD ? stage_backward(record) : stage(record);
      else if (kind == mix_kind) BACKWARD ? mix.backward(record) : mix.forward(record);
      else if (kind == product_kind) BACKWARD ? product_backward(record) : product(record);
      else if (BACKWARD) zero(record);
    }
  }
};

template <class T, bool BACKWARD, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) rowwise_kernel(const __grid_constant__ RowwiseCall call) {
  if (BACKWARD && block_x() == 0)
    for (int i = thread(); i < call.of.tasks; i += THREADS) store_global(call.of.arrived + i, 0);
  const int64_t row = int64_t(block_x()) * (THREADS / 32) + warp();
  if (row < call.of.network.rows) Rowwise<T>{{call, {call.of.network, row, 1}}}.template run<BACKWARD>();
}

}  // namespace fusedmoe::cuda
