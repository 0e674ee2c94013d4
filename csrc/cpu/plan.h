// What a row block does, one linear after another: the table with every buffer placed. Plain data, so that code
// built for one ISA can read it without instantiating anything of the standard library (the linker
// would keep one copy of it for all ISAs).
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "../table.h"

namespace fusedmoe::cpu {

// Rows of a block, at most: it streams every weight once, 2.4 MB for AdaTT T3m2, which a core
// computes on for 5 us a row and reads from a last-level cache of 30 GB/s in 80 us; more rows would
// drive the block's panels, 10 KB a row, out of an L2 of 1 MB. (128 rows: no faster in inference, 3
// to 9 % slower in a training step, B = 1024, of the three main layers of bench/ on a Zen 5.)
constexpr int64_t block_rows = 64;
// Rows that backward keeps before it adds them to the parameters' gradients: two k_blocks of dW
// (gemm.h), whose buffers, 13.5 KB a row for AdaTT T3m2 (2,352 numbers of dz and 1,024 of
// transposed inputs), stay in the last-level cache.
constexpr int64_t chunk_rows = 4 * block_rows;
// The most rows that the forms for few rows take.
constexpr int64_t few_rows = 8;
// The most units that are mixed together.
constexpr size_t mixed_units = 4;
// Panels and their columns come in multiples of this: the longest vector, 16 fp32.
constexpr int64_t lane_multiple = 16;

constexpr int64_t padded(int64_t n) { return (n + lane_multiple - 1) / lane_multiple * lane_multiple; }

// The distance between the rows of one of a chunk's buffers, of n columns: beyond 64 no multiple of
// 64 columns, because three lines of each of 128 rows would then fall into a quarter of the sets of
// an L1 cache.
constexpr int64_t leading(int64_t n) { return padded(n) + (n > 64 && padded(n) % 64 == 0 ? lane_multiple : 0); }

template <class T>
struct Span {
  T* first = nullptr;
  int64_t count = 0;
  __attribute__((always_inline)) T* begin() const { return first; }
  __attribute__((always_inline)) T* end() const { return first + count; }
  __attribute__((always_inline)) T& operator[](int64_t i) const { return first[i]; }
};

// `width` rows of a transposed activation, at `offset` rows of a block's buffer: the saved one, or
// the thread's own.
struct Panel {
  int64_t offset = -1, width = 0;
  bool saved = false;
  int id = -1;  // of its own: another panel may take the same place later
};

// One stage of an MLP: in -> z -> out, z a copy of `in` (plus b), W in + b, or gamma normal + beta with
// normal = (in - mean) r. `z` is what is saved for backward: the pre-activation, or where the
// derivative can be told from the output (relu, sigmoid, tanh, identity) that output; then z is out.
struct Stage {
  graph::StageKind kind;
  int64_t k, n;
  int weight, bias;
  Act act;
  double parameter;
  Panel in, z, out;
  // Backward: its dz among the thread's, that of the whole chunk [n, chunk], and the input
  // transposed to [chunk, leading(k)].
  int64_t d = -1, d_z = -1, transposed = -1;
  // bfloat16: the operand of `in` among the thread's panels, whether this stage is to make it, and
  // the transposed weight.
  int64_t operand = -1, transposed_weight = -1;
  bool convert = false;
  // Backward: whether it is the first one in `linears` with its weight, and with its bias.
  bool first_of_weight = true, first_of_bias = true;
  // PReLU's slope, one or one a column. A LayerNorm: its normal and r, [1].
  int slope = -1;
  bool slope_per_column = false;
  double eps = 0;
  // Dropout: the least word that is kept, what it is multiplied by (0: no dropout), its number.
  uint32_t threshold = 0;
  double kept = 0;
  int stream = -1;
  Panel normal = {}, r = {};
  // Rows of the chunk's buffer: what the gradients of the slope, gamma, and beta or a copy's b are sums of; or -1.
  int64_t d_slope = -1, d_gamma = -1, d_beta = -1;
};

// Columns of a panel that stand among others in a concatenation. d: the panel to which their
// gradient is added, or -1.
struct Part {
  Panel from;
  int64_t first, width, d;
  bool reads_x;  // they are an input slot's
};
struct Gather {
  Panel to;
  int64_t d;  // panel of the gradient of `to`, or -1
  Span<Part> parts;
};

struct Mlp {
  Span<Stage> stages;
  Panel in, out;
  int64_t d_in = -1;    // backward: panel to which the gradient of `in` is added, or -1
  bool reads_x = false; // `in` is an input slot of the network
  Span<Gather> gather;  // one, if this MLP is the first that reads the concatenation
  bool differentiated = true;
};

// An activation that backward transposes to [chunk, leading(width)] in the chunk's buffer: the x of
// a dW.
struct TransposedInput {
  Panel from;
  int slot = -1;               // >= 0: input slot of the network, read from x itself
  const Stage* stage = nullptr;  // the stage whose activation must be applied to `from` first
  int64_t to = 0;
};

// One expert that a unit reads: its place in the softmax (-1: not seen) and its static weight,
// fixed or an element of a parameter.
struct Read {
  int expert, seen;
  double value;
  int parameter;
  int64_t element;
  int64_t d_static = -1;  // row of the chunk's buffer of dz, for the dw of a learned weight
};

// Static weights of an expert, one a column: elements of a parameter. d: rows of the chunk's buffer.
struct Channels {
  int expert, parameter;
  int64_t element, d;
};

// A vector that attention reads, and the panel to which its gradient is added, or -1.
struct Attended {
  Panel panel;
  int64_t d;
};

struct UnitPlan {
  Mlp gate;           // no stages: no linear gate
  Panel logits;         // of any gate
  int free = -1;        // the parameter that is the logits, and rows of the chunk's buffer for their gradient
  int64_t d_free = -1;
  Span<Attended> query, keys;  // the query is one; a key that is left out has no panel
  Span<Gather> gathers;        // those that they are the first to read
  Span<Channels> channels;
  Span<int> product;           // two experts
  Panel p, w, out;      // softmax over what the gate sees; the mixing weights of `reads`; the unit's output
  Span<Read> reads;     // ascending experts
  int64_t weights;      // column of the mixing weights [B, mixing]
  int64_t d_out, d_w;   // backward: panels of the thread's buffer
  bool differentiated = true;  // whether a gradient comes to `out`
  double factor = 1;    // of the logits
  Span<int> open;       // places of what the gate sees that the call's route leaves; none: all
};

// Units of one width that are mixed together, and the experts that any of them reads: reads[u *
// experts.count + i] is the place of expert i among the reads of unit u, or -1.
struct UnitGroup {
  Span<int> units, experts, reads;
};

// A unit that reads an expert, and the expert's place among the unit's reads.
struct Use {
  int unit;
  int64_t read;
};

struct Segment {
  Span<Mlp> experts;
  Span<int> order;              // the computed experts, ascending
  Span<UnitPlan> units;              // those that are not computed have reads.count = -1
  Span<UnitGroup> unit_groups;           // of the computed units
  Span<int64_t> d_expert;       // backward: panel of the gradient that readers beside the mix hand to an expert, or -1
  Span<Span<Use>> uses;         // of each expert, ascending units that have a gradient
  Span<TransposedInput> transposes;
};

struct Tower {
  Mlp mlp;
};

// The sum over the batch of a row of the chunk's buffer of dz, an element of a parameter's gradient.
struct RowSum {
  int64_t row;
  int parameter;
  int64_t element;
};

struct Plan {
  Graph graph;
  bool training, expanded;
  bool recompute;  // keep only the units' outputs and the softmax, and run linears and towers again in backward
  Span<Panel> inputs;            // of the input slots; one for all when x is expanded
  bool bf16;                     // the linears take bfloat16
  Span<int64_t> input_operands;  // and find the input slots there
  int64_t transposed_weights = 0;    // numbers of all transposed weights
  Span<Segment> segments;
  Span<Tower> towers;
  Span<TransposedInput> tower_transposes;
  Span<const Stage*> linears;        // every computed linear map
  Span<Span<const Stage*>> gradients;  // those that share no parameter with others, or all that do; with a gradient
  Span<RowSum> row_sums;
  bool backward_reads_inputs = false;  // a copy of an input slot is mixed
  Span<int> plain;                     // parameters that are read as they are: neither W nor b of a linear map
  int64_t saved = 0, scratch = 0;      // rows of a block's two buffers
  int64_t d_scratch = 0;              // rows of backward's own buffer of a thread: gradients of panels,
  int64_t d_linears = 0;                // and the dz of one MLP
  Span<int64_t> d_inputs;             // panels of the input slots' gradients
  int64_t d_z = 0, transposed = 0;        // rows (dz) and columns (transposed inputs) of the chunk's buffers
  int64_t widest = 0;                 // the widest panel
  bool linear = true;  // linear maps, linear gates and mixes alone: all that the forms for few rows know

  std::vector<std::shared_ptr<void>> storage;
};

// How a call is to be planned. `training`: keep what backward needs, with `recompute` as little as
// possible. `expanded`: x has stride 0 over its slots, so one panel serves all. `bf16`: the
// linears' operands are bfloat16.
struct PlanKind {
  bool training = false, expanded = false, recompute = false, bf16 = false;
};
// Place every buffer.
std::unique_ptr<Plan> make_plan(const Graph& graph, PlanKind kind);

}  // namespace fusedmoe::cpu
