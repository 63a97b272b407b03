// The pass over the labels behind fan_in_loss and fan_in_step: a block of threads takes its labels through
// logits, loss and gradients, which stay in registers, and hands those of kernel and bias to a sink.
//
// The positives of a block are in shared memory: a word per label, with a bit for each example of the tile.
// All positives of a tile are read for each block of labels: they are few in comparison with the connections
// of a block.

#ifndef XLA_OPS_CSRC_CUDA_FAN_IN_LOSS_CUH_
#define XLA_OPS_CSRC_CUDA_FAN_IN_LOSS_CUH_

#include <cmath>
#include <type_traits>

#include "gradients.cuh"
#include "launch.cuh"
#include "layer.cuh"
#include "layout.h"
#include "logits.cuh"

namespace xla_ops::cuda {

struct Positives {
  const int32_t* labels;  // [B, width]
  int64_t width;
};

// bits[label] gets bit b for each example b of the tile that has the label. To be called by all threads of a
// block.
__device__ inline void mark_positives(const Positives& positives, const Examples& examples,
                                      const LabelBlock& labels, uint32_t* bits) {
  __syncthreads();  // the last tile's may still be in use
  for (int i = threadIdx.x; i < kLabels; i += blockDim.x) bits[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int b = threadIdx.x / kWarp; b < examples.size; b += blockDim.x / kWarp) {
    const int32_t* row = positives.labels + (examples.first + b) * positives.width;
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < positives.width; i += kWarp) {
      const int64_t label = row[i] - labels.first;
      if (label >= 0 && label < labels.size) atomicOr(bits + label, 1u << b);
    }
  }
  __syncthreads();
}

struct Term {
  float value, slope;
};

// Returns the loss and its derivative by the margin, which is the logit of a positive, or minus the logit of
// a negative.
__device__ inline Term term(Loss loss, float margin) {
  if (loss == Loss::kSquaredHinge) {
    const float slack = 1 - margin < 0 ? 0 : 1 - margin;  // NaN stays NaN
    return {slack * slack, -2 * slack};
  }
  return {fmaxf(-margin, 0) + log1pf(expf(-fabsf(margin))), -1 / (1 + expf(margin))};
}

// The parameters of the backward part of the pass. A sink takes the gradients of kernel and bias: it has
// kernel(number of the weight, gradient), the same for four weights at once, bias(label, gradient), and
// has_bias().
template <typename Sink>
struct Backward {
  float scale;            // of the mean
  float* sums_of_blocks;  // temporary, [blocks of threads, kLabels, F]
  float* d_packed;        // [tiles, D, kTile], added to, or null
  Sink sink;
};
struct NoGradients {};

// totals[block of threads] = the sum of its losses.
template <typename T, bool kSparse, typename Sink>
__global__ void XLA_OPS_GROUP_BOUNDS(T)
    loss_kernel(const Layer<T, kSparse> layer, Loss loss, Positives positives, double* __restrict__ totals,
                const Backward<Sink> out) {
  constexpr bool kGradients = !std::is_same_v<Sink, NoGradients>;
  constexpr int kValues = Group<T>::kValues, kThreads = Group<T>::kThreads;
  __shared__ Staged<kSparse> staged;
  __shared__ uint32_t positive_bits[kLabels];
  // The loss of each warp, in shared memory: held in a register for the whole pass, it would cause spills.
  __shared__ double losses[kThreads / kWarp];
  __shared__ std::conditional_t<kGradients, SharedSums, char> shared_sums;
  const int label = my_label<T>(), lane = my_lane<T>();
  const bool first_of_warp = threadIdx.x % kWarp == 0;
  if (first_of_warp) losses[threadIdx.x / kWarp] = 0;

  for_each_item(layer.blocks(), [&](int64_t block) {
    const LabelBlock labels(layer, block);
    bool any = false;
    float d_bias = 0;
    for (int64_t tile = 0; tile < layer.tiles(); ++tile) {
      const Examples examples(layer.shape.batch, tile);
      mark_positives(positives, examples, labels, positive_bits);
      float s[kValues];  // logits, and then their gradients
      logits<false>(layer, layer.tile(tile), labels, staged, !kSparse && tile > 0 && all_staged(layer), s);
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
#pragma unroll
      for (int other = kWarp / 2; other > 0; other /= 2) value += __shfl_xor_sync(kAllLanes, value, other);
      if (first_of_warp) losses[threadIdx.x / kWarp] += value;
      if constexpr (kGradients) {
        float* const d_packed =
            out.d_packed ? out.d_packed + tile * layer.shape.in_features * kTile : nullptr;
        any |= add_gradients(layer, layer.tile(tile), labels, s, any, staged, all_staged(layer),
                             sums_of(layer, shared_sums, out.sums_of_blocks), d_packed);
      }
    }
    if constexpr (kGradients) {
      const Sink& sink = out.sink;
      take_kernel_gradients(layer, labels, any, sums_of(layer, shared_sums, out.sums_of_blocks), sink);
      if (sink.has_bias())
        for_each_bias_gradient<T>(labels, d_bias, [&](int64_t i, float d) { sink.bias(i, d); });
    }
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (const double loss_of_warp : losses) total += loss_of_warp;
    totals[blockIdx.x] = total;
  }
}

// *mean = the sum of totals / divisor.
cudaError_t write_mean(cudaStream_t stream, const double* totals, int64_t count, double divisor, float* mean);

// The whole pass: the loss and, unless the sink is NoGradients, or d_x null, d_x.
template <typename T, typename Sink>
cudaError_t run_loss(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                     const Inputs<T>& inputs, const T* kernel, Indices indices, const T* bias,
                     const Positives& positives, const Sink& sink, float* value, T* d_x) {
  constexpr bool kGradients = !std::is_same_v<Sink, NoGradients>;
  const Packed<T> packed = take_packed(workspace, s, inputs);
  const Layer<T> plain{s, packed.rows, kernel, indices, bias};
  double* const totals = workspace.take<double>(max_blocks(plain));
  const float scale = 1 / (static_cast<float>(s.batch) * static_cast<float>(s.mean_labels));
  Backward<Sink> out{scale, nullptr, nullptr, sink};
  if constexpr (kGradients) {
    out.sums_of_blocks = workspace.take<float>(max_blocks(plain) * kLabels * s.fan_in);
    out.d_packed = workspace.take<float>(sums_count(s));
    if (!d_x) out.d_packed = nullptr;
  }
  if (!workspace.enough()) return cudaErrorMemoryAllocation;

  XLA_OPS_RETURN_IF_CUDA_ERROR(pack(stream, s, inputs, packed));
  XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, totals, max_blocks(plain)));
  if (out.d_packed) XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, out.d_packed, sums_count(s)));
  XLA_OPS_RETURN_IF_CUDA_ERROR(dispatch(plain, packed.map, [&](const auto& layer) {
    return launch(loss_kernel<T, std::decay_t<decltype(layer)>::kHasSparse, Sink>, max_blocks(plain),
                  Group<T>::kThreads, 0, stream, layer, loss, positives, totals, out);
  }));
  const double divisor = static_cast<double>(s.batch) * static_cast<double>(s.mean_labels);
  XLA_OPS_RETURN_IF_CUDA_ERROR(write_mean(stream, totals, max_blocks(plain), divisor, value));
  return out.d_packed ? unpack_sums(stream, s, out.d_packed, d_x) : cudaSuccess;
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_FAN_IN_LOSS_CUH_
