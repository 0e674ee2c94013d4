// Which instances of the forward there are, and which one a launch takes.
#pragma once
#include "forward.h"
#include "forward_as.h"
#include "launch.h"

namespace fusedmoe::cuda {

// BLOCKS: of a multiprocessor at a time, for whose registers the kernel is compiled.
template <class T, int ROWS, int COLUMNS, int UNITS, int THREADS, int BLOCKS, bool HIDDEN>
void launch_forward(const Network& network, const Tiles& tiles, int place, int programs, Stream stream) {
  using Of = Forward<T, ROWS, COLUMNS, UNITS, THREADS, HIDDEN>;
  if (tiles.units > UNITS) refuse(tiles);
  const Call call{network,     place,         tiles.resident,      Of::Shared::panels_for(tiles.resident),
                  tiles.units, tiles.aligned, tiles.store_aligned, tiles.allow_tf32};
  const Shape shape{unsigned((network.rows + ROWS - 1) / ROWS), unsigned(programs), THREADS,
                    size_t(Of::bytes(tiles.resident))};
  launch("forward", forward_kernel<T, ROWS, COLUMNS, UNITS, THREADS, BLOCKS, HIDDEN>, shape, stream, call);
}

// Narrow tiles mix up to eight units, wide ones four, those of 128 rows three. Two blocks of eight
// warps have 128 registers a thread, which accumulators of 64 numbers and what stands beside them
// fill: of more, or beside a hidden tile, a multiprocessor runs one. What is narrower than a tile
// leaves the rest of it out.
template <class T, bool HIDDEN>
void choose_forward(const Network& network, const Tiles& tiles, int place, int programs, Stream stream) {
  const auto run = [&](auto launch_one) { launch_one(network, tiles, place, programs, stream); };
  const bool wide = tiles.columns > 32;
  if constexpr (sizeof(T) == 4) {
    if (wide) refuse(tiles);
    if constexpr (!HIDDEN)
      if (tiles.rows == 64 && tiles.units <= 4) return run(launch_forward<T, 64, 32, 4, 256, 2, false>);
  } else {
    if constexpr (!HIDDEN) {
      if (tiles.rows == 128) return run(launch_forward<T, 128, 64, 3, 256, 1, false>);
      if (wide && tiles.rows == 64 && tiles.units <= 3) return run(launch_forward<T, 64, 64, 3, 256, 2, false>);
    }
    if (wide && tiles.rows == 64) return run(launch_forward<T, 64, 64, 4, 256, 1, HIDDEN>);
    if (wide && tiles.rows == 16) return run(launch_forward<T, 16, 64, 4, 128, 4, HIDDEN>);
  }
  if (tiles.rows == 64) return run(launch_forward<T, 64, 32, 8, 256, HIDDEN || sizeof(T) == 4 ? 1 : 2, HIDDEN>);
  if (tiles.rows == 16) return run(launch_forward<T, 16, 32, 8, 128, 4, HIDDEN>);
  refuse(tiles);
}

template <class T>
void forward_in(const Network& network, const Tiles& tiles, int place, int programs, Stream stream) {
  if (tiles.hidden) choose_forward<T, true>(network, tiles, place, programs, stream);
  else choose_forward<T, false>(network, tiles, place, programs, stream);
}

}  // namespace fusedmoe::cuda
