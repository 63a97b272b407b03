// Transposition of matrices, and rounding of float32 arrays.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_LAYOUT_H_
#define XLA_OPS_CSRC_CPU_KERNELS_LAYOUT_H_

#include <stdint.h>

#include "lanes.h"
#include "vector.h"

namespace xla_ops {
namespace {

template <typename In, typename Out>
void transpose(const In* in, int64_t in_stride, int64_t rows, int64_t cols, int64_t out_width, Out* out,
               int64_t out_stride) {
  const int64_t full_rows = rows - rows % W, full_cols = cols - cols % W;
  for (int64_t c = 0; c < full_cols; c += W) {
    for (int64_t r = 0; r < full_rows; r += W) {
      Vec v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load(in + (c + i) * in_stride + r);
      Transpose<1>::run(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + (r + i) * out_stride + c, v[i]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < full_rows ? full_cols : 0; c < cols; ++c) {
      set(out + r * out_stride + c, to_float(in[c * in_stride + r]));
    }
    for (int64_t c = cols; c < out_width; ++c) set(out + r * out_stride + c, 0.0f);
  }
}

template <typename T>
void narrow(const float* in, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(in + i));
  for (; i < count; ++i) set(out + i, in[i]);
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_LAYOUT_H_
