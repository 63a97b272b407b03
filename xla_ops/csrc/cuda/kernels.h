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

// d_x [B, D], d_kernel [L, F], from dy [B, L].
template <typename T>
cudaError_t fan_in_matmul_gradients(cudaStream_t stream, Scratch& scratch, const Shape& s, const T* x, const T* dy,
                                    const T* kernel, Indices indices, T* d_x, T* d_kernel);

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_KERNELS_H_
