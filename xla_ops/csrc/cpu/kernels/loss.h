// Losses of rows of logits, and their derivatives.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_LOSS_H_
#define XLA_OPS_CSRC_CPU_KERNELS_LOSS_H_

#include <stdint.h>

#include "lanes.h"
#include "vector.h"

namespace xla_ops {
namespace {

// Comparisons are turned so that NaN passes through.
XLA_OPS_INLINE Vec max0(Vec x) { return x < 0 ? Vec{} : x; }

struct SquaredHinge {
  static XLA_OPS_INLINE Vec value_and_slope(Vec s, Vec* slope) {
    const Vec slack = max0(1 + s);
    *slope = 2 * slack;
    return slack * slack;
  }
};

// e^x for -87 <= x <= 0, to 2 units in the last place.
XLA_OPS_INLINE Vec exp_negative(Vec x) {
  typedef int32_t IVec __attribute__((vector_size(4 * W)));
  const Vec shifted = x * 1.44269504f - 0.5f;
  const IVec n =
      __builtin_convertvector(shifted, IVec);  // truncates, so rounds x / ln 2 to nearest for x <= 0
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two pieces
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  const IVec power = (n + 127) << 23;
  return p * reinterpret_cast<const Vec&>(power);
}

struct BinaryCrossEntropy {
  static XLA_OPS_INLINE Vec value_and_slope(Vec s, Vec* slope) {
    const Vec magnitude = s > 0 ? s : -s;
    const Vec e = exp_negative(magnitude > 87 ? Vec{} - 87 : -magnitude);
    *slope = (s > 0 ? Vec{} + 1 : e) / (1 + e);
    // log(1 + e) = 2 artanh(z) with z = e / (2 + e) <= 1/3
    const Vec z = e / (2 + e), z2 = z * z;
    Vec p = Vec{} + 1.0f / 13;
    p = p * z2 + 1.0f / 11;
    p = p * z2 + 1.0f / 9;
    p = p * z2 + 1.0f / 7;
    p = p * z2 + 1.0f / 5;
    p = p * z2 + 1.0f / 3;
    p = p * z2 + 1;
    return max0(s) + 2 * z * p;
  }
};

template <typename LossFunction>
float negatives(float* rows, int64_t labels, int64_t width, int64_t size, float scale, uint64_t* mask) {
  Vec total = {};
  *mask = 0;
  for (int64_t n = 0; n < labels; ++n, rows += width) {
    Vec sum = {};
    UVec any = {};
    for (int64_t b = 0; b < width; b += W) {
      Vec slope, value = LossFunction::value_and_slope(load(rows + b), &slope);
      if (b + W > size) {  // the end of the tile, and the padding after it
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          if (b + i >= size) value[i] = slope[i] = 0;
        }
      }
      sum += value;
      const Vec gradient = slope * scale;
      any |= nonzero_bits(gradient);
      store(rows + b, gradient);
    }
    total += sum;
    *mask |= uint64_t{any_bit(any)} << n;
  }
  return sum_lanes(total);
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_LOSS_H_
