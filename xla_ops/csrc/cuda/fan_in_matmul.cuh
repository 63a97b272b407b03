// The forward pass of fan_in_matmul, which fan_in_top_k uses too.

#ifndef XLA_OPS_CSRC_CUDA_FAN_IN_MATMUL_CUH_
#define XLA_OPS_CSRC_CUDA_FAN_IN_MATMUL_CUH_

#include "layer.cuh"

namespace xla_ops::cuda {

// y[b, l] = the logits, with y_stride elements from example to example. Out is float or T.
template <typename T, typename Out>
cudaError_t write_logits(cudaStream_t stream, const Layer<T>& layer, const SparseMap& map, Out* y,
                         int64_t y_stride);

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_FAN_IN_MATMUL_CUH_
