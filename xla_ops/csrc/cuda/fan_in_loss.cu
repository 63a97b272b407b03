// The loss of a fixed fan-in output layer against sparse positives, and all of its gradients, in one pass
// over the labels (fan_in_loss.cuh).

#include "fan_in_loss.cuh"

namespace xla_ops::cuda {
namespace {

template <typename T>
struct WriteGradients : WriteKernel<T> {
  T* d_bias;  // [L], or null

  __device__ void bias(int64_t label, float d) const { set(d_bias + label, d); }
  __device__ bool has_bias() const { return d_bias != nullptr; }
};

constexpr int kMeanThreads = 256;

__global__ void __launch_bounds__(kMeanThreads)
    mean_kernel(const double* __restrict__ totals, int64_t count, double divisor, float* __restrict__ mean) {
  __shared__ double sums[kMeanThreads];
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kMeanThreads) total += totals[i];
  sums[threadIdx.x] = total;
  __syncthreads();
  for (unsigned half = kMeanThreads / 2; half > 0; half /= 2) {  // in the same order whenever it runs
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *mean = static_cast<float>(sums[0] / divisor);
}

}  // namespace

cudaError_t write_mean(cudaStream_t stream, const double* totals, int64_t count, double divisor,
                       float* mean) {
  return launch(mean_kernel, 1, kMeanThreads, 0, stream, totals, count, divisor, mean);
}

template <typename T>
cudaError_t fan_in_loss_value(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                              const Inputs<T>& inputs, const T* kernel, Indices indices, const T* bias,
                              const int32_t* positives, int64_t width, float* value) {
  return run_loss<T>(stream, workspace, s, loss, inputs, kernel, indices, bias, {positives, width},
                     NoGradients{}, value, nullptr);
}

template <typename T>
cudaError_t fan_in_loss_gradients(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                                  const Inputs<T>& inputs, const T* kernel, Indices indices, const T* bias,
                                  const int32_t* positives, int64_t width, float* value, T* d_x, T* d_kernel,
                                  T* d_bias) {
  return run_loss<T>(stream, workspace, s, loss, inputs, kernel, indices, bias, {positives, width},
                     WriteGradients<T>{{d_kernel}, d_bias}, value, d_x);
}

#define XLA_OPS_INSTANTIATE(T)                                                                              \
  template cudaError_t fan_in_loss_value<T>(cudaStream_t, Workspace&, const Shape&, Loss, const Inputs<T>&, \
                                            const T*, Indices, const T*, const int32_t*, int64_t, float*);  \
  template cudaError_t fan_in_loss_gradients<T>(cudaStream_t, Workspace&, const Shape&, Loss,               \
                                                const Inputs<T>&, const T*, Indices, const T*,              \
                                                const int32_t*, int64_t, float*, T*, T*, T*);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
