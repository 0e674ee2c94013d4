// The records of a plan, for the CUDA kernels. kernels/layout.py, which says what the fields
// mean, writes this file:
// python -m fusedmoe.kernels.layout csrc/cuda/layout.h
#pragma once

namespace fusedmoe::cuda {

constexpr int from_x = 0, from_buffer = 1, to_output = 2, write_softmax = 1, write_weights = 2,
              expert_kind = 0, matrix_kind = 0, gather_kind = 0, stage_kind = 1, mix_kind = 2,
              product_kind = 3, zero_kind = 4, no_logits = 0, vector_logits = 1, free_logits = 2,
              key_logits = 3;

struct PlaceRecord {
  static constexpr int kind = 0, column = 1, stride = 2, buffer = 3, size = 4;
};
struct SourceRecord {
  static constexpr int place = 0, width = 4, first = 5, size = 6;
};
struct LinearRecord {
  static constexpr int weight = 0, bias = 1, width = 2, reduction = 3, activation = 4, parameter =
                       5, hidden = 6, sources = 7, size = 8;
};
struct UnitRecord {
  static constexpr int gate = 0, reads = 1, seen = 2, statics = 3, elements = 4, fixed = 5, place =
                       6, mixing = 10, size = 11;
};
struct GroupRecord {
  static constexpr int units = 0, width = 1, runs = 2, copies = 3, selectors = 4, size = 5;
};
struct RunRecord {
  static constexpr int source = 0, count = 6, size = 7;
};
struct ExpertReadRecord {
  static constexpr int linear = 0, size = 1;
};
struct GateReadRecord {
  static constexpr int unit = 0, row = 1, size = 2;
};
struct TileRecord {
  static constexpr int group = 0, column = 1, softmax = 2, task = 3, wait = 4, size = 5;
};
struct BackwardTileRecord {
  static constexpr int kind = 0, record = 1, wait = 2, size = 3;
};
struct ExpertTileRecord {
  static constexpr int linear = 0, column = 1, width = 2, dz = 3, readers = 4, size = 5;
};
struct ReaderRecord {
  static constexpr int place = 0, p = 4, dw = 5, unit = 6, read = 7, size = 8;
};
struct SourceTileRecord {
  static constexpr int place = 0, column = 4, width = 5, add = 6, uses = 7, selections = 8, size =
                       9;
};
struct UseRecord {
  static constexpr int weight = 0, outputs = 1, reduction = 2, first = 3, dz = 4, size = 5;
};
struct SelectionRecord {
  static constexpr int unit = 0, weight = 1, reduction = 2, dz = 3, p = 4, dw = 5, tiles = 6, stride
                       = 7, store = 8, size = 9;
};
struct MatrixTaskRecord {
  static constexpr int kind = 0, weight = 1, bias = 2, outputs = 3, reduction = 4, dz = 5, row = 6,
                       column = 7, source = 8, size = 14;
};
struct FurtherUsesRecord {
  static constexpr int uses = 0, size = 1;
};
struct MatrixUseRecord {
  static constexpr int dz = 0, source = 1, size = 7;
};
struct StaticTaskRecord {
  static constexpr int kind = 0, element = 1, terms = 2, size = 3;
};
struct TermRecord {
  static constexpr int dw = 0, tiles = 1, stride = 2, mixing = 3, size = 4;
};
struct OperationRecord {
  static constexpr int kind = 0, record = 1, size = 2;
};
struct GatherRecord {
  static constexpr int place = 0, parts = 4, size = 5;
};
struct PartRecord {
  static constexpr int place = 0, first = 4, width = 5, column = 6, sends = 7, size = 8;
};
struct StageRecord {
  static constexpr int source = 0, place = 4, width = 8, norm = 9, eps = 10, weight = 11, bias = 12,
                       activation = 13, parameter = 14, slope = 15, slopes = 16, stream = 17,
                       threshold = 18, scale = 19, d_weight = 20, d_bias = 21, d_slope = 22, size =
                       23;
};
struct MixRecord {
  static constexpr int unit = 0, width = 1, logits = 2, source = 3, columns = 7, free = 8, factor =
                       9, channels = 10, p = 11, given = 12, dw = 13, d_free = 14, size = 15;
};
struct MixReadRecord {
  static constexpr int place = 0, key = 4, element = 8, d_channels = 9, size = 10;
};
struct ProductRecord {
  static constexpr int place = 0, width = 4, a = 5, b = 9, size = 13;
};
struct ZeroRecord {
  static constexpr int place = 0, width = 4, size = 5;
};

}  // namespace fusedmoe::cuda
