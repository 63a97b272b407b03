// The CUDA kernels as plain host functions, which check nothing: the handlers (handlers.cc) did, and the tests call
// these without XLA. All of them queue work on `stream` and return at once, with cudaSuccess or what went wrong.
//
// T is float or bfloat16. Pointers are to device memory; `bias` may be null.

#ifndef XLA_OPS_CSRC_CUDA_KERNELS_H_
#define XLA_OPS_CSRC_CUDA_KERNELS_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../types.h"

namespace xla_ops::cuda {

// [L, F], of uint16_t or int32_t: told apart when loaded, once per connection, which is rare next to its uses.
struct Indices {
  const void* data;
  bool is_uint16;
};

// Temporaries in device memory, aligned for any access, that live until the queued work is done.
class Scratch {
 public:
  virtual ~Scratch() = default;
  // Returns null if there is no memory left.
  virtual void* allocate(size_t bytes) = 0;
};

// y [B, L] = bias + x kernel.
template <typename T>
cudaError_t fan_in_matmul_forward(cudaStream_t stream, Scratch& scratch, const Shape& s, const T* x, const T* kernel,
                                  Indices indices, const T* bias, T* y);

// d_x [B, D], d_kernel [L, F], and d_bias [L] unless that is null, from dy [B, L].
template <typename T>
cudaError_t fan_in_matmul_gradients(cudaStream_t stream, Scratch& scratch, const Shape& s, const T* x, const T* dy,
                                    const T* kernel, Indices indices, T* d_x, T* d_kernel, T* d_bias);

// value = the mean loss against positives [B, width]; the gradients of all but the positives.
template <typename T>
cudaError_t fan_in_loss_value(cudaStream_t stream, Scratch& scratch, const Shape& s, Loss loss, const T* x,
                              const T* kernel, Indices indices, const T* bias, const int32_t* positives, int64_t width,
                              float* value);
template <typename T>
cudaError_t fan_in_loss_gradients(cudaStream_t stream, Scratch& scratch, const Shape& s, Loss loss, const T* x,
                                  const T* kernel, Indices indices, const T* bias, const int32_t* positives,
                                  int64_t width, float* value, T* d_x, T* d_kernel, T* d_bias);

// scores, labels [B, k]: the best, taking so many labels at once, which is as many logits as exist at any time.
template <typename T>
cudaError_t fan_in_top_k(cudaStream_t stream, Scratch& scratch, const Shape& s, int64_t k, int64_t labels_at_once,
                         const T* x, const T* kernel, Indices indices, const T* bias, float* scores, int32_t* labels);

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_KERNELS_H_
