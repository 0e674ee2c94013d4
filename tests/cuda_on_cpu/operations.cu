#include "cuda/philox.h"
#include "samples.h"

namespace fusedmoe::cuda::samples {
namespace {

struct Writer {
  uint32_t* to;
  int at = 0;

  __device__ void word(uint32_t x) { store_global(to + 32 * at++ + lane(), x); }
  __device__ void number(float x) { word(float_as_word(x)); }
  template <int N>
  __device__ void words(const uint32_t (&all)[N]) {
    for (int i = 0; i < N; i++) word(all[i]);
  }
};

template <bool TRANSPOSED>
__device__ __forceinline__ void write_matrices(Writer& out, const uint32_t* shared) {
  uint32_t one[1], two[2], four[4];
  load_matrices<1, TRANSPOSED>(one, shared + lane() % 8 * 4);
  load_matrices<2, TRANSPOSED>(two, shared + lane() % 16 * 4);
  load_matrices<4, TRANSPOSED>(four, shared + lane() * 4);
  out.words(one);
  out.words(two);
  out.words(four);
}

// The numbers of from are read as pairs of T, and for float the upper halves as tf32.
template <class T>
__device__ __forceinline__ void write_product(Writer& out, const uint32_t* from) {
  constexpr uint32_t used = sizeof(T) == 2 ? 0xffffffff : 0xffff0000;
  float c[4];
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) {
    c[i] = float(lane() - 8 * i);
    a[i] = load_global(from + (32 * i + lane()) % 256) & used;
  }
  for (int i = 0; i < 2; i++) b[i] = load_global(from + (32 * i + lane() + 128) % 256) & used;
  multiply_add<T>(c, a, b);
  for (int i = 0; i < 4; i++) out.number(c[i]);
}

// Of Random123's known answers, each of three in every third lane.
__device__ __forceinline__ Philox counter_of(int lane) {
  if (lane % 3 == 2) return {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
  const uint32_t all = lane % 3 ? 0xffffffff : 0;
  return {all, all, all, all};
}
__device__ __forceinline__ uint64_t key_of(int lane) {
  return lane % 3 == 2 ? 0x299f31d0a4093822 : lane % 3 ? ~uint64_t(0) : 0;
}

__global__ void __launch_bounds__(32) operations_kernel(const uint32_t* from, uint32_t* to) {
  Writer out{to};
  uint32_t* shared = shared_memory<uint32_t>();
  const float number = float(lane()) + 0.1f;
  const uint32_t word = load_global(from + lane());
  out.word(uint32_t(thread() + 100 * warp() + 1000 * block_x() + 10000 * blocks_x() + 100000 * block_y() +
                    1000000 * blocks_y()));
  // 2 to 9: numbers of 32 bits among lanes.
  out.number(shuffle(number, (lane() * 7) % 32));
  out.number(shuffle_xor(number, 5));
  out.number(shuffle_down(number, 9));
  out.word(shuffle(word, 31 - lane()));
  out.word(uint32_t(shuffle_xor(-lane(), 16)));
  out.word(uint32_t(shuffle_down(-lane(), 1)));
  out.number(sum_lanes<8>(number));
  out.number(max_lanes(number));
  // Each size of a copy once, cut short in every second lane: at 0, 128 and 384 bytes.
  copy_async<4>(shared + lane(), from + lane(), lane() % 2 ? 4 : 0);
  copy_async<8>(shared + 32 + 2 * lane(), from + 2 * lane(), lane() % 2 ? 8 : 4);
  commit_copies();
  copy_async<16>(shared + 96 + 4 * lane(), from + 4 * lane(), lane() % 2 ? 16 : 0);
  commit_copies();
  wait_copies<1>();
  out.word(shared[lane()]);
  out.word(shared[32 + 2 * lane()]);
  out.word(shared[33 + 2 * lane()]);
  wait_copies<0>();
  sync_warp();
  write_matrices<false>(out, shared + 96);
  write_matrices<true>(out, shared + 96);
  sync_block();
  out.number(widened(rounded<bfloat16>(number)));
  out.number(widened(rounded<float16>(number)));
  out.word(rounded_pair<bfloat16>(number, -number));
  out.word(rounded_pair<float16>(number, -number));
  out.number(low<bfloat16>(word));
  out.number(high<bfloat16>(word));
  out.number(low<float16>(word));
  out.number(high<float16>(word));
  out.word(rounded_tf32(number));
  const auto pair = load_global(reinterpret_cast<const Vector<uint32_t, 4>*>(from) + lane());
  out.words(pair.at);
  write_product<bfloat16>(out, from);
  write_product<float16>(out, from);
  write_product<float>(out, from);
  out.words(philox(counter_of(lane()), key_of(lane())).at);
}

}  // namespace

void operations(const uint32_t* from, uint32_t* to, Stream stream) {
  launch("operations", operations_kernel, {1, 1, 32, 96 * 4 + 512}, stream, from, to);
}

}  // namespace fusedmoe::cuda::samples
