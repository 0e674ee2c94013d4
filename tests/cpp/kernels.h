// A run of fusedmoe::cpu::forward and backward on guarded memory: the only place here that fills a
// Call.
#pragma once
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>

#include "cpu/network.h"
#include "cpu/packing.h"
#include "memory.h"
#include "problem.h"

namespace fusedmoe::test {

// What a run is asked for, and how its work is shared out.
struct Request {
  bool training = true;  // false: outputs and mixing weights alone
  bool recompute = false;
  bool packed = false;   // parameters as a frozen network has them; inference alone
  bool weights = true, d_weights = true, d_x = true;
  std::function<bool(int)> gradient = [](int) { return true; };
  bool spread = false;   // gaps between the rows and slots of x
  int64_t threads = 1;   // for which the rows are cut into blocks
  cpu::ForEach each = [](int64_t count, const std::function<void(int64_t)>& body) {
    for (int64_t i = 0; i < count; i++) body(i);
  };
};

template <class T>
class Run {
 public:
  Run(const Problem<T>& given, const Request& request)
      : given_(given), request_(request), graph_(given.graph),
        plan_(cpu::make_plan(graph_, {request.training, given.expanded, request.recompute, given.bf16})),
        x_(layout()), d_out_(given.d_out), d_weights_(given.d_weights),
        out_(given.rows * count_of(graph_.output)), weights_(request.weights ? given.rows * graph_.mixing : 0),
        kept_(request.training ? plan_->saved * cpu::padded(given.rows) : 0),
        d_x_(request.training && request.d_x ? given.x.size() : 0) {
    for (size_t i = 0; i < given.params.size(); i++) {
      params_.push_back(std::make_unique<Guarded<T>>(given.params[i]));
      const bool wanted = request.training && graph_.live[i] && request.gradient(int(i));
      grads_.push_back(std::make_unique<Guarded<T>>(wanted ? given.params[i].size() : 0));
      param_pointers_.push_back(params_[i]->data());
      grad_pointers_.push_back(wanted ? grads_[i]->data() : nullptr);
    }
    if (request.packed) {
      const cpu::Packing packing = cpu::make_packing(*plan_);
      packed_ = std::make_unique<Guarded<T>>(packing.size);
      cpu::pack<T>(*plan_, packing, param_pointers_.data(), packed_->data());
      for (size_t i = 0; i < given.params.size(); i++)
        param_pointers_[i] = packing.offset[i] < 0 ? nullptr : packed_->data() + packing.offset[i];
    }
    if (given.bf16) halve();
    for (Guarded<T>* memory : written()) memory->fill(std::numeric_limits<T>::quiet_NaN());
  }

  // Throws std::logic_error where memory was written that was not the kernels' to write.
  Results<T> results() {
    cpu::Call<T> call = arguments();
    cpu::forward<T>(*plan_, call, request_.each);
    if (request_.training) cpu::backward<T>(*plan_, call, request_.each);
    check_memory();
    Results<T> results{out_.values(), weights_.values(), d_x_.values(), {}};
    for (const auto& grad : grads_) results.grads.push_back(grad->values());
    return results;
  }

 private:
  static constexpr int64_t slot_gap = 3, row_gap = 5;

  const graph::Input& input() const { return graph_.inputs[0]; }
  int64_t slot_stride() const {
    return given_.expanded && input().slots > 1 ? 0 : input().width + (request_.spread ? slot_gap : 0);
  }
  int64_t row_stride() const {
    const int64_t slots = given_.expanded ? 1 : input().slots, gap = request_.spread ? slot_gap : 0;
    return slots * (input().width + gap) + (request_.spread ? row_gap : 0);
  }
  // x as the strides say, up to its last number.
  std::vector<T> layout() const {
    const int64_t slots = given_.expanded ? 1 : input().slots;
    if (given_.rows == 0) return {};
    std::vector<T> x((given_.rows - 1) * row_stride() + (slots - 1) * slot_stride() + input().width,
                     std::numeric_limits<T>::quiet_NaN());
    for (int64_t row = 0; row < given_.rows; row++)
      for (int64_t s = 0; s < slots; s++)
        for (int64_t k = 0; k < input().width; k++)
          x[row * row_stride() + s * slot_stride() + k] = given_.x[(row * input().slots + s) * input().width + k];
    return x;
  }

  // The linears' weights in bfloat16, and in no other type.
  void halve() {
    const std::vector<bool> weights = weights_of(graph_);
    for (size_t i = 0; i < given_.params.size(); i++) {
      std::vector<uint16_t> bits;
      if (weights[i])
        for (T value : given_.params[i]) bits.push_back(Bf16Operands::bits(value));
      halves_.push_back(std::make_unique<Guarded<uint16_t>>(bits));
      half_pointers_.push_back(halves_[i]->data());
      if (weights[i]) param_pointers_[i] = nullptr;
    }
  }

  cpu::Call<T> arguments() {
    cpu::Call<T> call;
    call.x = x_.data();
    call.rows = given_.rows;
    call.row_stride = row_stride();
    call.slot_stride = slot_stride();
    call.drops = true;
    call.seed = dropout_seed;
    call.params = param_pointers_.data();
    call.packed = request_.packed;
    call.bf16_weights = given_.bf16 ? half_pointers_.data() : nullptr;
    call.out = out_.data();
    call.weights = request_.weights ? weights_.data() : nullptr;
    call.saved = kept_.data();
    call.block = cpu::rows_of_block(given_.rows, request_.threads);
    if (!request_.training) return call;
    call.d_out = d_out_.data();
    call.d_weights = request_.d_weights ? d_weights_.data() : nullptr;
    call.d_x = request_.d_x ? d_x_.data() : nullptr;
    call.grads = grad_pointers_.data();
    return call;
  }

  std::vector<Guarded<T>*> written() {
    std::vector<Guarded<T>*> all = {&out_, &weights_, &kept_, &d_x_};
    for (const auto& grad : grads_) all.push_back(grad.get());
    return all;
  }

  void check_memory() {
    bool same = x_.holds(layout()) && d_out_.holds(given_.d_out) && d_weights_.holds(given_.d_weights);
    for (size_t i = 0; i < params_.size(); i++) same = same && params_[i]->holds(given_.params[i]);
    if (!same) throw std::logic_error("expected the inputs as they were, got one changed");
    std::vector<Guarded<T>*> all = written();
    all.insert(all.end(), {&x_, &d_out_, &d_weights_});
    for (const auto& param : params_) all.push_back(param.get());
    for (const Guarded<T>* memory : all)
      if (!memory->intact())
        throw std::logic_error("expected nothing in front of a tensor to be written, got other bytes there");
  }

  const Problem<T>& given_;
  const Request& request_;
  const Graph& graph_;
  std::unique_ptr<cpu::Plan> plan_;
  Guarded<T> x_, d_out_, d_weights_, out_, weights_, kept_, d_x_;
  std::vector<std::unique_ptr<Guarded<T>>> params_, grads_;
  std::unique_ptr<Guarded<T>> packed_;
  std::vector<std::unique_ptr<Guarded<uint16_t>>> halves_;
  std::vector<const uint16_t*> half_pointers_;
  std::vector<const T*> param_pointers_;
  std::vector<T*> grad_pointers_;
};

template <class T>
Results<T> run(const Problem<T>& given, const Request& request = {}) {
  return Run<T>(given, request).results();
}

}  // namespace fusedmoe::test
