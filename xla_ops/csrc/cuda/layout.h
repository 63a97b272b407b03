// Between matrices of XLA's, [batch, D], and the packed form of the kernels, [tiles, rows, kTile] (device.cuh).

#ifndef XLA_OPS_CSRC_CUDA_LAYOUT_H_
#define XLA_OPS_CSRC_CUDA_LAYOUT_H_

#include "kernels.h"

namespace xla_ops::cuda {

// How many values the packed form of x [B, D] has, with a row of zeros after the last feature.
int64_t packed_count(const Shape& s);

// packed = that form of x.
template <typename T>
cudaError_t pack(cudaStream_t stream, const Shape& s, const T* x, T* packed);

// How many values the packed sums for d_x have, which have no row of zeros.
int64_t sums_count(const Shape& s);

// d_x [B, D] = packed sums, whose order within a row is that of sum_position (device.cuh).
template <typename T>
cudaError_t unpack_sums(cudaStream_t stream, const Shape& s, const float* sums, T* d_x);

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_LAYOUT_H_
