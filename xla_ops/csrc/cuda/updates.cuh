// Updates of a weight whose gradient is known: a step of Adam, and stochastic rounding.

#ifndef XLA_OPS_CSRC_CUDA_UPDATES_CUH_
#define XLA_OPS_CSRC_CUDA_UPDATES_CUH_

#include <cmath>

#include "../rounding.h"
#include "kernels.h"
#include "values.cuh"

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

  // Returns the values after a step with gradient d.
  __device__ AdamValues operator()(const AdamValues& before, float d) const {
    const float mu = b1 * before.mu + (1 - b1) * d;
    const float nu = b2 * before.nu + (1 - b2) * d * d;
    return {before.w - learning_rate * (mu * scale1) / (sqrtf(nu * scale2) + epsilon), mu, nu};
  }

  float learning_rate, scale1, scale2, b1, b2, epsilon;
};

__device__ inline RoundingKey load_key(const uint32_t* key) {
  return {{__ldg(key), __ldg(key + 1)}, __ldg(key + 2)};
}

// Rounds up or down as 16 random bits say; a NaN stays one. A float is not rounded.
__device__ inline void set(float* p, float x, uint32_t) { *p = x; }
__device__ inline void set(bfloat16* p, float x, uint32_t random) {
  const uint32_t bits = __float_as_uint(x);
  p->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : bits + random) >> 16);
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_UPDATES_CUH_
