// Products of tiles: panels of operands in shared memory, how they come there, and what the warps
// of a block make of them.
//
// C [ROWS, COLUMNS] += A B over DEPTH numbers of the reduction; A and B each lie in a panel as
// global memory has them:
//
//   Major::k     rows of C's (for B: columns of C), DEPTH numbers of the reduction in each: h and W in z = h W^T
//   Major::mn    DEPTH rows, of C's rows or columns in each: W in d = dz W; dz and h in dW = dz^T h
//
// A product runs through a ring of stages. Every step waits for its own copies, lets the whole
// block meet, and asks for those of STAGES - 1 steps later; a group is committed at every step,
// with nothing in it behind the last one, so that the wait counts the same to the end.
#pragma once
#include "device.h"

namespace fusedmoe::cuda {

enum class Major { k, mn };

// Numbers of the reduction in a panel: 128 bytes of 32 or 64 numbers.
template <class T>
constexpr int k_tile = 128 / int(sizeof(T));

// ROWS x COLUMNS numbers in shared memory, in bytes. Rows are so far apart that eight of them at
// one column, which load_matrices takes together, lie in different banks: an odd number of 16
// bytes. For a float that is read across them it is 8 words beyond whole sets of banks.
template <class T, int ROWS, int COLUMNS, bool ACROSS = false>
struct Panel {
  using Number = T;
  static constexpr int rows = ROWS, columns = COLUMNS, size = int(sizeof(T));
  static constexpr int pitch = COLUMNS * size + (ACROSS && size == 4 ? 32 : 16);
  static constexpr int bytes = ROWS * pitch;
  static_assert(COLUMNS * size % 32 == 0);
};

// Ask for a panel: row r of it is what stands `row(r)` numbers behind `from`, up to `columns` of
// them; it is zero beyond, and where row(r) is negative. `aligned`: every row begins at a multiple
// of 16 bytes, and `columns` is a multiple of as many.
template <class P, int THREADS, class Row>
__device__ __forceinline__ void copy_panel(char* to, const typename P::Number* from, int columns, bool aligned,
                                           Row row) {
  if (aligned) {
    constexpr int numbers = 16 / P::size, vectors = P::columns / numbers, all = P::rows * vectors;
    // By a number of turns that the compiler knows.
    FUSEDMOE_CUDA_UNROLL
    for (int turn = 0; turn < all; turn += THREADS) {
      const int i = turn + thread();
      if (all % THREADS != 0 && i >= all) break;
      const int column = i % vectors * numbers, offset = row(i / vectors);
      const bool live = offset >= 0 && column < columns;
      copy_async<16>(to + i / vectors * P::pitch + column * P::size, live ? from + offset + column : from,
                     live ? 16 : 0);
    }
    return;
  }
  constexpr int all = P::rows * P::columns, some = all % (2 * THREADS) == 0 ? 2 : 1;
  FUSEDMOE_CUDA_ROLLED
  for (int first = thread(); first < all; first += some * THREADS) {
    // Numbers of 16 bits, which are too few for a copy, pass through registers: several on their
    // way at a time.
    uint16_t numbers[some];
    FUSEDMOE_CUDA_UNROLL
    for (int n = 0; n < some; n++) {
      const int i = first + n * THREADS, column = i % P::columns, offset = row(i / P::columns);
      const bool live = offset >= 0 && column < columns;
      if constexpr (P::size == 4)
        copy_async<4>(to + i / P::columns * P::pitch + column * P::size, live ? from + offset + column : from,
                      live ? 4 : 0);
      else numbers[n] = live ? load_global(reinterpret_cast<const uint16_t*>(from + offset + column)) : uint16_t(0);
    }
    if constexpr (P::size == 2)
      FUSEDMOE_CUDA_UNROLL
      for (int n = 0; n < some; n++) {
        const int i = first + n * THREADS;
        *reinterpret_cast<uint16_t*>(to + i / P::columns * P::pitch + i % P::columns * P::size) = numbers[n];
      }
  }
}

// Rows of a panel at a distance, the first `live` of them: one after another, or by a list of their
// numbers, where a negative one is none.
struct Rows {
  int live, stride;
  const int* list = nullptr;
  __device__ __forceinline__ int operator()(int row) const {
    if (row >= live) return -1;
    const int number = list ? load_global(list + row) : row;
    return number < 0 ? -1 : number * stride;
  }
};

// The current slot in a ring of STAGES panels.
template <int STAGES>
struct Ring {
  int at = 0;

  // Ask for the first STAGES - 1 steps; fetch(place) copies one step's panels there, or nothing.
  template <class Fetch>
  __device__ __forceinline__ void start(Fetch&& fetch) {
    FUSEDMOE_CUDA_ROLLED
    for (int i = 1; i < STAGES; i++) {
      fetch(place(i - 1));
      commit_copies();
    }
  }
  // Return the place of the next step, whose copies have arrived, and ask for a later one.
  template <class Fetch>
  __device__ __forceinline__ int step(Fetch&& fetch) {
    wait_copies<STAGES - 2>();
    // The copies of every thread have arrived, and nobody reads the place that the next ones go to.
    sync_block();
    fetch(place(STAGES - 1));
    commit_copies();
    const int mine = at;
    at = place(1);
    return mine;
  }
  // Behind the last step: no copy is on its way, and the block has read all there was.
  __device__ __forceinline__ void finish() {
    wait_copies<0>();
    sync_block();
  }
  __device__ __forceinline__ int place(int later) const {
    return at + later < STAGES ? at + later : at + later - STAGES;
  }
};

// What a thread has of C: M x N fragments of a multiply_add.
template <int M, int N>
struct Fragments {
  float at[M][N][4];
};

// The product of one k-tile by all warps of a block, each of which has M x N fragments of C, rows
// and columns side by side.
template <class T, int ROWS, int COLUMNS, int THREADS, Major A = Major::k, Major B = Major::k, int DEPTH = k_tile<T>>
struct Product {
  static constexpr bool a_across = A == Major::mn, b_across = B == Major::mn, wide = sizeof(T) == 4;
  using PanelA = Panel<T, a_across ? DEPTH : ROWS, a_across ? ROWS : DEPTH, a_across>;
  using PanelB = Panel<T, b_across ? DEPTH : COLUMNS, b_across ? COLUMNS : DEPTH, b_across>;
  static constexpr int threads = THREADS, rows = ROWS, columns = COLUMNS;
  static constexpr int warps = THREADS / 32, down = ROWS / 16 < 4 ? ROWS / 16 : 4, across = warps / down;
  static constexpr int M = ROWS / down / 16, N = COLUMNS / across / 8, step = depth<T>;
  static_assert(M * down * 16 == ROWS && N * across * 8 == COLUMNS && down * across == warps && DEPTH % step == 0);

  using Sums = Fragments<M, N>;

  // C's row of at[i][..][2 half], and its column of at[..][j][0]; the next column is at[..][..][1].
  static __device__ __forceinline__ int row(int i, int half) {
    return (warp() % down * M + i) * 16 + half * 8 + lane() / 4;
  }
  static __device__ __forceinline__ int column(int j) { return first_column() + j * 8 + lane() % 4 * 2; }
  static __device__ __forceinline__ int first_column() { return warp() / down * N * 8; }

  static __device__ __forceinline__ void clear(Sums& c) {
    visit(c, [](int, int, float& low, float& high) { low = high = 0.0f; });
  }

  // f(row, column, low, high) for every two neighbours of C that this thread has.
  template <class F>
  static __device__ __forceinline__ void visit(Sums& c, F&& f) {
    FUSEDMOE_CUDA_UNROLL
    for (int i = 0; i < M; i++)
      FUSEDMOE_CUDA_UNROLL
      for (int half = 0; half < 2; half++)
        FUSEDMOE_CUDA_UNROLL
        for (int j = 0; j < N; j++) f(row(i, half), column(j), c.at[i][j][2 * half], c.at[i][j][2 * half + 1]);
  }

  // C += A B. `allow_tf32`: products of float with 11 bits of each, else with all; of 16-bit types it
  // means nothing. Of columns from `live` on what C gets is not said: a warp leaves out what it has
  // of them, in halves.
  static __device__ __forceinline__ void multiply(const char* a, const char* b, Sums& c, bool allow_tf32 = false,
                                                  int live = COLUMNS) {
    const int mine = live - first_column();
    if (mine <= 0) return;
    if (N > 1 && mine <= N / 2 * 8) multiply_some<(N + 1) / 2>(a, b, c, allow_tf32);
    else multiply_some<N>(a, b, c, allow_tf32);
  }

 private:
  using A4 = uint32_t[4];
  using B2 = uint32_t[2];

  // The first COUNT fragments of each row of fragments.
  template <int COUNT>
  static __device__ __forceinline__ void multiply_some(const char* a, const char* b, Sums& c, bool allow_tf32) {
    if constexpr (wide)
      if (!allow_tf32) return add_split_products<COUNT>(a, b, c);
    add_products<COUNT>(a, b, c);
  }

  // Words of A for rows 16 i.., and of B for columns 8 j.. of this warp, from k on. Transposed
  // matrices are of 16 bits, so floats are picked one by one.
  static __device__ __forceinline__ void load_a(const char* panel, int i, int k, A4& a) {
    const int first = (warp() % down * M + i) * 16;
    if constexpr (!a_across) {
      load_matrices<4>(a, panel + (first + lane() % 16) * PanelA::pitch + k * PanelA::size + lane() / 16 * 16);
    } else if constexpr (!wide) {
      load_matrices<4, true>(
          a, panel + (k + lane() / 16 * 8 + lane() % 8) * PanelA::pitch + (first + lane() / 8 % 2 * 8) * PanelA::size);
    } else {
      FUSEDMOE_CUDA_UNROLL
      for (int n = 0; n < 4; n++)
        a[n] = word<PanelA>(panel, k + lane() % 4 + n / 2 * 4, first + lane() / 4 + n % 2 * 8);
    }
  }
  static __device__ __forceinline__ void load_b(const char* panel, int j, int k, B2& b) {
    const int first = first_column() + j * 8;
    if constexpr (!b_across) {
      load_matrices<2>(b, panel + (first + lane() % 8) * PanelB::pitch + k * PanelB::size + lane() / 8 % 2 * 16);
    } else if constexpr (!wide) {
      load_matrices<2, true>(b, panel + (k + lane() % 16) * PanelB::pitch + first * PanelB::size);
    } else {
      FUSEDMOE_CUDA_UNROLL
      for (int n = 0; n < 2; n++) b[n] = word<PanelB>(panel, k + lane() % 4 + n * 4, first + lane() / 4);
    }
  }
  // Two of these at once.
  static __device__ __forceinline__ void load_two(const char* panel, int j, int k, B2& b, B2& next) {
    if constexpr (b_across && wide) {
      load_b(panel, j, k, b);
      load_b(panel, j + 1, k, next);
    } else {
      const int first = first_column() + j * 8;
      uint32_t words[4];
      if constexpr (b_across)
        load_matrices<4, true>(words,
                               panel + (k + lane() % 16) * PanelB::pitch + (first + lane() / 16 * 8) * PanelB::size);
      else
        load_matrices<4>(words, panel + (first + lane() / 16 * 8 + lane() % 8) * PanelB::pitch + k * PanelB::size +
                                    lane() / 8 % 2 * 16);
      b[0] = words[0], b[1] = words[1], next[0] = words[2], next[1] = words[3];
    }
  }
  template <class P>
  static __device__ __forceinline__ uint32_t word(const char* panel, int row, int column) {
    return *reinterpret_cast<const uint32_t*>(panel + row * P::pitch + column * P::size);
  }

  // f(j, B's words of columns 8 j..) for the first COUNT fragments of this warp.
  template <int COUNT, class F>
  static __device__ __forceinline__ void each_b(const char* panel, int k, F&& f) {
    FUSEDMOE_CUDA_UNROLL
    for (int j = 0; j < COUNT; j += 2) {
      B2 b[2];
      if (j + 1 < COUNT) load_two(panel, j, k, b[0], b[1]);
      else load_b(panel, j, k, b[0]);
      f(j, b[0]);
      if (j + 1 < COUNT) f(j + 1, b[1]);
    }
  }

  template <int COUNT>
  static __device__ __forceinline__ void add_products(const char* a_panel, const char* b_panel, Sums& c) {
    FUSEDMOE_CUDA_UNROLL
    for (int k = 0; k < DEPTH; k += step) {
      A4 a[M];
      FUSEDMOE_CUDA_UNROLL
      for (int i = 0; i < M; i++) {
        load_a(a_panel, i, k, a[i]);
        if constexpr (wide) round(a[i]);
      }
      each_b<COUNT>(b_panel, k, [&](int j, B2& b) {
        if constexpr (wide) round(b);
        FUSEDMOE_CUDA_UNROLL
        for (int i = 0; i < M; i++) multiply_add<T>(c.at[i][j], a[i], b);
      });
    }
  }

  // A = its first 11 bits + rest, B alike: adds the product of the first ones, and those of a first
  // one and a rest. Tensor cores cut where others round: in one chain over all of the reduction
  // errors of one sign would add up, so each k-tile has a chain of its own, whose sum is rounded.
  template <int COUNT>
  static __device__ __forceinline__ void add_split_products(const char* a_panel, const char* b_panel, Sums& c) {
    Sums first{}, cross{};
    FUSEDMOE_CUDA_UNROLL
    for (int k = 0; k < DEPTH; k += step) {
      A4 a[M], a_rest[M];
      FUSEDMOE_CUDA_UNROLL
      for (int i = 0; i < M; i++) {
        load_a(a_panel, i, k, a[i]);
        split(a[i], a_rest[i]);
      }
      each_b<COUNT>(b_panel, k, [&](int j, B2& b) {
        B2 b_rest;
        split(b, b_rest);
        FUSEDMOE_CUDA_UNROLL
        for (int i = 0; i < M; i++) {
          multiply_add<T>(cross.at[i][j], a_rest[i], b);
          multiply_add<T>(cross.at[i][j], a[i], b_rest);
          multiply_add<T>(first.at[i][j], a[i], b);
        }
      });
    }
    FUSEDMOE_CUDA_UNROLL
    for (int i = 0; i < M; i++)
      FUSEDMOE_CUDA_UNROLL
      for (int j = 0; j < COUNT; j++)
        FUSEDMOE_CUDA_UNROLL
        for (int n = 0; n < 4; n++) {
          // inf - inf is NaN: ignore the low part.
          const float rest = cross.at[i][j][n];
          c.at[i][j][n] += first.at[i][j][n] + (rest == rest ? rest : 0.0f);
        }
  }

  template <int COUNT>
  static __device__ __forceinline__ void round(uint32_t (&words)[COUNT]) {
    FUSEDMOE_CUDA_UNROLL
    for (int n = 0; n < COUNT; n++) words[n] = rounded_tf32(word_as_float(words[n]));
  }
  template <int COUNT>
  static __device__ __forceinline__ void split(uint32_t (&words)[COUNT], uint32_t (&rest)[COUNT]) {
    FUSEDMOE_CUDA_UNROLL
    for (int n = 0; n < COUNT; n++) {
      const float all = word_as_float(words[n]);
      words[n] = rounded_tf32(all);
      rest[n] = rounded_tf32(all - word_as_float(words[n]));
    }
  }
};

}  // namespace fusedmoe::cuda
