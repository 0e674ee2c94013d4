// One unit as a row-wise operation: what mixes vectors.
#pragma once
#include "rowwise_row.h"

namespace fusedmoe::cuda {

template <class T>
struct RowwiseMix : RowwiseRow<T> {
  using Row = RowwiseRow<T>;
  using Row::add, Row::block, Row::call, Row::gradients, Row::number, Row::parameter, Row::plan, Row::put, Row::put_dw,
      Row::value, Row::values;

  // What lanes know of a mix.
  struct Mix {
    int record, unit, reads, seen, width, logits;
    const T* channels;
  };
  __device__ __forceinline__ Mix mix_of(int record) const {
    const int unit = plan(record + MixRecord::unit);
    return {record,
            unit,
            plan(unit + UnitRecord::reads),
            plan(unit + UnitRecord::seen),
            plan(record + MixRecord::width),
            plan(record + MixRecord::logits),
            parameter(record + MixRecord::channels)};
  }
  static __device__ __forceinline__ int read_of(const Mix& of, int read) {
    return of.record + MixRecord::size + read * MixReadRecord::size;
  }
  __device__ __forceinline__ float* softmax(const Mix& of, int read) const {
    return block.softmax(plan(of.record + MixRecord::p) + read);
  }
  // The row of the mixing weights, or of their gradients; and where their columns stand, or -1.
  __device__ __forceinline__ T* weights() const {
    return static_cast<T*>(block.network.weights) + block.row * block.network.mixing;
  }
  __device__ __forceinline__ int mixing_of(const Mix& of) const {
    return block.network.weights ? plan(of.unit + UnitRecord::mixing) : -1;
  }
  // v of one read a column, or null.
  __device__ __forceinline__ const T* channels_of(const Mix& of, int read) const {
    const int element = of.channels ? plan(read_of(of, read) + MixReadRecord::element) : -1;
    return element < 0 ? nullptr : of.channels + element;
  }

  __device__ __forceinline__ void forward(int record) const {
    const Mix of = mix_of(record);
    store_logits(of);
    sync_warp();
    normalize(of);
    sync_warp();
    T* to = values(of.unit + UnitRecord::place);
    // So many columns of a lane at a time, for which the plan is asked once.
    constexpr int some = 4;
    FUSEDMOE_CUDA_ROLLED
    for (int first = lane(); first < of.width; first += 32 * some) {
      float sums[some] = {};
      const auto each = [&](auto&& f) {
        FUSEDMOE_CUDA_UNROLL
        for (int n = 0; n < some; n++)
          if (first + 32 * n < of.width) f(first + 32 * n, sums[n]);
      };
      FUSEDMOE_CUDA_ROLLED
      for (int read = 0; read < of.reads; read++) {
        const T *y = values(read_of(of, read) + MixReadRecord::place), *v = channels_of(of, read);
        const float w = load_global(softmax(of, read)) + block.static_weight(of.unit, read);
        each([&](int column, float& sum) { sum += (v ? w + value(v, column) : w) * value(y, column); });
      }
      each([&](int column, float& sum) { put(to, column, sum); });
    }
  }
  // Logits in place of p; of what is not seen, and so of all without a gate, they are -infinity.
  __device__ __forceinline__ void store_logits(const Mix& of) const {
    if (of.logits == key_logits) {
      FUSEDMOE_CUDA_ROLLED
      for (int read = 0; read < of.reads; read++) {
        float sum = 0.0f;
        if (plan(of.seen + read) >= 0) {
          const T *query = values(of.record + MixRecord::source), *key = values(read_of(of, read) + MixReadRecord::key);
          each_column(plan(of.record + MixRecord::columns),
                      [&](int column) { sum += value(query, column) * value(key, column); });
        }
        sum = sum_lanes(sum);
        if (lane() == 0) store_logit(of, read, sum);
      }
      return;
    }
    const T* from = of.logits == vector_logits ? values(of.record + MixRecord::source)
                    : of.logits == free_logits ? parameter(of.record + MixRecord::free)
                                               : nullptr;
    each_column(of.reads, [&](int read) {
      const int seen = plan(of.seen + read);
      store_logit(of, read, from && seen >= 0 ? value(from, seen) : 0.0f);
    });
  }
  __device__ __forceinline__ void store_logit(const Mix& of, int read, float z) const {
    store_global(softmax(of, read),
                 plan(of.seen + read) < 0 ? -INFINITY : number(of.record + MixRecord::factor) * z);
  }
  // p and the mixing weights.
  __device__ __forceinline__ void normalize(const Mix& of) const {
    const int mixing = mixing_of(of);
    float largest = -INFINITY, sum = 0.0f;
    each_column(of.reads, [&](int read) { largest = fmaxf(largest, load_global(softmax(of, read))); });
    largest = max_lanes(largest);
    each_column(of.reads, [&](int read) { sum += expf(load_global(softmax(of, read)) - largest); });
    sum = sum_lanes(sum);
    each_column(of.reads, [&](int read) {
      float* at = softmax(of, read);
      const float p = of.logits == no_logits ? 0.0f : expf(load_global(at) - largest) / sum;
      store_global(at, p);
      if (mixing >= 0) put(weights(), plan(mixing + read), p + block.static_weight(of.unit, read));
    });
  }

  __device__ __forceinline__ void backward(int record) const {
    const Mix of = mix_of(record);
    // d of the read that this lane has, of 32 at a time; the softmax takes its mean under p off, and
    // then what its rounding left of it.
    float d = 0.0f, off = 0.0f, rest = 0.0f;
    FUSEDMOE_CUDA_ROLLED
    for (int pass = 0; pass < (of.logits == no_logits ? 1 : 3); pass++) {
      float sum = 0.0f;
      FUSEDMOE_CUDA_ROLLED
      for (int first = 0; first < of.reads; first += 32) {
        // Of no more than 32 it is known from the first pass on.
        if (pass == 0 || of.reads > 32) d = weight_gradients(of, first, pass == 0);
        const float p = first + lane() < of.reads ? load_global(softmax(of, first + lane())) : 0.0f;
        // What is not seen has p = 0, and may have a d that is not finite.
        const float d_z = p != 0.0f ? p * (d - off - rest) : 0.0f;
        sum += d_z;
        if (pass == 2) logits_backward(of, first, d_z * number(of.record + MixRecord::factor));
      }
      (pass == 0 ? off : rest) = sum_lanes(sum);
    }
  }
  // dw of the read first + lane; where it is `sending`, also dy += (p + v) g, and to dw what learned
  // static weights get of g.
  __device__ __forceinline__ float weight_gradients(const Mix& of, int first, bool sending) const {
    const bool given = plan(of.record + MixRecord::given) != 0;
    const T* g = gradients(of.unit + UnitRecord::place);
    const int end = of.reads - first < 32 ? of.reads : first + 32, mine = first + lane();
    float d = 0.0f;
    FUSEDMOE_CUDA_ROLLED
    for (int read = first; given && read < end; read++) {
      const T *y = values(read_of(of, read) + MixReadRecord::place), *v = channels_of(of, read);
      T* to = gradients(read_of(of, read) + MixReadRecord::place);
      const float w = load_global(softmax(of, read)) + block.static_weight(of.unit, read);
      const int d_channels = plan(read_of(of, read) + MixReadRecord::d_channels);
      float sum = 0.0f;
      each_column(of.width, [&](int column) {
        const float from = value(g, column), product = from * value(y, column);
        sum += product;
        if (!sending) return;
        if (d_channels >= 0) put_dw(d_channels + column, product);
        add(to, column, (v ? w + value(v, column) : w) * from);
      });
      sum = sum_lanes(sum);
      if (read == mine) d = sum;
    }
    if (mine >= end) return 0.0f;
    const int dw = plan(of.record + MixRecord::dw), mixing = mixing_of(of);
    if (dw >= 0 && given && sending) put_dw(dw + mine, d);
    return mixing < 0 ? d : d + value(weights(), plan(mixing + mine));
  }
  // d_z of the read first + lane to where the logits come from.
  __device__ __forceinline__ void logits_backward(const Mix& of, int first, float d_z) const {
    const int mine = first + lane(), d_free = plan(of.record + MixRecord::d_free);
    if (of.logits == key_logits) return keys_backward(of, first, d_z);
    if (mine >= of.reads) return;
    if (of.logits == free_logits) {
      if (d_free >= 0) put_dw(d_free + mine, d_z);
    } else if (const int seen = plan(of.seen + mine); seen >= 0) {
      add(gradients(of.record + MixRecord::source), seen, d_z);
    }
  }
  __device__ __forceinline__ void keys_backward(const Mix& of, int first, float d_z) const {
    const int width = plan(of.record + MixRecord::columns), end = of.reads - first < 32 ? of.reads : first + 32;
    const T* query = values(of.record + MixRecord::source);
    FUSEDMOE_CUDA_ROLLED
    for (int start = 0; start < width; start += 32) {
      const int column = start + lane();
      const float q = column < width ? value(query, column) : 0.0f;
      float d_query = 0.0f;
      FUSEDMOE_CUDA_ROLLED
      for (int read = first; read < end; read++) {
        const float d = shuffle(d_z, read - first);
        if (column >= width || plan(of.seen + read) < 0) continue;
        const int key = read_of(of, read) + MixReadRecord::key;
        d_query += d * value(values(key), column);
        add(gradients(key), column, d * q);
      }
      if (column < width) add(gradients(of.record + MixRecord::source), column, d_query);
    }
  }
};

}  // namespace fusedmoe::cuda
