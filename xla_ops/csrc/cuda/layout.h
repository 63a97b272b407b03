// Between matrices of XLA's, [batch, D], and the packed form of the kernels, [tiles, rows, kTile] (device.cuh).

#ifndef XLA_OPS_CSRC_CUDA_LAYOUT_H_
#define XLA_OPS_CSRC_CUDA_LAYOUT_H_

#include "kernels.h"

namespace xla_ops::cuda {

// Allocates the packed form of x [B, D], with a row of zeros after the last feature, and fills it.
template <typename T>
cudaError_t pack(cudaStream_t stream, Scratch& scratch, const Shape& s, const T* x, const T** packed);

// Allocates packed sums for d_x, without a row of zeros, and sets them to 0.
cudaError_t zero_sums(cudaStream_t stream, Scratch& scratch, const Shape& s, float** sums);

// d_x [B, D] = packed sums, whose order within a row is that of sum_position (device.cuh).
template <typename T>
cudaError_t unpack_sums(cudaStream_t stream, const Shape& s, const float* sums, T* d_x);

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_LAYOUT_H_
