// What the host may ask for: one function a kernel. A plan's integers (kernels/plan.py) say what
// each launch does; PyTorch is not known here.
#pragma once
#include <cstdint>

#include "runtime.h"

namespace fusedmoe::cuda {

enum class Number { bfloat16, float16, float32 };

// The parameters' addresses travel in a kernel's argument, which may have 4 KB; a table with more
// of them keeps the rest in an array on the device.
struct Addresses {
  static constexpr int count = 448;
  const void* at[count];
  const void* const* more;
};

// Where sources and outputs lie: x [B, S, D] with strides x_row and x_slot, the segments' buffers one
// behind another, and out [B, width].
struct Places {
  void *x, *buffers, *out;
  int64_t x_row, x_slot;
};

// Arguments that every kernel of a call shares. p: the softmax of every unit [reads, B]; weights:
// mixing weights [B, mixing], or null; rows: B. In the backward `weights` are the gradients that
// mixing weights were given, and they and p are only read.
struct Network {
  Places places;
  float* p;
  void* weights;
  const int32_t* plan;
  const float* floats;
  int64_t rows;
  int64_t mixing;
  Addresses parameters;
};

// How a launch runs, as kernels/tiles.py chose it for the plan. rows, columns: of a tile; units:
// mixed at a time; resident: columns of a source that stay on the chip for all that read it, or 0; aligned: all
// that is read begins at multiples of 16 bytes, row by row; store_aligned: so does what is written;
// hidden: some linear has a hidden layer inside; allow_tf32: products of float32 by 11 bits of each
// number instead of all.
struct Tiles {
  Number number;
  int rows, columns, units, resident;
  bool aligned, store_aligned, hidden, allow_tf32;
};

// Run the tiles whose programs stand at `place` of the plan, for every block of rows. Raises:
// std::invalid_argument for tiles that no kernel is compiled for; std::runtime_error, as `launch`.
void forward(const Network& network, const Tiles& tiles, int place, int programs, Stream stream);

// What the backward reads and writes beside the network. below: d_x, the buffers' gradients, and
// the given d_out; dw: parts of the gradients of every read's weight [parts, B]; dz [B, dz_row];
// arrived: a number for each of the `tasks` of `gradients`, which every launch of backward_rows and
// of rowwise_backward makes zero.
struct Backward {
  Network network;
  Places below;
  float* dw;
  void* dz;
  int32_t* arrived;
  int dz_row, tasks;
};

// What `gradients` makes: grads [total], by parts [chunks, total] of so many rows each, which
// nobody needs where there is one chunk. shared: linear maps share parameters, and so their tasks
// have further uses.
struct Gradients {
  float* parts;
  void* grads;
  int64_t total, chunk;
  bool shared;
};

// Run the tiles of kernels/backward_plan.py whose programs stand at `place`, for every block of
// rows; `network.floats` are the plan's own too. Raises: as `forward`.
void backward_rows(const Backward& backward, const Tiles& tiles, int place, int programs, Stream stream);

// Add up the gradients of all parameters, whose tasks stand at `place`. The block that comes last
// to a task adds its chunks in their order. Raises: as `forward`.
void gradients(const Backward& backward, const Gradients& gradients, const Tiles& tiles, int place, Stream stream);

// Run the row-wise operations at `place` for every row. seed: of dropout, on the device; null:
// nothing is dropped. Raises: std::runtime_error, as `launch`.
void rowwise_forward(const Network& network, Number number, const int64_t* seed, int place, Stream stream);
void rowwise_backward(const Backward& backward, Number number, const int64_t* seed, int place, Stream stream);

}  // namespace fusedmoe::cuda
