// Where a plan puts things: panels of a block's buffers, operands of bfloat16, transposed inputs, and
// rows of the chunk's buffer.
#pragma once
#include <map>
#include <set>

#include "plan.h"

namespace fusedmoe::cpu {

class Allocation {
 protected:
  explicit Allocation(Plan& plan) : plan_(plan) {}

  template <class T>
  Span<T> own(std::vector<T> items) {
    auto owner = std::make_shared<std::vector<T>>(std::move(items));
    plan_.storage.push_back(owner);
    return {owner->data(), int64_t(owner->size())};
  }

  // Inference rounds widths up, because a few rows are laid out row by row in the same space
  // (forward.h).
  Panel panel(int64_t width, bool save) {
    int64_t size = plan_.training ? width : padded(width);
    int64_t& top = save && plan_.training ? plan_.saved : top_;
    Panel p{top, width, save && plan_.training, panels_++};
    top += size;
    plan_.scratch = std::max(plan_.scratch, top_);
    plan_.widest = std::max(plan_.widest, width);
    return p;
  }
  int64_t d_panel(int64_t width) {
    int64_t offset = plan_.d_scratch;
    plan_.d_scratch += width;
    return offset;
  }

  // The operand of a panel, and whether this is the first linear to read it: then it is to make it.
  std::pair<int64_t, bool> operand(const Panel& in) {
    auto [at, fresh] = operands_.try_emplace(in.id, top_);
    if (fresh) top_ += (in.width + 1) / 2;
    plan_.scratch = std::max(plan_.scratch, top_);
    return {at->second, fresh};
  }
  // Maps that run again in backward may run without those that made their operands; the inputs' are
  // always made.
  void operand(Stage& stage) {
    auto [at, fresh] = operand(stage.in);
    stage.operand = at;
    stage.convert = fresh || (plan_.recompute && !is_input(stage.in));
    stage.transposed_weight = plan_.transposed_weights;
    plan_.transposed_weights += stage.k * (stage.n + stage.n % 2);
  }
  bool is_input(const Panel& in) const {
    auto source = source_.find(in.id);
    return source != source_.end() && source->second.slot >= 0;
  }

  // Where backward finds the transpose of a panel; entered once, however many linears read it.
  int64_t transposed(const Panel& in) {
    TransposedInput& source = source_[in.id];
    auto [at, fresh] = transposed_.try_emplace(in.id, plan_.transposed);
    if (fresh) {
      source.from = source.stage ? source.stage->z : in;
      source.from.width = in.width;
      source.to = plan_.transposed;
      transposes_.push_back(source);
      plan_.transposed += leading(in.width);
    }
    return at->second;
  }

  // Whether the panels of a segment are read no more when it is done, so that the next one takes
  // their space.
  bool passing() const { return !plan_.training || plan_.recompute; }

  // So many rows of the chunk's buffer.
  int64_t rows(int64_t count) {
    plan_.d_z += count;
    return plan_.d_z - count;
  }
  // Rows whose sums are the gradients of elements of a parameter, `step` elements from row to row; -1
  // of what has no gradient, whose rows nobody would write.
  int64_t summed(int parameter, bool differentiated, int64_t count, int64_t step, int64_t element = 0) {
    plain_.insert(parameter);
    if (!differentiated) return -1;
    const int64_t first = rows(count);
    for (int64_t n = 0; n < count; n++) row_sums_.push_back({first + n, parameter, element + n * step});
    return first;
  }

  Plan& plan_;
  int64_t top_ = 0;
  int panels_ = 0;
  // By the panel's id.
  std::map<int, TransposedInput> source_;
  std::map<int, int64_t> transposed_, operands_;
  std::vector<TransposedInput> transposes_;
  std::vector<RowSum> row_sums_;
  std::set<int> plain_;
};

}  // namespace fusedmoe::cpu
