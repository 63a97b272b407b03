// The loss of a fixed fan-in output layer against sparse positives, and all of its gradients, in one pass over the
// labels: a block of threads takes its labels through logits, loss and gradients, which stay in registers.
//
// Which labels are positives is a word per label, with a bit for each example of the tile, in shared memory. All
// positives of a tile are looked through for each block of labels: they are few next to the connections of one.

#include <cmath>

#include "device.cuh"
#include "launch.cuh"
#include "layout.h"

namespace xla_ops::cuda {
namespace {

struct Positives {
  const int32_t* labels;  // [B, width]
  int64_t width;
};

// bits[label] gets bit b for each example b of the tile that has the label. To be called by all threads of a block.
__device__ inline void mark_positives(const Positives& positives, const Examples& examples, const LabelBlock& labels,
                                      uint32_t* bits) {
  __syncthreads();  // the last tile's may still be in use
  for (int i = threadIdx.x; i < kLabels; i += blockDim.x) bits[i] = 0;
  __syncthreads();
  for (int b = threadIdx.x / kWarp; b < examples.size; b += blockDim.x / kWarp) {
    const int32_t* row = positives.labels + (examples.first + b) * positives.width;
    for (int64_t i = threadIdx.x % kWarp; i < positives.width; i += kWarp) {
      const int64_t label = row[i] - labels.first;
      if (label >= 0 && label < labels.size) atomicOr(bits + label, 1u << b);
    }
  }
  __syncthreads();
}

struct Term {
  float value, slope;
};

// The loss as a function of the margin, which is the logit of a positive and minus that of a negative; its slope.
__device__ inline Term term(Loss loss, float margin) {
  if (loss == Loss::kSquaredHinge) {
    const float slack = 1 - margin < 0 ? 0 : 1 - margin;  // NaN stays NaN
    return {slack * slack, -2 * slack};
  }
  return {fmaxf(-margin, 0) + log1pf(expf(-fabsf(margin))), -1 / (1 + expf(margin))};
}

// The sum of `value` over the block's threads, in the same order whenever it runs, for thread 0.
template <int kThreads>
__device__ double sum_of_block(double value, double (&sums)[kThreads]) {
  sums[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

template <typename T>
struct Gradients {
  float scale;            // of the mean
  float* sums_of_blocks;  // temporary, [blocks of threads, kLabels, F]
  float* d_packed;        // [tiles, D, kTile], added to
  T* d_kernel;            // [L, F]
  T* d_bias;              // [L], or null
};

// totals[block of threads] = the sum of its losses.
template <typename T, bool kGradients>
__global__ void XLA_OPS_GROUP_BOUNDS(T) loss_kernel(const Layer<T> layer, Loss loss, Positives positives,
                                                    double* __restrict__ totals, Gradients<T> out) {
  constexpr int kValues = Group<T>::kValues, kThreads = Group<T>::kThreads;
  union Shared {
    Connection staged[kStaged];
    double sums[kThreads];
  };
  __shared__ Shared shared;
  __shared__ uint32_t positive_bits[kLabels];
  const int label = my_label<T>(), lane = my_lane<T>();
  double total = 0;

  for_each_item(layer.blocks(), [&](int64_t block) {
    const LabelBlock labels(layer, block);
    float* const sums = out.sums_of_blocks + int64_t{blockIdx.x} * kLabels * layer.shape.fan_in;
    bool any = false;
    float d_bias = 0;
    for (int64_t tile = 0; tile < layer.tiles(); ++tile) {
      const Examples examples(layer.shape.batch, tile);
      mark_positives(positives, examples, labels, positive_bits);
      float s[kValues];  // logits, and then their gradients
      logits<false>(layer, layer.tile(tile), labels, shared.staged, s);
      const uint32_t bits = positive_bits[label] >> (lane * kValues);
      float value = 0;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const bool inside = label < labels.size && lane * kValues + v < examples.size;
        const float sign = (bits >> v) & 1 ? 1 : -1;
        const Term t = inside ? term(loss, sign * s[v]) : Term{0, 0};
        value += t.value;
        s[v] = inside ? sign * t.slope * out.scale : 0;
        d_bias += s[v];
      }
      total += value;
      if constexpr (kGradients) {
        any |= add_gradients(layer, layer.tile(tile), labels, s, any, shared.staged, sums,
                             out.d_packed + tile * layer.shape.in_features * kTile);
      }
    }
    if constexpr (kGradients) {
      write_kernel_gradients(layer, labels, any, sums, out.d_kernel);
      if (out.d_bias) write_bias_gradients(labels, d_bias, out.d_bias);
    }
  });
  __syncthreads();  // the sums go where connections may be in use
  total = sum_of_block(total, shared.sums);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

constexpr int kMeanThreads = 256;

__global__ void __launch_bounds__(kMeanThreads)
    mean_kernel(const double* __restrict__ totals, int64_t count, double divisor, float* __restrict__ mean) {
  __shared__ double sums[kMeanThreads];
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kMeanThreads) total += totals[i];
  total = sum_of_block(total, sums);
  if (threadIdx.x == 0) *mean = static_cast<float>(total / divisor);
}

// Without gradients, d_x is null.
template <bool kGradients, typename T>
cudaError_t run(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss, const T* x, const T* kernel,
                Indices indices, const T* bias, const Positives& positives, float* value, T* d_x, T* d_kernel,
                T* d_bias) {
  T* const packed = workspace.take<T>(packed_count(s));
  const Layer<T> layer{s, packed, kernel, indices, bias};
  double* const totals = workspace.take<double>(most_sharers(layer));
  const float scale = 1 / (static_cast<float>(s.batch) * static_cast<float>(s.labels));
  Gradients<T> gradients{scale, nullptr, nullptr, d_kernel, d_bias};
  if constexpr (kGradients) {
    gradients.sums_of_blocks = workspace.take<float>(most_sharers(layer) * kLabels * s.fan_in);
    gradients.d_packed = workspace.take<float>(sums_count(s));
  }
  if (!workspace.enough()) return cudaErrorMemoryAllocation;

  XLA_OPS_RETURN_IF_CUDA_ERROR(pack(stream, s, x, packed));
  XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, totals, most_sharers(layer)));
  if constexpr (kGradients) XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, gradients.d_packed, sums_count(s)));
  XLA_OPS_RETURN_IF_CUDA_ERROR(launch(loss_kernel<T, kGradients>, most_sharers(layer), Group<T>::kThreads, 0, stream,
                                      layer, loss, positives, totals, gradients));
  const double divisor = static_cast<double>(s.batch) * static_cast<double>(s.labels);
  XLA_OPS_RETURN_IF_CUDA_ERROR(
      launch(mean_kernel, 1, kMeanThreads, 0, stream, totals, most_sharers(layer), divisor, value));
  if constexpr (kGradients) return unpack_sums(stream, s, gradients.d_packed, d_x);
  return cudaSuccess;
}

}  // namespace

template <typename T>
cudaError_t fan_in_loss_value(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss, const T* x,
                              const T* kernel, Indices indices, const T* bias, const int32_t* positives, int64_t width,
                              float* value) {
  return run<false, T>(stream, workspace, s, loss, x, kernel, indices, bias, {positives, width}, value, nullptr,
                       nullptr, nullptr);
}

template <typename T>
cudaError_t fan_in_loss_gradients(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss, const T* x,
                                  const T* kernel, Indices indices, const T* bias, const int32_t* positives,
                                  int64_t width, float* value, T* d_x, T* d_kernel, T* d_bias) {
  return run<true, T>(stream, workspace, s, loss, x, kernel, indices, bias, {positives, width}, value, d_x, d_kernel,
                      d_bias);
}

#define XLA_OPS_INSTANTIATE(T)                                                                                     \
  template cudaError_t fan_in_loss_value<T>(cudaStream_t, Workspace&, const Shape&, Loss, const T*, const T*,      \
                                            Indices, const T*, const int32_t*, int64_t, float*);                   \
  template cudaError_t fan_in_loss_gradients<T>(cudaStream_t, Workspace&, const Shape&, Loss, const T*, const T*,  \
                                                Indices, const T*, const int32_t*, int64_t, float*, T*, T*, T*);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
