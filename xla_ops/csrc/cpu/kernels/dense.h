// The gradient of a dense kernel.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_DENSE_H_
#define XLA_OPS_CSRC_CPU_KERNELS_DENSE_H_

#include <stdint.h>

#include "../kernels.h"
#include "vector.h"

namespace xla_ops {
namespace {

void products(const float* x, int64_t x_stride, const float* dy, int64_t batch, float* out) {
  constexpr int V = 4;  // kRows * V sums fit in the registers
  for (int64_t first = 0; first < kColumns; first += V * W) {
    Vec sums[kRows][V] = {};
    for (int64_t b = 0; b < batch; ++b) {
      const float* values = x + b * x_stride;
      Vec d[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) d[v] = load(dy + b * kColumns + first + v * W);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] += values[r] * d[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(out + r * kColumns + first + v * W, sums[r][v]);
    }
  }
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_DENSE_H_
