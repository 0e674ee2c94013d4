#include "cuda/device.h"
#include "samples.h"

namespace fusedmoe::cuda::samples {
namespace {

// Four warps of 32 x 32 outputs. A row of a tile is 64 bytes of k, and 16 more, so that eight rows
// at one k lie in different banks.
constexpr int tile = 64, threads = 128, line = 64, pad = 16;
// A row of outputs.
constexpr int out_stride = tile + 4;

template <class T, int STAGES, bool TURNED>
struct Tiles {
  static constexpr int k = line / int(sizeof(T)), a_stride = line + pad;
  static constexpr int b_rows = TURNED ? k : tile, b_bytes = TURNED ? tile * int(sizeof(T)) : line,
                       b_stride = b_bytes + pad;
  static constexpr int a_stage = tile * a_stride, b_stage = b_rows * b_stride;
  static constexpr int inputs = STAGES * (a_stage + b_stage), outputs = tile * out_stride * int(sizeof(float));
  static constexpr int bytes = inputs > outputs ? inputs : outputs;
};

// Rows of `bytes` bytes of a tile: those beyond the matrix are zero.
template <class T>
__device__ __forceinline__ void copy_tile(char* to, int stride, int rows, int bytes, const T* from, int live_rows,
                                          int columns, int live_columns) {
  constexpr int piece = 16, numbers = piece / int(sizeof(T));
  for (int i = thread(); i < rows * (bytes / piece); i += threads) {
    const int row = i / (bytes / piece), column = i % (bytes / piece) * numbers;
    const bool live = row < live_rows && column < live_columns;
    copy_async<piece>(to + row * stride + column * int(sizeof(T)), live ? from + int64_t(row) * columns + column : from,
                      live ? piece : 0);
  }
}

template <class T>
__device__ __forceinline__ void round_words(uint32_t* words, int count) {
  if constexpr (sizeof(T) == 4)
    FUSEDMOE_CUDA_UNROLL
    for (int i = 0; i < count; i++) words[i] = rounded_tf32(word_as_float(words[i]));
}

// A warp's 32 x 32 outputs (+)= what one stage has.
template <class T, bool TURNED>
__device__ __forceinline__ void multiply_stage(const char* a_tile, int a_stride, const char* b_tile, int b_stride,
                                               float (&c)[2][4][4]) {
  constexpr int step = 16 / int(sizeof(T)) * 2;
  const int row = warp() / 2 * 32, column = warp() % 2 * 32;
  FUSEDMOE_CUDA_UNROLL
  for (int k = 0; k < line / int(sizeof(T)); k += step) {
    uint32_t a[2][4], b[4][2];
    FUSEDMOE_CUDA_UNROLL
    for (int i = 0; i < 2; i++) {
      load_matrices<4>(a[i], a_tile + (row + 16 * i + lane() % 16) * a_stride + k * int(sizeof(T)) + lane() / 16 * 16);
      round_words<T>(a[i], 4);
    }
    FUSEDMOE_CUDA_UNROLL
    for (int j = 0; j < 4; j++) {
      if constexpr (TURNED)
        load_matrices<2, true>(b[j], b_tile + (k + lane() % 16) * b_stride + (column + 8 * j) * int(sizeof(T)));
      else
        load_matrices<2>(b[j],
                         b_tile + (column + 8 * j + lane() % 8) * b_stride + k * int(sizeof(T)) + lane() / 8 % 2 * 16);
      round_words<T>(b[j], 2);
    }
    FUSEDMOE_CUDA_UNROLL
    for (int i = 0; i < 2; i++)
      FUSEDMOE_CUDA_UNROLL
      for (int j = 0; j < 4; j++) multiply_add<T>(c[i][j], a[i], b[j]);
  }
}

template <class T, int STAGES, bool TURNED>
__global__ void __launch_bounds__(threads, 2) gemm_kernel(const T* a, const T* b, float* c, int m, int n, int k) {
  using Of = Tiles<T, STAGES, TURNED>;
  char* shared = shared_memory<char>();
  const int first_row = block_y() * tile, first_column = block_x() * tile, steps = (k + Of::k - 1) / Of::k;
  const auto fetch = [&](int step) {
    char* to = shared + step % STAGES * (Of::a_stage + Of::b_stage);
    const int at = step * Of::k;
    if (step < steps) {
      copy_tile(to, Of::a_stride, tile, line, a + int64_t(first_row) * k + at, m - first_row, k, k - at);
      if constexpr (TURNED)
        copy_tile(to + Of::a_stage, Of::b_stride, Of::b_rows, Of::b_bytes, b + int64_t(at) * n + first_column, k - at,
                  n, n - first_column);
      else
        copy_tile(to + Of::a_stage, Of::b_stride, Of::b_rows, Of::b_bytes, b + int64_t(first_column) * k + at,
                  n - first_column, k, k - at);
    }
    // Beyond the last step too, or the wait below would count otherwise there.
    commit_copies();
  };
  float sums[2][4][4] = {};
  for (int step = 0; step < STAGES - 1; step++) fetch(step);
  for (int step = 0; step < steps; step++) {
    wait_copies<STAGES - 2>();
    // All copies of this step have arrived, and nobody reads the stage that the next ones go to.
    sync_block();
    fetch(step + STAGES - 1);
    const char* from = shared + step % STAGES * (Of::a_stage + Of::b_stage);
    multiply_stage<T, TURNED>(from, Of::a_stride, from + Of::a_stage, Of::b_stride, sums);
  }
  // Outputs take the place of what is still being read.
  sync_block();
  float* out = reinterpret_cast<float*>(shared);
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int half = 0; half < 2; half++) {
        const int row = warp() / 2 * 32 + 16 * i + 8 * half + lane() / 4,
                  column = warp() % 2 * 32 + 8 * j + lane() % 4 * 2;
        out[row * out_stride + column] = sums[i][j][2 * half];
        out[row * out_stride + column + 1] = sums[i][j][2 * half + 1];
      }
  sync_block();
  for (int i = thread(); i < tile * tile; i += threads) {
    const int row = first_row + i / tile, column = first_column + i % tile;
    if (row < m && column < n) store_global(c + int64_t(row) * n + column, out[i / tile * out_stride + i % tile]);
  }
}

template <class T, int STAGES, bool TURNED>
void run(const Gemm& call, Stream stream) {
  const Shape shape{unsigned((call.n + tile - 1) / tile), unsigned((call.m + tile - 1) / tile), threads,
                    size_t(Tiles<T, STAGES, TURNED>::bytes)};
  launch("gemm", gemm_kernel<T, STAGES, TURNED>, shape, stream, static_cast<const T*>(call.a),
         static_cast<const T*>(call.b), call.c, call.m, call.n, call.k);
}

template <class T>
void run_layout(const Gemm& call, Stream stream) {
  if constexpr (sizeof(T) == 2)
    if (call.turned) return call.stages == 2 ? run<T, 2, true>(call, stream) : run<T, 3, true>(call, stream);
  call.stages == 2 ? run<T, 2, false>(call, stream) : run<T, 3, false>(call, stream);
}

// A warp a row.
__global__ void __launch_bounds__(threads) softmax_kernel(const float* from, float* to, int rows, int n) {
  float* shared = shared_memory<float>() + warp() * 32;
  for (int row = (block_x() * threads + thread()) / 32; row < rows; row += blocks_x() * threads / 32) {
    const float x = lane() < n ? load_global(from + int64_t(row) * n + lane()) : -INFINITY;
    const float y = expf(x - max_lanes(x));
    // Of the row before, all have been read.
    sync_warp();
    shared[lane()] = y / sum_lanes(y);
    sync_warp();
    if (lane() < n) store_global(to + int64_t(row) * n + lane(), shared[n - 1 - lane()]);
  }
}

}  // namespace

void gemm(const Gemm& call, Stream stream) {
  if (call.element == Element::bfloat16) return run_layout<bfloat16>(call, stream);
  if (call.element == Element::float16) return run_layout<float16>(call, stream);
  run_layout<float>(call, stream);
}

void softmax(const float* from, float* to, int rows, int n, Stream stream) {
  launch("softmax", softmax_kernel, {2, 1, threads, threads * sizeof(float)}, stream, from, to, rows, n);
}

}  // namespace fusedmoe::cuda::samples
