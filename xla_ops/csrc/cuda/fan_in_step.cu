// A whole training step of a fixed fan-in output layer in one pass over the labels (fan_in_loss.cuh): a block of threads
// updates its labels' weights where they are, once it has their gradients. No other reads them.

#include "fan_in_loss.cuh"

namespace xla_ops::cuda {
namespace {

// The random bits of the weight at `position`, as csrc/cpu/kernels.h says: half a word of Philox4x32-10.
__device__ inline uint32_t rounding_bits(const uint32_t* key, uint64_t position) {
  const uint64_t counter = position / 128 * 16 + position % 16;
  uint32_t k0 = __ldg(key), k1 = __ldg(key + 1);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = __ldg(key + 2), c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  const uint64_t which = position % 128 / 32;
  const uint32_t word = which < 2 ? (which == 0 ? c0 : c1) : (which == 2 ? c2 : c3);
  return position / 16 % 2 ? word >> 16 : word & 0xffff;
}

__device__ inline void round_stochastically(float* w, float x, const uint32_t*, uint64_t) { *w = x; }
__device__ inline void round_stochastically(bfloat16* w, float x, const uint32_t* key, uint64_t position) {
  const uint32_t bits = __float_as_uint(x);
  w->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : bits + rounding_bits(key, position)) >> 16);
}

// w -= learning_rate * gradient. A weight without a gradient is not touched.
template <typename T>
struct SgdUpdate {
  T* weights;
  T* biases;  // or null
  int64_t first_bias;  // its position, after those of the kernel
  const float* learning_rate;
  const uint32_t* key;

  __device__ void kernel(int64_t i, float d) const { update(weights + i, i, d); }
  __device__ void bias(int64_t label, float d) const { update(biases + label, first_bias + label, d); }
  __device__ bool has_bias() const { return biases != nullptr; }

  __device__ void update(T* w, int64_t position, float d) const {
    if (d != 0) round_stochastically(w, to_float(*w) - __ldg(learning_rate) * d, key, position);
  }
};

struct AdamUpdate {
  AdamWeights weights, biases;
  AdamRates rates;

  __device__ void kernel(int64_t i, float d) const { update(weights, i, d); }
  __device__ void bias(int64_t label, float d) const { update(biases, label, d); }
  __device__ bool has_bias() const { return biases.w != nullptr; }

  __device__ void update(const AdamWeights& at, int64_t i, float d) const {
    const float mu = rates.b1 * load_once(at.mu + i) + (1 - rates.b1) * d;
    const float nu = rates.b2 * load_once(at.nu + i) + (1 - rates.b2) * d * d;
    at.mu[i] = mu;
    at.nu[i] = nu;
    const float learning_rate = __ldg(rates.rates), scale1 = __ldg(rates.rates + 1), scale2 = __ldg(rates.rates + 2);
    at.w[i] -= learning_rate * (mu * scale1) / (sqrtf(nu * scale2) + rates.epsilon);
  }
};

}  // namespace

template <typename T>
cudaError_t fan_in_sgd_step(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss, const T* x,
                            T* kernel, Indices indices, T* bias, const int32_t* positives, int64_t width,
                            const float* learning_rate, const uint32_t* key, float* value, T* d_x) {
  const SgdUpdate<T> update{kernel, bias, s.labels * s.fan_in, learning_rate, key};
  return run_loss<T>(stream, workspace, s, loss, x, kernel, indices, bias, {positives, width}, update, value, d_x);
}

cudaError_t fan_in_adam_step(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss, const float* x,
                             const AdamWeights& kernel, Indices indices, const AdamWeights& bias,
                             const int32_t* positives, int64_t width, const AdamRates& rates, float* value,
                             float* d_x) {
  return run_loss<float>(stream, workspace, s, loss, x, kernel.w, indices, bias.w, {positives, width},
                         AdamUpdate{kernel, bias, rates}, value, d_x);
}

#define XLA_OPS_INSTANTIATE(T)                                                                                       \
  template cudaError_t fan_in_sgd_step<T>(cudaStream_t, Workspace&, const Shape&, Loss, const T*, T*, Indices, T*, \
                                          const int32_t*, int64_t, const float*, const uint32_t*, float*, T*);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
