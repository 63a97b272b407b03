// What becomes of a weight whose gradient is known: a step of Adam, and stochastic rounding.

#ifndef XLA_OPS_CSRC_CUDA_UPDATES_CUH_
#define XLA_OPS_CSRC_CUDA_UPDATES_CUH_

#include <cmath>

#include "device.cuh"

namespace xla_ops::cuda {

// A weight and its moments.
struct AdamValues {
  float w, mu, nu;
};

struct AdamStep {
  __device__ explicit AdamStep(const AdamRates& rates)
      : learning_rate(__ldg(rates.rates)),
        scale1(__ldg(rates.rates + 1)),
        scale2(__ldg(rates.rates + 2)),
        b1(rates.b1),
        b2(rates.b2),
        epsilon(rates.epsilon) {}

  // What becomes of them with gradient d.
  __device__ AdamValues operator()(const AdamValues& before, float d) const {
    const float mu = b1 * before.mu + (1 - b1) * d;
    const float nu = b2 * before.nu + (1 - b2) * d * d;
    return {before.w - learning_rate * (mu * scale1) / (sqrtf(nu * scale2) + epsilon), mu, nu};
  }

  float learning_rate, scale1, scale2, b1, b2, epsilon;
};

// The random bits of rounding are those of csrc/cpu/kernels.h: kCounters counters serve kRun positions.
constexpr int kRun = 128;
constexpr int kCounters = 16;

struct RoundingKey {
  __device__ RoundingKey(uint32_t seed0, uint32_t seed1, uint32_t step) : seed{seed0, seed1}, step(step) {}
  __device__ explicit RoundingKey(const uint32_t* key)
      : RoundingKey(__ldg(key), __ldg(key + 1), __ldg(key + 2)) {}
  uint32_t seed[2], step;
};

// Philox4x32-10 of a counter.
__device__ inline void philox(const RoundingKey& key, uint64_t counter, uint32_t (&words)[4]) {
  uint32_t k0 = key.seed[0], k1 = key.seed[1];
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = key.step,
           c3 = 0;
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
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// The half of a counter's words that is for the position of number n among those that it serves, the lowest
// first.
__device__ inline uint32_t half_of(const uint32_t (&words)[4], int n) {
  const uint32_t word = n < 4 ? (n < 2 ? words[0] : words[1]) : (n < 6 ? words[2] : words[3]);
  return n % 2 ? word >> 16 : word & 0xffff;
}

// The random bits of the weight at `position`.
__device__ inline uint32_t rounding_bits(const RoundingKey& key, uint64_t position) {
  uint32_t words[4];
  philox(key, position / kRun * kCounters + position % kCounters, words);
  return half_of(words, static_cast<int>(position % kRun / kCounters));
}

// Rounds up or down as 16 random bits say; a NaN stays one. A float is not rounded.
__device__ inline void set(float* p, float x, uint32_t) { *p = x; }
__device__ inline void set(bfloat16* p, float x, uint32_t random) {
  const uint32_t bits = __float_as_uint(x);
  p->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : bits + random) >> 16);
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_UPDATES_CUH_
