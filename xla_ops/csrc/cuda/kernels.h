// The CUDA kernels as plain host functions, which check nothing: the handlers (handlers.cc) did, and the
// tests call these without XLA. All of them queue work on `stream` and return at once, with cudaSuccess or
// what went wrong. They queue nothing but kernels and fills of memory, so that a stream which is captured
// into a graph can take them.
//
// T is float or bfloat16. Pointers are to device memory; `bias` may be null.

#ifndef XLA_OPS_CSRC_CUDA_KERNELS_H_
#define XLA_OPS_CSRC_CUDA_KERNELS_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../types.h"

namespace xla_ops::cuda {

// [L, F], of uint16_t or int32_t: told apart when loaded, once per connection, which is rare next to its
// uses.
struct Indices {
  const void* data;
  bool is_uint16;
};

// The inputs of a batch: dense ones, and sparse ones after them. Entry n of those is at rows[n] (an example)
// and columns[n] (a sparse input); entries out of range are padding. Entries of the same example and input
// are added.
template <typename T>
struct Inputs {
  const T* x;  // [B, D]
  const int32_t* rows;
  const int32_t* columns;
  const T* values;
  int64_t num_entries, num_columns;
};

// Weights and their moments; for a bias that there is not, null.
struct AdamWeights {
  float *w, *mu, *nu;
};
struct AdamRates {
  const float* rates;  // learning rate, 1 / (1 - b1^t), 1 / (1 - b2^t)
  float b1, b2, epsilon;
};

// The temporaries of a launcher, allocated from one buffer of device memory, aligned for any access.
//
// A launcher takes all temporaries before it queues anything, and if the buffer is too small for them it
// queues nothing and returns cudaErrorMemoryAllocation. With no buffer, therefore, it only finds out how
// large one it needs.
class Workspace {
 public:
  Workspace() = default;
  Workspace(void* data, int64_t bytes) : data_(static_cast<char*>(data)), bytes_(bytes) {}
  virtual ~Workspace() = default;

  template <typename T>
  T* take(int64_t count) {
    const int64_t offset = taken_, bytes = (count > 0 ? count : 1) * static_cast<int64_t>(sizeof(T));
    taken_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return enough() ? static_cast<T*>(place(offset, bytes)) : nullptr;
  }
  int64_t taken() const { return taken_; }
  bool enough() const { return taken_ <= bytes_; }

 protected:
  static constexpr int64_t kAlignment = 256;
  // The tests override this, so that a sanitizer sees accesses out of the bounds of each.
  virtual void* place(int64_t offset, int64_t) { return data_ + offset; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0, taken_ = 0;
};

// y [B, L] = bias + x kernel.
template <typename T>
cudaError_t fan_in_matmul_forward(cudaStream_t stream, Workspace& workspace, const Shape& s,
                                  const Inputs<T>& inputs, const T* kernel, Indices indices, const T* bias,
                                  T* y);

// d_x [B, D] unless that is null, d_kernel [L, F], and d_bias [L] unless that is null, from dy [B, L].
template <typename T>
cudaError_t fan_in_matmul_gradients(cudaStream_t stream, Workspace& workspace, const Shape& s,
                                    const Inputs<T>& inputs, const T* kernel, Indices indices, const T* dy,
                                    T* d_x, T* d_kernel, T* d_bias);

// value = the mean loss against positives [B, width]; the gradients of all but the positives, without d_x if
// that is null.
template <typename T>
cudaError_t fan_in_loss_value(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                              const Inputs<T>& inputs, const T* kernel, Indices indices, const T* bias,
                              const int32_t* positives, int64_t width, float* value);
template <typename T>
cudaError_t fan_in_loss_gradients(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                                  const Inputs<T>& inputs, const T* kernel, Indices indices, const T* bias,
                                  const int32_t* positives, int64_t width, float* value, T* d_x, T* d_kernel,
                                  T* d_bias);

// The same, but the gradients of kernel and bias go into an update of those where they are: by SGD without
// momentum, with a float and, for the rounding of bfloat16, the three words of a
// RoundingKey (csrc/rounding.h), or by Adam.
template <typename T>
cudaError_t fan_in_sgd_step(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                            const Inputs<T>& inputs, T* kernel, Indices indices, T* bias,
                            const int32_t* positives, int64_t width, const float* learning_rate,
                            const uint32_t* key, float* value, T* d_x);
cudaError_t fan_in_adam_step(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                             const Inputs<float>& inputs, const AdamWeights& kernel, Indices indices,
                             const AdamWeights& bias, const int32_t* positives, int64_t width,
                             const AdamRates& rates, float* value, float* d_x);

// One step of Adam for kernel [D, O] and its moments where they are, of the gradient x.T dy, x [B, D] and dy
// [B, O]. M, the moments' type, is float or bfloat16; of the latter `key` is that of the second one's
// rounding.
template <typename M>
cudaError_t dense_adam_step(cudaStream_t stream, const DenseShape& s, const float* x, const float* dy,
                            float* kernel, M* mu, M* nu, const AdamRates& rates, const uint32_t* key);

// scores, labels [B, k]: the best, taking so many labels at once, which is as many logits as exist at any
// time.
template <typename T>
cudaError_t fan_in_top_k(cudaStream_t stream, Workspace& workspace, const Shape& s, int64_t k,
                         int64_t labels_at_once, const Inputs<T>& inputs, const T* kernel, Indices indices,
                         const T* bias, float* scores, int32_t* labels);

// result = the k-th smallest |x|, k from 1, of n without NaN.
template <typename T>
cudaError_t kth_smallest(cudaStream_t stream, Workspace& workspace, const T* x, int64_t n, int64_t k,
                         float* result);

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_KERNELS_H_
