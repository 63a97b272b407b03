// Updates of weights and moments by SGD and Adam, with stochastic rounding to bfloat16.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_UPDATES_H_
#define XLA_OPS_CSRC_CPU_KERNELS_UPDATES_H_

#include <stdint.h>

#include "../../rounding.h"
#include "../kernels.h"
#include "lanes.h"
#include "vector.h"

namespace xla_ops {
namespace {

void adam(const float* __restrict gradient, int64_t count, const AdamStep& step, float* __restrict w,
          float* __restrict mu, float* __restrict nu) {
  const AdamStep s = step;
  for (int64_t i = 0; i < count; ++i) {
    const float g = gradient[i];
    const float m = s.b1 * mu[i] + (1 - s.b1) * g, v = s.b2 * nu[i] + (1 - s.b2) * g * g;
    mu[i] = m;
    nu[i] = v;
    w[i] -= s.learning_rate * (m * s.scale1) / (__builtin_sqrtf(v * s.scale2) + s.epsilon);
  }
}

void sgd(const float* __restrict gradient, int64_t count, float learning_rate, float* __restrict w) {
  for (int64_t i = 0; i < count; ++i) w[i] -= learning_rate * gradient[i];
}

// The high and the low words of a * factor.
struct MultiplyVectors {
  XLA_OPS_INLINE void operator()(UVec a, uint32_t factor, UVec* high, UVec* low) const {
    typedef uint64_t QVec __attribute__((vector_size(8 * W)));
    const QVec product = __builtin_convertvector(a, QVec) * static_cast<uint64_t>(factor);
    *high = __builtin_convertvector(product >> 32, UVec);
    *low = __builtin_convertvector(product, UVec);
  }
};

static_assert(kColumns == kPositions, "a dense layer is updated in runs of positions");
static_assert(kCounters % W == 0, "the counters of a run of positions are a whole number of vectors");

// Rounds a value source into `out`. `one(i)` returns one value, `many(i)` W of them; each index is computed
// exactly once, because the call may have side effects. `keeps(i)` and `keeps_run(i)` are true for values
// that are left unchanged.
template <typename Values>
void round_one(const Values& values, int64_t i, const RoundingKey& key, uint64_t position, bfloat16* out) {
  if (values.keeps(i)) return;
  const uint32_t random = rounding_bits(key, position);
  const float x = values.one(i);
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  out[i].bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : bits + random) >> 16);
}

template <typename Values>
void round_stochastically(const Values& values, int64_t count, const RoundingKey& key, int64_t position,
                          bfloat16* out) {
  int64_t i = 0;
  for (; i < count && (position + i) % kPositions; ++i) round_one(values, i, key, position + i, out);
  UVec lane;
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) lane[j] = j;
  for (; i + kPositions <= count; i += kPositions) {
    if (values.keeps_run(i)) continue;
    const uint64_t counter = rounding_counter(position + i);
    for (int64_t first = 0; first < kCounters; first += W) {
      UVec words[4];
      philox(key, lane + static_cast<uint32_t>(counter + first), static_cast<uint32_t>(counter >> 32),
             MultiplyVectors(), words);
#pragma GCC unroll 8
      for (int q = 0; q < kPositions / kCounters; ++q) {
        const int64_t at = i + q * kCounters + first;
        const Vec x = values.many(at);
        const UVec bits = reinterpret_cast<const UVec&>(x);
        const auto unordered = x != x;
        const UVec nan = reinterpret_cast<const UVec&>(unordered);
        const UVec random = q % 2 ? words[q / 2] >> 16 : words[q / 2] & 0xffff;
        const UVec rounded = ((bits + (random & ~nan)) | (nan & 0x400000)) >> 16;
        *reinterpret_cast<HVec*>(out + at) = __builtin_convertvector(rounded, HVec);
      }
    }
  }
  for (; i < count; ++i) round_one(values, i, key, position + i, out);
}

struct SgdValues {
  const float* gradient;
  float learning_rate;
  const bfloat16* w;

  bool keeps(int64_t i) const { return gradient[i] == 0; }
  // True for nearly all labels, except at the start of training.
  bool keeps_run(int64_t i) const { return is_zero(gradient + i, kPositions); }
  float one(int64_t i) const { return to_float(w[i]) - learning_rate * gradient[i]; }
  Vec many(int64_t i) const { return load(w + i) - learning_rate * load(gradient + i); }
};

// Returns the new second moments, for rounding. As a side effect, each call also updates the first moments
// and the weights.
struct AdamValues {
  const float* gradient;
  const AdamStep s;
  float* w;
  bfloat16 *mu, *nu;

  bool keeps(int64_t) const { return false; }
  bool keeps_run(int64_t) const { return false; }
  float one(int64_t i) const {
    float m = to_float(mu[i]), v = to_float(nu[i]);
    adam(gradient + i, 1, s, w + i, &m, &v);
    set(mu + i, m);
    return v;
  }
  Vec many(int64_t i) const {
    const Vec g = load(gradient + i);
    const Vec m = s.b1 * load(mu + i) + (1 - s.b1) * g, v = s.b2 * load(nu + i) + (1 - s.b2) * g * g;
    store(mu + i, m);
    Vec root;
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) root[j] = __builtin_sqrtf(v[j] * s.scale2);
    store(w + i, load(w + i) - s.learning_rate * (m * s.scale1) / (root + s.epsilon));
    return v;
  }
};

void sgd_stochastic(const float* gradient, int64_t count, float learning_rate, const RoundingKey& key,
                    int64_t position, bfloat16* w) {
  round_stochastically(SgdValues{gradient, learning_rate, w}, count, key, position, w);
}

void adam_bf16(const float* gradient, int64_t count, const AdamStep& step, const RoundingKey& key,
               int64_t position, float* w, bfloat16* mu, bfloat16* nu) {
  round_stochastically(AdamValues{gradient, step, w, mu, nu}, count, key, position, nu);
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_UPDATES_H_
