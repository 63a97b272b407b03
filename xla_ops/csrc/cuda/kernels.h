// The launchers of the CUDA kernels: plain host functions, which do not check their arguments. The handlers
// (handlers.cc) check them; tests call the launchers without XLA. Each queues work on `stream` and returns at
// once, with cudaSuccess or an error. It queues only kernels and fills of memory, so that the stream may be
// captured into a graph.
//
// T is float or bfloat16. Pointers are to device memory; `bias` may be null.

#ifndef XLA_OPS_CSRC_CUDA_KERNELS_H_
#define XLA_OPS_CSRC_CUDA_KERNELS_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../types.h"

namespace xla_ops::cuda {

// [L, F], of uint16_t or int32_t. The type is tested at each load: an index is loaded once and used often.
struct Indices {
  const void* data;
  bool is_uint16;
};

// The inputs of a batch: the dense ones, then the sparse ones. Entry n is the value of the sparse input
// columns[n] for the example rows[n]; entries out of range are padding. Entries of the same example and input
// are added.
template <typename T>
struct Inputs {
  const T* x;  // [B, D]
  const int32_t* rows;
  const int32_t* columns;
  const T* values;
  int64_t num_entries, num_columns;
};

// Weights and their moments; null pointers if a layer has no bias.
struct AdamWeights {
  float *w, *mu, *nu;
};
struct AdamRates {
  const float* rates;  // learning rate, 1 / (1 - b1^t), 1 / (1 - b2^t)
  float b1, b2, epsilon;
};

// The temporaries of a launcher, allocated from one buffer of device memory, aligned for any access.
//
// A launcher takes all temporaries before it queues anything. If the buffer is too small for them, it queues
// nothing and returns cudaErrorMemoryAllocation. Called without a buffer, it thus computes only the size that
// it needs, taken().
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
  // Tests override this, so that a sanitizer detects accesses beyond the bounds of a temporary.
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

// Computes d_x [B, D], d_kernel [L, F] and d_bias [L] from dy [B, L]. d_x and d_bias may be null.
template <typename T>
cudaError_t fan_in_matmul_gradients(cudaStream_t stream, Workspace& workspace, const Shape& s,
                                    const Inputs<T>& inputs, const T* kernel, Indices indices, const T* dy,
                                    T* d_x, T* d_kernel, T* d_bias);

// Computes the mean loss against positives [B, width], `value`, and the gradients of inputs, kernel and bias.
// d_x and d_bias may be null.
template <typename T>
cudaError_t fan_in_loss_value(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                              const Inputs<T>& inputs, const T* kernel, Indices indices, const T* bias,
                              const int32_t* positives, int64_t width, float* value);
template <typename T>
cudaError_t fan_in_loss_gradients(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                                  const Inputs<T>& inputs, const T* kernel, Indices indices, const T* bias,
                                  const int32_t* positives, int64_t width, float* value, T* d_x, T* d_kernel,
                                  T* d_bias);

// The same, but the gradients of kernel and bias are applied in place: by SGD with `learning_rate` [] and
// `key` [4] (the words of a RoundingKey, then the number of the first label), or by Adam.
template <typename T>
cudaError_t fan_in_sgd_step(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                            const Inputs<T>& inputs, T* kernel, Indices indices, T* bias,
                            const int32_t* positives, int64_t width, const float* learning_rate,
                            const uint32_t* key, float* value, T* d_x);
cudaError_t fan_in_adam_step(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                             const Inputs<float>& inputs, const AdamWeights& kernel, Indices indices,
                             const AdamWeights& bias, const int32_t* positives, int64_t width,
                             const AdamRates& rates, float* value, float* d_x);

// Applies a step of Adam in place, to kernel [D, O] and its moments, with the gradient x.T dy of x [B, D] and
// dy [B, O]. M, the type of the moments, is float or bfloat16. `key` [3] has the words of the RoundingKey for
// second moments in bfloat16.
template <typename M>
cudaError_t dense_adam_step(cudaStream_t stream, const DenseShape& s, const float* x, const float* dy,
                            float* kernel, M* mu, M* nu, const AdamRates& rates, const uint32_t* key);

// Computes scores and labels [B, k], the k best labels. Logits of `labels_at_once` labels exist at a time.
template <typename T>
cudaError_t fan_in_top_k(cudaStream_t stream, Workspace& workspace, const Shape& s, int64_t k,
                         int64_t labels_at_once, const Inputs<T>& inputs, const T* kernel, Indices indices,
                         const T* bias, float* scores, int32_t* labels);

// Computes the k-th smallest |x|, `result`, with k in 1..n; x has n values and no NaN.
template <typename T>
cudaError_t kth_smallest(cudaStream_t stream, Workspace& workspace, const T* x, int64_t n, int64_t k,
                         float* result);

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_KERNELS_H_
