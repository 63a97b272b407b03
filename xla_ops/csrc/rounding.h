// The random bits of stochastic rounding, the same on all platforms and in xla_ops/_rounding.py.
//
// A float32 value becomes bfloat16 by adding 16 random bits to its low 16 bits: the carry rounds it up or
// down, so that the result is exact on average. The bits of a weight depend on its position p among all
// weights. They are half of a word of Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1,
// 2, 3", SC 2011) with key `seed` and counter (c mod 2^32, c / 2^32, step, 0), in integer arithmetic:
//
//   run     = p / 128
//   c       = run * 16 + p % 16
//   word    = p % 128 / 32
//   half    = p / 16 % 2         (0 is the low half)
//
// Thus 128 consecutive positions share 16 counters.

#ifndef XLA_OPS_CSRC_ROUNDING_H_
#define XLA_OPS_CSRC_ROUNDING_H_

#include <stdint.h>

#include "types.h"

#ifdef __CUDACC__
#define XLA_OPS_UNROLL_ROUNDS _Pragma("unroll")
#else
#define XLA_OPS_UNROLL_ROUNDS _Pragma("GCC unroll 10")
#endif

namespace xla_ops {

constexpr int kCounters = 16;
constexpr int kPositions = 128;  // a run: the positions that share kCounters counters

struct RoundingKey {
  uint32_t seed[2];
  uint32_t step;
};

XLA_OPS_INLINE uint64_t rounding_counter(uint64_t position) {
  return position / kPositions * kCounters + position % kCounters;
}

// The high and the low word of a * factor.
struct MultiplyWords {
  XLA_OPS_INLINE void operator()(uint32_t a, uint32_t factor, uint32_t* high, uint32_t* low) const {
    const uint64_t product = static_cast<uint64_t>(a) * factor;
    *high = static_cast<uint32_t>(product >> 32);
    *low = static_cast<uint32_t>(product);
  }
};

// Computes the four words of Philox4x32-10 for one counter, or for each of a vector V of counters with the
// same high word.
template <typename V, typename Multiply>
XLA_OPS_INLINE void philox(const RoundingKey& key, V counter_low, uint32_t counter_high,
                           const Multiply& multiply, V* words) {
  uint32_t k0 = key.seed[0], k1 = key.seed[1];
  V c0 = counter_low, c1 = V{} + counter_high, c2 = V{} + key.step, c3 = V{};
  XLA_OPS_UNROLL_ROUNDS
  for (int round = 0; round < 10; ++round) {
    V high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, &high0, &low0);
    multiply(c2, 0xCD9E8D57u, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}
XLA_OPS_INLINE void philox(const RoundingKey& key, uint64_t counter, uint32_t (&words)[4]) {
  philox(key, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), MultiplyWords(), words);
}

// Returns the half word of the n-th of the 8 positions that share a counter, in increasing order. Words are
// not indexed, so that they stay in registers.
XLA_OPS_INLINE uint32_t half_of(const uint32_t (&words)[4], int n) {
  const uint32_t word = n < 4 ? (n < 2 ? words[0] : words[1]) : (n < 6 ? words[2] : words[3]);
  return n % 2 ? word >> 16 : word & 0xffff;
}

XLA_OPS_INLINE uint32_t rounding_bits(const RoundingKey& key, uint64_t position) {
  uint32_t words[4];
  philox(key, rounding_counter(position), words);
  return half_of(words, static_cast<int>(position % kPositions / kCounters));
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_ROUNDING_H_
