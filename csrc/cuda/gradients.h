// The gradients of all parameters in one launch; its twin in Triton, which reads the same plans:
// kernels/triton/backward.py.
//
// Grid: (tasks, chunks of rows). A task is a tile of dW = dz^T h, with db = sum of dz where its
// columns are W's first; or one element of a learned static weight. Each block adds up its rows;
// with several chunks it stores float parts, and the block that comes last to a task adds them,
// chunk by chunk, so that no sum depends on who that is. A W that several linear maps share is one
// task, which adds up all uses: only SHARED kernels look for more than one.
#pragma once
#include "columns.h"

namespace fusedmoe::cuda {

struct GradientsCall {
  Backward of;
  Gradients to;
  int place, columns;
  bool aligned, allow_tf32;
};

template <class T, int OUTPUTS, int COLUMNS, int THREADS, bool SHARED>
struct ParameterGradients {
  static constexpr int stages = 3;
  using P = Product<T, OUTPUTS, COLUMNS, THREADS, Major::mn, Major::mn>;
  using Sums = typename P::Sums;
  static constexpr int stage = P::PanelA::bytes + P::PanelB::bytes, bytes = stages * stage;
  static_assert(THREADS % OUTPUTS == 0 && THREADS * int(sizeof(float)) <= bytes);

  const GradientsCall& call;
  // The rows of a chunk.
  const Block<T> block;

  __device__ __forceinline__ int plan(int at) const { return block.plan(at); }
  static __device__ __forceinline__ char* shared(int at = 0) { return shared_memory<char>() + at * stage; }
  __device__ __forceinline__ bool alone() const { return blocks_y() == 1; }
  __device__ __forceinline__ float* part() const { return call.to.parts + block_y() * call.to.total; }

  // Number `at` of the gradients, or of this chunk's part of them.
  __device__ __forceinline__ void store(int64_t at, float value) const {
    if (alone()) store_global(static_cast<T*>(call.to.grads) + at, rounded<T>(value));
    else store_global(part() + at, value);
  }

  // The rows and columns of a dW that a task makes.
  struct Matrix {
    int64_t first;
    int stride, rows, columns, bias;
  };
  __device__ __forceinline__ Matrix matrix_of(int record) const {
    using Task = MatrixTaskRecord;
    const int n = plan(record + Task::row), k = plan(record + Task::column), source = record + Task::source,
              bias = plan(record + Task::bias);
    const int rows = plan(record + Task::outputs) - n, columns = plan(source + SourceRecord::width) - k;
    const int stride = plan(record + Task::reduction);
    return {plan(record + Task::weight) + plan(source + SourceRecord::first) + int64_t(n) * stride + k, stride,
            rows < OUTPUTS ? rows : OUTPUTS, columns < call.columns ? columns : call.columns, bias < 0 ? -1 : bias + n};
  }

  __device__ __forceinline__ void matrix_tile(int record) const {
    const Matrix to = matrix_of(record);
    const int n = plan(record + MatrixTaskRecord::row), k = plan(record + MatrixTaskRecord::column),
              dz_row = call.of.dz_row;
    const T* a = dz(record + MatrixTaskRecord::dz) + n;
    Row<T> b = block.rows_of(record + MatrixTaskRecord::source);
    b.first += k;
    int left = block.live, rows = block.live, next = record + MatrixTaskRecord::size, uses = 0;
    if constexpr (SHARED) {
      // Each use has k-tiles of its own.
      uses = plan(next), next += FurtherUsesRecord::size;
      rows = (1 + uses) * ((rows + k_tile<T> - 1) / k_tile<T> * k_tile<T>);
    }
    // What stands between a linear's dz and the next one's goes into sums that are not stored.
    const auto fetch = [&](int at) {
      if (SHARED && left <= 0 && uses > 0) {
        a = dz(next + MatrixUseRecord::dz) + n;
        b = block.rows_of(next + MatrixUseRecord::source);
        b.first += k;
        left = block.live, next += MatrixUseRecord::size, uses--;
      }
      if (left <= 0) return;
      copy_panel<typename P::PanelA, THREADS>(shared(at), a, padded(to.rows), true, Rows{left, dz_row});
      copy_panel<typename P::PanelB, THREADS>(shared(at) + P::PanelA::bytes, b.first, to.columns, call.aligned,
                                              Rows{left, b.stride});
      a += int64_t(k_tile<T>) * dz_row;
      b.first += int64_t(k_tile<T>) * b.stride;
      left -= k_tile<T>;
    };
    Sums sums;
    P::clear(sums);
    float bias = 0.0f;
    Ring<stages> ring;
    ring.start(fetch);
    FUSEDMOE_CUDA_ROLLED
    for (int row = 0; row < rows; row += k_tile<T>) {
      const char* at = shared(ring.step(fetch));
      P::multiply(at, at + P::PanelA::bytes, sums, call.allow_tf32, to.columns);
      if (to.bias >= 0) bias += rows_of_bias(at);
    }
    ring.finish();
    store_matrix(to, sums);
    if (to.bias >= 0) store_bias(to, bias);
    if (arrives_last()) add_matrix(to);
  }
  // The chunk's rows of dz, from the column on that stands at `at`.
  __device__ __forceinline__ const T* dz(int at) const {
    return static_cast<const T*>(call.of.dz) + block.row * call.of.dz_row + plan(at);
  }
  // Of a panel of dz every thread adds up some rows of one column.
  static __device__ __forceinline__ float rows_of_bias(const char* panel) {
    float sum = 0.0f;
    FUSEDMOE_CUDA_UNROLL
    for (int row = thread() / OUTPUTS; row < k_tile<T>; row += THREADS / OUTPUTS)
      sum += widened(*reinterpret_cast<const T*>(panel + row * P::PanelA::pitch + thread() % OUTPUTS * int(sizeof(T))));
    return sum;
  }
  __device__ __forceinline__ void store_matrix(const Matrix& to, Sums& sums) const {
    const bool pairs = ((to.first | to.stride | (alone() ? 0 : call.to.total)) & 1) == 0;
    const auto each = [&](auto* first) {
      P::visit(sums, [&](int row, int column, float low, float high) {
        const bool live = row < to.rows;
        store_two(first + to.first + int64_t(row) * to.stride + column, pairs, live && column < to.columns,
                  live && column + 1 < to.columns, low, high);
      });
    };
    if (alone()) each(static_cast<T*>(call.to.grads));
    else each(part());
  }
  __device__ __forceinline__ void store_bias(const Matrix& to, float bias) const {
    float* sums = shared_memory<float>();
    sums[thread()] = bias;
    sync_block();
    if (thread() >= to.rows) return;
    for (int other = thread() + OUTPUTS; other < THREADS; other += OUTPUTS) bias += sums[other];
    store(to.bias + thread(), bias);
  }

  // Whether this block is the last one to come to its task, of several, so that it sees the parts
  // of all.
  __device__ __forceinline__ bool arrives_last() const {
    if (alone()) return false;
    int* flag = shared_memory<int>();
    // All threads have stored their numbers, and read what stands where the flag does.
    sync_block();
    if (thread() == 0) {
      *flag = arrive(call.of.arrived + block_x()) == blocks_y() - 1;
    }
    sync_block();
    return *flag != 0;
  }
  // COUNT numbers of the gradients, `place(n)` or none where that is negative: of every chunk, in
  // their order. One chunk's are on their way at a time.
  template <int COUNT, class Place>
  __device__ __forceinline__ void add_chunks(Place&& place) const {
    float sums[COUNT] = {};
    FUSEDMOE_CUDA_ROLLED
    for (int chunk = 0; chunk < blocks_y(); chunk++) {
      const float* part = call.to.parts + chunk * call.to.total;
      FUSEDMOE_CUDA_UNROLL
      for (int n = 0; n < COUNT; n++)
        if (const int64_t at = place(n); at >= 0) sums[n] += load_global(part + at);
    }
    FUSEDMOE_CUDA_UNROLL
    for (int n = 0; n < COUNT; n++)
      if (const int64_t at = place(n); at >= 0) store_global(static_cast<T*>(call.to.grads) + at, rounded<T>(sums[n]));
  }
  __device__ __forceinline__ void add_matrix(const Matrix& to) const {
    constexpr int all = OUTPUTS * COLUMNS / THREADS, some = all < 8 ? all : 8;
    static_assert(OUTPUTS * COLUMNS % THREADS == 0 && THREADS % COLUMNS == 0 && all % some == 0);
    const int column = thread() % COLUMNS;
    FUSEDMOE_CUDA_ROLLED
    for (int done = 0; done < all; done += some)
      add_chunks<some>([&](int n) {
        const int row = thread() / COLUMNS + (done + n) * (THREADS / COLUMNS);
        return row < to.rows && column < to.columns ? to.first + int64_t(row) * to.stride + column : int64_t(-1);
      });
    if (to.bias >= 0 && thread() < to.rows) add_chunks<1>([&](int) { return int64_t(to.bias) + thread(); });
  }

  // dv of one element: the sum of its dw over the rows.
  __device__ __forceinline__ void static_element(int record) const {
    float value = 0.0f;
    FUSEDMOE_CUDA_ROLLED
    for (int i = 0; i < plan(record + StaticTaskRecord::terms); i++)
      value += term(record + StaticTaskRecord::size + i * TermRecord::size);
    value = sum_lanes(value);
    float* sums = shared_memory<float>();
    if (lane() == 0) sums[warp()] = value;
    sync_block();
    if (thread() == 0) {
      for (int other = 1; other < THREADS / 32; other++) value += sums[other];
      store(plan(record + StaticTaskRecord::element), value);
    }
    if (arrives_last() && thread() == 0)
      add_chunks<1>([&](int) { return int64_t(plan(record + StaticTaskRecord::element)); });
  }
  __device__ __forceinline__ float term(int term) const {
    const int64_t first = plan(term + TermRecord::dw), stride = plan(term + TermRecord::stride);
    const int tiles = plan(term + TermRecord::tiles),
              column = call.of.network.weights ? plan(term + TermRecord::mixing) : -1;
    float value = 0.0f;
    FUSEDMOE_CUDA_ROLLED
    for (int64_t row = block.row + thread(); row < block.row + block.live; row += THREADS) {
      for (int tile = 0; tile < tiles; tile++)
        value += load_global(call.of.dw + (first + tile * stride) * block.network.rows + row);
      if (column >= 0)
        value +=
            widened(load_global(static_cast<const T*>(call.of.network.weights) + row * block.network.mixing + column));
    }
    return value;
  }

  __device__ __forceinline__ void run() const {
    const int record = plan(call.place + block_x());
    if (plan(record + MatrixTaskRecord::kind) == matrix_kind) matrix_tile(record);
    else static_element(record);
  }
};

template <class T, int OUTPUTS, int COLUMNS, int THREADS, int BLOCKS, bool SHARED>
__global__ void __launch_bounds__(THREADS, BLOCKS) gradients_kernel(const __grid_constant__ GradientsCall call) {
  const int64_t row = int64_t(block_y()) * call.to.chunk, left = call.of.network.rows - row;
  ParameterGradients<T, OUTPUTS, COLUMNS, THREADS, SHARED>{
      call, {call.of.network, row, int(left < call.to.chunk ? left : call.to.chunk)}}
      .run();
}

}  // namespace fusedmoe::cuda
