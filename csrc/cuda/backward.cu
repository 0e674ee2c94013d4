// The backward's launches: which instance runs the tiles that a plan was written for.
#include "backward.h"

#include <stdexcept>
#include <string>

#include "gradients.h"
#include "launch.h"

namespace fusedmoe::cuda {
namespace {

// Of tiles of 16 columns, those of 32 do the work.
int wide_enough(int columns) { return columns <= 32 ? 32 : 64; }

[[noreturn]] void refuse(const char* kernel, const Tiles& tiles) {
  throw std::invalid_argument(std::string("cuda: ") + kernel +
                              ": expected tiles of 16 or 64 rows and 16, 32 or 64 columns (float32: up to 32), got " +
                              std::to_string(tiles.rows) + " and " + std::to_string(tiles.columns));
}

bool fits(const Tiles& tiles) {
  const bool columns =
      tiles.columns == 16 || tiles.columns == 32 || (tiles.columns == 64 && tiles.number != Number::float32);
  return columns && (tiles.rows == 16 || tiles.rows == 64);
}

template <class T, int ROWS, int COLUMNS>
void run_rows(const RowsCall& call, int programs, Stream stream) {
  // Two blocks of eight warps a multiprocessor, or four of four, have 128 registers a thread.
  constexpr int threads = ROWS == 64 ? 256 : 128, blocks = 512 / threads;
  using Of = RowsBackward<T, ROWS, COLUMNS, threads>;
  const unsigned count = unsigned((call.of.network.rows + ROWS - 1) / ROWS);
  launch("backward_rows", backward_rows_kernel<T, ROWS, COLUMNS, threads, blocks>,
         {count, unsigned(programs), threads, size_t(Of::bytes)}, stream, call);
}

template <class T>
void run_rows(const RowsCall& call, const Tiles& tiles, int programs, Stream stream) {
  if constexpr (sizeof(T) == 2)
    if (wide_enough(tiles.columns) == 64)
      return tiles.rows == 64 ? run_rows<T, 64, 64>(call, programs, stream)
                              : run_rows<T, 16, 64>(call, programs, stream);
  tiles.rows == 64 ? run_rows<T, 64, 32>(call, programs, stream) : run_rows<T, 16, 32>(call, programs, stream);
}

template <class T, int COLUMNS, bool SHARED>
void run_gradients(const GradientsCall& call, Stream stream) {
  // Three blocks of eight warps a multiprocessor, where its shared memory lets them, have 80
  // registers a thread.
  constexpr int outputs = sizeof(T) == 2 ? 64 : 32, threads = sizeof(T) == 2 ? 256 : 128,
                blocks = sizeof(T) == 2 ? 3 : 4;
  using Of = ParameterGradients<T, outputs, COLUMNS, threads, SHARED>;
  const unsigned chunks = unsigned((call.of.network.rows + call.to.chunk - 1) / call.to.chunk);
  launch("gradients", gradients_kernel<T, outputs, COLUMNS, threads, blocks, SHARED>,
         {unsigned(call.of.tasks), chunks, threads, size_t(Of::bytes)}, stream, call);
}

template <class T, int COLUMNS>
void run_gradients(const GradientsCall& call, Stream stream) {
  call.to.shared ? run_gradients<T, COLUMNS, true>(call, stream) : run_gradients<T, COLUMNS, false>(call, stream);
}

template <class T>
void run_gradients(const GradientsCall& call, const Tiles& tiles, Stream stream) {
  if constexpr (sizeof(T) == 2)
    if (wide_enough(tiles.columns) == 64) return run_gradients<T, 64>(call, stream);
  run_gradients<T, 32>(call, stream);
}

}  // namespace

void backward_rows(const Backward& backward, const Tiles& tiles, int place, int programs, Stream stream) {
  if (!fits(tiles)) refuse("backward_rows", tiles);
  const RowsCall call{backward, place, tiles.columns, tiles.aligned, tiles.store_aligned, tiles.allow_tf32};
  switch (tiles.number) {
    case Number::bfloat16: return run_rows<bfloat16>(call, tiles, programs, stream);
    case Number::float16: return run_rows<float16>(call, tiles, programs, stream);
    case Number::float32: return run_rows<float>(call, tiles, programs, stream);
  }
}

void gradients(const Backward& backward, const Gradients& gradients, const Tiles& tiles, int place, Stream stream) {
  if (!fits(tiles)) refuse("gradients", tiles);
  const GradientsCall call{backward, gradients, place, tiles.columns, tiles.aligned, tiles.allow_tf32};
  switch (tiles.number) {
    case Number::bfloat16: return run_gradients<bfloat16>(call, tiles, stream);
    case Number::float16: return run_gradients<float16>(call, tiles, stream);
    case Number::float32: return run_gradients<float>(call, tiles, stream);
  }
}

}  // namespace fusedmoe::cuda
