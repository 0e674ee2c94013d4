// The launches of row-wise operations.
#include "rowwise.h"

#include "launch.h"

namespace fusedmoe::cuda {
namespace {

template <bool BACKWARD>
void run(const char* name, const RowwiseCall& call, Number number, Stream stream) {
  // Eight warps a block: their rows are 32 bytes of a row of dw. Four blocks a multiprocessor have 64
  // registers a thread, five 48.
  constexpr int threads = 256, rows = threads / 32, blocks = BACKWARD ? 4 : 5;
  const Shape shape{unsigned((call.of.network.rows + rows - 1) / rows), 1, threads, 0};
  const auto launch_one = [&](auto kernel) { launch(name, kernel, shape, stream, call); };
  switch (number) {
    case Number::bfloat16: return launch_one(rowwise_kernel<bfloat16, BACKWARD, threads, blocks>);
    case Number::float16: return launch_one(rowwise_kernel<float16, BACKWARD, threads, blocks>);
    case Number::float32: return launch_one(rowwise_kernel<float, BACKWARD, threads, blocks>);
  }
}

}  // namespace

void rowwise_forward(const Network& network, Number number, const int64_t* seed, int place, Stream stream) {
  const Backward none{network, {}, nullptr, nullptr, nullptr, 0, 0};
  run<false>("rowwise_forward", {none, seed, place}, number, stream);
}

void rowwise_backward(const Backward& backward, Number number, const int64_t* seed, int place, Stream stream) {
  run<true>("rowwise_backward", {backward, seed, place}, number, stream);
}

}  // namespace fusedmoe::cuda
