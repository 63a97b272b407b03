// Sums of rows, and masks of the rows that have a property.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_ROWS_H_
#define XLA_OPS_CSRC_CPU_KERNELS_ROWS_H_

#include <stdint.h>

#include "../kernels.h"
#include "lanes.h"
#include "vector.h"

namespace xla_ops {
namespace {

static_assert(kBlock <= 64, "a mask has a bit for each row of a block");

void row_sums(const float* rows, uint64_t mask, int64_t width, float* sums) {
  for (; mask; mask &= mask - 1) {
    const int64_t n = __builtin_ctzll(mask);
    Vec sum = {};
    for (int64_t b = 0; b < width; b += W) sum += load(rows + n * width + b);
    sums[n] += sum_lanes(sum);
  }
}

uint64_t nonzero(const float* rows, int64_t labels, int64_t width) {
  uint64_t mask = 0;
  for (int64_t n = 0; n < labels; ++n) mask |= uint64_t{!is_zero(rows + n * width, width)} << n;
  return mask;
}

uint64_t above(const float* rows, int64_t labels, int64_t width, const float* bounds) {
  uint64_t mask = 0;
  for (int64_t n = 0; n < labels; ++n) {
    UVec any = {};
    for (int64_t b = 0; b < width; b += W) {
      const auto greater = load(rows + n * width + b) > load(bounds + b);
      any |= reinterpret_cast<const UVec&>(greater);
    }
    mask |= uint64_t{any_bit(any)} << n;
  }
  return mask;
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_ROWS_H_
