// Staging: connections of a block of labels are brought into shared memory, where all threads of the block
// use them.

#ifndef XLA_OPS_CSRC_CUDA_STAGING_CUH_
#define XLA_OPS_CSRC_CUDA_STAGING_CUH_

#include <cstdint>

#include "launch.cuh"
#include "layer.cuh"
#include "values.cuh"

namespace xla_ops::cuda {

struct Connection {
  int32_t row;
  float weight;
};

// One more than fits, so that the labels of a warp, which are read together, are in different banks.
constexpr int kStagedStride = kConnections + 1;
constexpr int kStaged = kLabels * kStagedStride;

template <bool kSparse>
struct Staged {
  Connection connections[kStaged];
};
template <>
struct Staged<true> {
  Connection connections[kStaged];
  uint8_t numbers[kStaged];  // the number of each connection of a label before it was moved
  int32_t counts[kLabels];   // the connections of a label that are not to the zero row, which come first
};

template <typename T>
__device__ int32_t load_index(const Layer<T>& layer, int64_t at) {
  return layer.indices.is_uint16 ? __ldcs(static_cast<const uint16_t*>(layer.indices.data) + at)
                                 : __ldcs(static_cast<const int32_t*>(layer.indices.data) + at);
}

// The packed row of an input, dense or sparse: the zero row if the tile does not have it.
template <typename T>
__device__ int32_t packed_row(const Layer<T, true>& layer, const Word* words, int32_t first, int32_t index) {
  // Inputs are fewer than 2^31: what is negative, or dense, is above the columns.
  const uint32_t dense = static_cast<uint32_t>(layer.shape.in_features), input = static_cast<uint32_t>(index);
  const uint32_t column = input - dense;
  const Word word =
      column < static_cast<uint32_t>(layer.map.num_columns) ? load_word(words, column) : Word{0, 0};
  return word.has(column) ? first + word.row(column) : static_cast<int32_t>(input < dense ? input : dense);
}

// Brings the block's connections from number `f` on into shared memory, and fills the places after the last
// connection or the last label with connections to the zero row. To be called by all threads of a block.
template <typename T>
__device__ void stage(const Layer<T>& layer, const Features<T, false>&, const LabelBlock& labels, int f,
                      Staged<false>& staged) {
  constexpr int kRows = Group<T>::kThreads / kConnections, kStagedAtOnce = 4;
  const int column = threadIdx.x % kConnections;
  __syncthreads();  // what is in there may still be in use
#pragma unroll 1    // more at once do not fit in the registers
  for (int first = threadIdx.x / kConnections; first < kLabels; first += kStagedAtOnce * kRows) {
    int32_t indices[kStagedAtOnce];
    float weights[kStagedAtOnce];
#pragma unroll
    for (int i = 0; i < kStagedAtOnce; ++i) {  // all are asked for before the first is used
      const int label = first + i * kRows;
      const bool inside = label < labels.size && f + column < layer.shape.fan_in;
      const int64_t at = (labels.first + label) * layer.shape.fan_in + f + column;
      indices[i] = inside ? load_index(layer, at) : -1;
      weights[i] = inside ? load_once(layer.kernel + at) : 0;
    }
#pragma unroll
    for (int i = 0; i < kStagedAtOnce; ++i) {
      const bool inside = indices[i] >= 0 && indices[i] < layer.shape.in_features;
      const int32_t row = inside ? indices[i] : static_cast<int32_t>(layer.shape.in_features);
      staged.connections[(first + i * kRows) * kStagedStride + column] = {row, weights[i]};
    }
  }
  __syncthreads();
}

// The same with sparse inputs: a warp has the connections of a label, of which it moves those to the zero row
// behind the others.
template <typename T>
__device__ void stage(const Layer<T, true>& layer, const Features<T, true>& features,
                      const LabelBlock& labels, int f, Staged<true>& staged) {
  static_assert(kConnections == kWarp, "a lane has one connection");
  constexpr int kWarps = Group<T>::kThreads / kWarp, kStagedAtOnce = 2;
  const int lane = threadIdx.x % kWarp;
  const Word* const words = layer.map.tile(features.tile);
  const int32_t first_sparse = layer.first_sparse_row(features.tile);
  __syncthreads();  // what is in there may still be in use
#pragma unroll 1    // more at once do not fit in the registers
  for (int first = threadIdx.x / kWarp; first < kLabels; first += kStagedAtOnce * kWarps) {
    int32_t rows[kStagedAtOnce];
    float weights[kStagedAtOnce];
#pragma unroll
    for (int i = 0; i < kStagedAtOnce; ++i) {  // all are asked for before the first is used
      const int label = first + i * kWarps;
      const bool inside = label < labels.size && f + lane < layer.shape.fan_in;
      const int64_t at = (labels.first + label) * layer.shape.fan_in + f + lane;
      rows[i] = inside ? load_index(layer, at) : -1;
      weights[i] = inside ? load_once(layer.kernel + at) : 0;
    }
#pragma unroll
    for (int i = 0; i < kStagedAtOnce; ++i) rows[i] = packed_row(layer, words, first_sparse, rows[i]);
#pragma unroll
    for (int i = 0; i < kStagedAtOnce; ++i) {
      const int label = first + i * kWarps;
      const bool reads = rows[i] != static_cast<int32_t>(layer.shape.in_features);
      const unsigned reading = __ballot_sync(kAllLanes, reads), below = (1u << lane) - 1;
      const int position = reads ? __popc(reading & below) : __popc(reading) + __popc(~reading & below);
      staged.connections[label * kStagedStride + position] = {rows[i], reads ? weights[i] : 0};
      staged.numbers[label * kStagedStride + position] = static_cast<uint8_t>(lane);
      if (lane == 0) staged.counts[label] = __popc(reading);
    }
  }
  __syncthreads();
}

// Whether all connections of a label are staged at once.
template <typename T>
__device__ bool all_staged(const Layer<T>& layer) {
  return layer.shape.fan_in <= kConnections;
}

// The number of staged connections that a label has from number `f` on.
template <typename T>
__device__ int staged_connections(const Layer<T>& layer, int f, const Staged<false>&, int) {
  return min(kConnections, static_cast<int>(layer.shape.fan_in) - f);
}
template <typename T>
__device__ int staged_connections(const Layer<T>&, int, const Staged<true>& staged, int label) {
  return staged.counts[label];
}

// Returns the number of a staged connection among those of its label, counted from `f`.
__device__ inline int number_of(const Staged<false>&, int, int c) { return c; }
__device__ inline int number_of(const Staged<true>& staged, int label, int c) {
  return staged.numbers[label * kStagedStride + c];
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_STAGING_CUH_
