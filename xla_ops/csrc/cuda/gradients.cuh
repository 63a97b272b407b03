// The backward products of a fixed fan-in layer: gradients of the kernel, the bias and the input.

#ifndef XLA_OPS_CSRC_CUDA_GRADIENTS_CUH_
#define XLA_OPS_CSRC_CUDA_GRADIENTS_CUH_

#include <cstdint>

#include "launch.cuh"
#include "layer.cuh"
#include "logits.cuh"
#include "staging.cuh"
#include "values.cuh"

namespace xla_ops::cuda {

// The sum of values[i] over the lanes of a group, for i = lane % kCount. Each step halves what a lane holds,
// so that this takes hardly more shuffles than there are sums. To be called by all threads of a warp.
template <int kLanes, int kCount>
__device__ float sum_to_own_lane(float (&values)[kCount], int lane) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, half);
    }
  }
#pragma unroll
  for (int other = kCount; other < kLanes; other *= 2)
    values[0] += __shfl_xor_sync(kAllLanes, values[0], other);
  return values[0];
}

// Sums of d_x for a tile are [D, kTile] like its features, but within a row they are in the order in which a
// warp adds to them: what one instruction adds for a label is contiguous, so that it touches whole sectors of
// 32 bytes. From compute capability 9.0 on that is 16 bytes of each lane, before it is one value of each. To
// be used by device code only, where the two are told apart.
#ifndef XLA_OPS_VECTOR_ATOMICS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define XLA_OPS_VECTOR_ATOMICS 1
#else
#define XLA_OPS_VECTOR_ATOMICS 0
#endif
#endif

// Where in a row the sum for an example is.
template <typename T>
__device__ int sum_position(int example) {
  const int lane = example / Group<T>::kValues, value = example % Group<T>::kValues;
  constexpr int kAdded = XLA_OPS_VECTOR_ATOMICS ? 4 : 1;  // values of a lane at once
  return (value / kAdded * Group<T>::kLanes + lane) * kAdded + value % kAdded;
}

// row[b] += weight * dy[b], for those of this lane's examples b whose quad has a gradient.
template <typename T>
__device__ void add_to_sums(float* row, int lane, float weight, const float (&dy)[Group<T>::kValues],
                            const bool (&nonzero)[Group<T>::kQuads]) {
#pragma unroll
  for (int q = 0; q < Group<T>::kQuads; ++q) {
    if (!nonzero[q]) continue;
    const float* d = dy + 4 * q;
#if XLA_OPS_VECTOR_ATOMICS
    atomicAdd(reinterpret_cast<float4*>(row) + q * Group<T>::kLanes + lane,
              make_float4(weight * d[0], weight * d[1], weight * d[2], weight * d[3]));
#else
#pragma unroll
    for (int v = 0; v < 4; ++v) atomicAdd(row + (4 * q + v) * Group<T>::kLanes + lane, weight * d[v]);
#endif
  }
}

// Adds one tile's part of the gradients, given dy, those of this thread's label for its examples (0 where
// there is no such label or example):
//   sums[label, f] (+)= sum_b dy[b] * x[b, index], for the labels of the block: added to only if `add`.
//   sums_of_d_x[index, b] += kernel[label, f] * dy[b], atomically, unless it is null.
// Returns false, and does nothing, if all gradients of the block are 0. A lane whose gradients are all 0
// costs no part of a row of features, or of d_x. `already_staged` says that all of the label's connections
// are staged already. To be called by all threads of a block.
template <typename T, bool kSparse>
__device__ bool add_gradients(const Layer<T, kSparse>& layer, const Features<T, kSparse>& features,
                              const LabelBlock& labels, const float (&dy)[Group<T>::kValues], bool add,
                              Staged<kSparse>& staged, bool already_staged, float* sums, float* sums_of_d_x) {
  constexpr int kLanes = Group<T>::kLanes, kValues = Group<T>::kValues;
  constexpr int kRows = kSparse ? kAtOnce / 2 : kAtOnce;  // more would spill where there are sparse inputs
  const int label = my_label<T>(), lane = my_lane<T>();
  bool nonzero[Group<T>::kQuads], lane_nonzero = false;
#pragma unroll
  for (int q = 0; q < Group<T>::kQuads; ++q) {
    nonzero[q] = dy[4 * q] != 0 || dy[4 * q + 1] != 0 || dy[4 * q + 2] != 0 || dy[4 * q + 3] != 0;
    lane_nonzero |= nonzero[q];
  }
  const bool warp_nonzero = __ballot_sync(kAllLanes, lane_nonzero) != 0;
  if (!__syncthreads_or(warp_nonzero)) return false;

  if constexpr (kSparse) {  // connections that are left out write no sums
    if (!add) {
#pragma unroll 1
      for (int64_t i = threadIdx.x; i < labels.size * layer.shape.fan_in; i += Group<T>::kThreads)
        sums[i] = 0;
      add = true;
      __syncthreads();
    }
  }
  float* const sums_of_label = sums + label * layer.shape.fan_in;
  for (int f = 0; f < layer.shape.fan_in; f += kConnections) {
    if (!already_staged) stage(layer, features, labels, f, staged);
    if (add && !warp_nonzero) continue;
    const Connection* mine = staged.connections + label * kStagedStride;
    const int count = staged_connections(layer, f, staged, label);
    int most = count;  // of the labels of the warp, whose lanes add up together
    if constexpr (kSparse) {
#pragma unroll
      for (int other = kLanes; other < kWarp; other *= 2)
        most = max(most, __shfl_xor_sync(kAllLanes, most, other));
    }
#pragma unroll 1
    for (int c = 0; c < most; c += kRows) {
      float products[kRows] = {};
      if (lane_nonzero && (!kSparse || c < count)) {
        uint4 rows[kRows];
        load_rows<false>(features.rows, mine + c, lane, rows);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float x[kValues];
          unpack(rows[i], x);
          const Connection connection = mine[c + i];
#pragma unroll
          for (int v = 0; v < kValues; ++v) products[i] = fmaf(dy[v], x[v], products[i]);
          if (sums_of_d_x && connection.row < layer.shape.in_features) {
            add_to_sums<T>(sums_of_d_x + static_cast<int64_t>(connection.row) * kTile, lane,
                           connection.weight, dy, nonzero);
          }
        }
      }
      const float sum = sum_to_own_lane<kLanes>(products, lane);
      if (label < labels.size && lane < kRows && c + lane < count) {
        float& total = sums_of_label[f + number_of(staged, label, c + lane)];
        total = add ? total + sum : sum;
      }
    }
  }
  return true;
}

// Where a block of threads sums the gradient of the kernel, of its labels [label, f].
struct SharedSums {
  alignas(16) float values[kLabels * kConnections];
};
template <typename T>
__device__ float* sums_of(const Layer<T>& layer, SharedSums& shared, float* of_blocks) {
  return all_staged(layer) ? shared.values : of_blocks + int64_t{blockIdx.x} * kLabels * layer.shape.fan_in;
}

// Calls sink.kernel(number of the first, their gradients) for four of the kernel's weights of a block of
// labels, or sink.kernel(number of the weight, its gradient) for each of the last ones. The gradients are
// `sums`, or 0 if there are none. To be called by all threads of a block.
template <typename T, typename Sink>
__device__ void take_kernel_gradients(const Layer<T>& layer, const LabelBlock& labels, bool any,
                                      const float* sums, const Sink& sink) {
  __syncthreads();  // sums were written by other threads
  const int64_t count = labels.size * layer.shape.fan_in;
#pragma unroll 1
  for (int64_t i = 4 * int64_t{threadIdx.x}; i < count; i += 4 * int64_t{Group<T>::kThreads}) {
    const float4 d = any ? *reinterpret_cast<const float4*>(sums + i) : make_float4(0, 0, 0, 0);
    const int64_t first = labels.first * layer.shape.fan_in;
    if (i + 4 <= count) {
      sink.kernel(first + i, d);
    } else {  // fewer than 64 labels
      sink.kernel(first + i, d.x);
      if (i + 1 < count) sink.kernel(first + i + 1, d.y);
      if (i + 2 < count) sink.kernel(first + i + 2, d.z);
    }
  }
  __syncthreads();  // before they are written again
}

// A sink that writes the kernel's gradient [L, F].
template <typename T>
struct WriteKernel {
  T* d_kernel;

  __device__ void kernel(int64_t i, float d) const { set(d_kernel + i, d); }
  __device__ void kernel(int64_t i, const float4& d) const { set4(d_kernel + i, d); }
};

// Calls take(label, gradient of its bias), which is the sum of `sum` over the lanes of the label's group. To
// be called by all threads of a block.
template <typename T, typename Fn>
__device__ void for_each_bias_gradient(const LabelBlock& labels, float sum, Fn&& take) {
#pragma unroll
  for (int other = 1; other < Group<T>::kLanes; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
  if (my_lane<T>() == 0 && my_label<T>() < labels.size) take(labels.first + my_label<T>(), sum);
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_GRADIENTS_CUH_
