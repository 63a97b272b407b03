// fan_in_matmul and its gradients: y[b, l] = bias[l] + sum_f kernel[l, f] * x[b, indices[l, f]].
//
// The forward pass has two regimes. Where a tile's features fit in shared memory each block keeps a copy
// there, for all of its blocks of labels; else rows come out of the second-level cache, which a tile of 131k
// float32 features (17 MB) still fits in. The gradients leave a small tile to the first-level cache, and so
// does the forward pass where there are sparse inputs, whose rows would not be among those in shared memory.
//
// Rows of d_x are summed by atomic additions, the only sums whose order may differ from run to run. The other
// way is to gather rows of dy by input, along connections sorted by input: those have to be sorted again
// after each rewiring, dy (L rows) does not fit in the cache as d_x (D rows) does, and labels without a
// gradient cost as much as others, while here they cost nothing. Which one is faster has not been measured.

#include <type_traits>

#include "fan_in_matmul.cuh"
#include "gradients.cuh"
#include "launch.cuh"
#include "layer.cuh"
#include "layout.h"
#include "logits.cuh"

namespace xla_ops::cuda {
namespace {

// [kTile, kLabels] values on their way to or from a matrix whose rows are examples. One column more than
// fits, so that threads do not meet in the same bank when they go along an example or a label.
using LabelTile = float[kTile][kLabels + 1];

template <bool kInShared, typename T, bool kSparse, typename Out>
__global__ void XLA_OPS_GROUP_BOUNDS(T)
    forward_kernel(const Layer<T, kSparse> layer, Out* __restrict__ y, int64_t y_stride) {
  union Shared {
    Staged<kSparse> staged;
    LabelTile logits;
  };
  __shared__ Shared shared;
  T* const copy = reinterpret_cast<T*>(dynamic_shared());
  int64_t copied = -1;  // the tile that is in `copy`

  for_each_item(layer.tiles() * layer.blocks(), [&](int64_t item) {
    const int64_t tile = item / layer.blocks();
    const LabelBlock labels(layer, item % layer.blocks());
    const Examples examples(layer.shape.batch, tile);
    Features<T, kSparse> features = layer.tile(tile);
    if constexpr (kInShared) {
      if (tile != copied) {
        __syncthreads();  // the last tile may still be in use; `logits` waits for this one
        const int64_t vectors = (layer.shape.in_features + 1) * Group<T>::kLanes;
        for (int64_t i = threadIdx.x; i < vectors; i += Group<T>::kThreads) {
          reinterpret_cast<uint4*>(copy)[i] = __ldg(reinterpret_cast<const uint4*>(features.rows) + i);
        }
        copied = tile;
      }
      features.rows = copy;
    }
    float sum[Group<T>::kValues];
    logits<kInShared>(layer, features, labels, shared.staged, false, sum);
    __syncthreads();  // all are done with the connections, in whose place the logits go
#pragma unroll
    for (int v = 0; v < Group<T>::kValues; ++v) {
      shared.logits[my_lane<T>() * Group<T>::kValues + v][my_label<T>()] = sum[v];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < examples.size * kLabels; i += Group<T>::kThreads) {
      const int example = i / kLabels, label = i % kLabels;
      if (label < labels.size) {
        set(y + (examples.first + example) * y_stride + labels.first + label, shared.logits[example][label]);
      }
    }
  });
}

template <typename T, bool kSparse>
__global__ void XLA_OPS_GROUP_BOUNDS(T)
    gradients_kernel(const Layer<T, kSparse> layer, const T* __restrict__ dy,
                     float* __restrict__ sums_of_blocks, float* d_packed, T* __restrict__ d_kernel,
                     T* __restrict__ d_bias) {
  union Shared {
    Staged<kSparse> staged;
    LabelTile dy;
  };
  __shared__ Shared shared;
  __shared__ SharedSums shared_sums;
  float* const sums = sums_of(layer, shared_sums, sums_of_blocks);

  for_each_item(layer.blocks(), [&](int64_t block) {
    const LabelBlock labels(layer, block);
    bool any = false;
    float bias_sum = 0;
    for (int64_t tile = 0; tile < layer.tiles(); ++tile) {
      const Examples examples(layer.shape.batch, tile);
      __syncthreads();  // the last tile's connections are in use until here
      for (int i = threadIdx.x; i < kTile * kLabels; i += Group<T>::kThreads) {
        const int example = i / kLabels, label = i % kLabels;
        const bool inside = example < examples.size && label < labels.size;
        const int64_t at = (examples.first + example) * layer.shape.labels + labels.first + label;
        shared.dy[example][label] = inside ? load_once(dy + at) : 0;
      }
      __syncthreads();
      float mine[Group<T>::kValues];
#pragma unroll
      for (int v = 0; v < Group<T>::kValues; ++v) {
        mine[v] = shared.dy[my_lane<T>() * Group<T>::kValues + v][my_label<T>()];
        bias_sum += mine[v];
      }
      any |= add_gradients(layer, layer.tile(tile), labels, mine, any, shared.staged, false, sums,
                           d_packed ? d_packed + tile * layer.shape.in_features * kTile : nullptr);
    }
    take_kernel_gradients(layer, labels, any, sums, WriteKernel<T>{d_kernel});
    if (d_bias) for_each_bias_gradient<T>(labels, bias_sum, [&](int64_t i, float d) { set(d_bias + i, d); });
  });
}

}  // namespace

template <typename T, typename Out>
cudaError_t write_logits(cudaStream_t stream, const Layer<T>& layer, const SparseMap& map, Out* y,
                         int64_t y_stride) {
  const int64_t items = layer.tiles() * layer.blocks();
  if (map.num_columns > 0) {
    return launch(forward_kernel<false, T, true, Out>, items, Group<T>::kThreads, 0, stream,
                  Layer<T, true>{layer, map}, y, y_stride);
  }
  int device, shared_bytes;
  XLA_OPS_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  XLA_OPS_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  cudaFuncAttributes attributes;
  XLA_OPS_RETURN_IF_CUDA_ERROR(cudaFuncGetAttributes(&attributes, forward_kernel<true, T, false, Out>));
  const int64_t tile_bytes = (layer.shape.in_features + 1) * kTile * sizeof(T);
  if (tile_bytes + static_cast<int64_t>(attributes.sharedSizeBytes) <= shared_bytes) {
    return launch(forward_kernel<true, T, false, Out>, items, Group<T>::kThreads, tile_bytes, stream, layer,
                  y, y_stride);
  }
  return launch(forward_kernel<false, T, false, Out>, items, Group<T>::kThreads, 0, stream, layer, y,
                y_stride);
}

template <typename T>
cudaError_t fan_in_matmul_forward(cudaStream_t stream, Workspace& workspace, const Shape& s,
                                  const Inputs<T>& inputs, const T* kernel, Indices indices, const T* bias,
                                  T* y) {
  const Packed<T> packed = take_packed(workspace, s, inputs);
  if (!workspace.enough()) return cudaErrorMemoryAllocation;
  XLA_OPS_RETURN_IF_CUDA_ERROR(pack(stream, s, inputs, packed));
  return write_logits(stream, Layer<T>{s, packed.rows, kernel, indices, bias}, packed.map, y, s.labels);
}

template <typename T>
cudaError_t fan_in_matmul_gradients(cudaStream_t stream, Workspace& workspace, const Shape& s,
                                    const Inputs<T>& inputs, const T* kernel, Indices indices, const T* dy,
                                    T* d_x, T* d_kernel, T* d_bias) {
  const Packed<T> packed = take_packed(workspace, s, inputs);
  const Layer<T> plain{s, packed.rows, kernel, indices, nullptr};
  float* d_packed = workspace.take<float>(sums_count(s));
  if (!d_x) d_packed = nullptr;
  float* const sums = workspace.take<float>(max_blocks(plain) * kLabels * s.fan_in);
  if (!workspace.enough()) return cudaErrorMemoryAllocation;
  XLA_OPS_RETURN_IF_CUDA_ERROR(pack(stream, s, inputs, packed));
  if (d_packed) XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, d_packed, sums_count(s)));
  XLA_OPS_RETURN_IF_CUDA_ERROR(dispatch(plain, packed.map, [&](const auto& layer) {
    return launch(gradients_kernel<T, std::decay_t<decltype(layer)>::kHasSparse>, max_blocks(plain),
                  Group<T>::kThreads, 0, stream, layer, dy, sums, d_packed, d_kernel, d_bias);
  }));
  return d_packed ? unpack_sums(stream, s, d_packed, d_x) : cudaSuccess;
}

#define XLA_OPS_INSTANTIATE(T)                                                                              \
  template cudaError_t fan_in_matmul_forward<T>(cudaStream_t, Workspace&, const Shape&, const Inputs<T>&,   \
                                                const T*, Indices, const T*, T*);                           \
  template cudaError_t fan_in_matmul_gradients<T>(cudaStream_t, Workspace&, const Shape&, const Inputs<T>&, \
                                                  const T*, Indices, const T*, T*, T*, T*);                 \
  template cudaError_t write_logits<T, float>(cudaStream_t, const Layer<T>&, const SparseMap&, float*,      \
                                              int64_t);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
