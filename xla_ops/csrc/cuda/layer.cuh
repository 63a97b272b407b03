// A fixed fan-in layer on a device: how batch, labels and threads are split.
//
// The batch is cut into tiles of 32 examples and the labels into blocks of 64. Features are packed tile by
// tile as [D + 1, 32], so that a connection reads one contiguous *row* of the batch (128 bytes of float32, 64
// of bfloat16); the last row is zero, and every index outside [0, D) is redirected to it. The rows of the
// sparse inputs of each tile come after all tiles; a bitmap of the sparse inputs per tile gives their
// positions (Packed in layout.h).
//
// A block of threads has one group of lanes for each of its labels. A lane holds 16 bytes of a row: a group
// is 8 lanes with 4 examples each in float32, 4 lanes with 8 examples each in bfloat16. All threads together
// stage the connections in shared memory, 32 of each label at a time, so that reads are contiguous for any
// fan-in and overlap. Labels with at most 32 connections are staged once per block, and the sums of their
// gradients stay in shared memory too. If there are sparse inputs, connections are staged anew for each tile:
// those to inputs without an entry in the tile are moved after the others of their label, and are skipped.

#ifndef XLA_OPS_CSRC_CUDA_LAYER_CUH_
#define XLA_OPS_CSRC_CUDA_LAYER_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"
#include "layout.h"

namespace xla_ops::cuda {

constexpr int kLabels = 64;
constexpr int kConnections = 32;

template <typename T>
struct Group {
  static constexpr int kValues = 16 / sizeof(T);     // of a row, in a lane
  static constexpr int kLanes = kTile / kValues;     // that share a label
  static constexpr int kThreads = kLabels * kLanes;  // in a block
  static constexpr int kQuads = kValues / 4;         // of a lane's examples, which are added at once
};

// Number of rows that a lane loads before it uses the first: over all threads of a processor, 64 KB of
// outstanding loads.
constexpr int kAtOnce = 4;

// 1,024 threads on a processor leave each 64 registers: enough for kAtOnce rows, without spills.
#define XLA_OPS_GROUP_BOUNDS(T) __launch_bounds__(Group<T>::kThreads, 1024 / Group<T>::kThreads)

// The packed rows of a tile and, if there are sparse inputs, the number of the tile. The tile's part of the
// map is computed from this number: a pointer to it would take one more register.
template <typename T, bool kSparse>
struct Features {
  const T* rows;
};
template <typename T>
struct Features<T, true> {
  const T* rows;
  int64_t tile;
};

template <typename T, bool kSparse = false>
struct Layer {
  Shape shape;
  const T* packed;  // [tiles, D + 1, kTile]
  const T* kernel;
  Indices indices;
  const T* bias;

  static constexpr bool kHasSparse = kSparse;
  __host__ __device__ int64_t tiles() const { return ceil_div(shape.batch, kTile); }
  __host__ __device__ int64_t blocks() const { return ceil_div(shape.labels, kLabels); }
  __device__ Features<T, false> tile(int64_t t) const {
    return {packed + t * (shape.in_features + 1) * kTile};
  }
};

template <typename T>
struct Layer<T, true> : Layer<T> {
  SparseMap map;

  static constexpr bool kHasSparse = true;
  __device__ Features<T, true> tile(int64_t t) const { return {Layer<T>::tile(t).rows, t}; }
  // The row of a tile's first sparse input, counted from the tile's first row.
  __device__ int32_t first_sparse_row(int64_t t) const {
    return static_cast<int32_t>((this->tiles() - t) * (this->shape.in_features + 1)) + __ldg(map.starts + t);
  }
};

// Returns the error that fn(layer) returns; the layer has the type with sparse inputs only if there are any.
template <typename T, typename Fn>
cudaError_t dispatch(const Layer<T>& layer, const SparseMap& map, Fn&& fn) {
  return map.num_columns > 0 ? fn(Layer<T, true>{layer, map}) : fn(layer);
}

// Maximum number of blocks of threads of a kernel with temporaries per block. It is a constant because the
// size of the temporaries must not depend on the device; no device so far runs as many blocks at once.
constexpr int64_t kMaxBlocks = 1024;
template <typename T>
int64_t max_blocks(const Layer<T>& layer) {
  return layer.blocks() < kMaxBlocks ? layer.blocks() : kMaxBlocks;
}

// Labels [first, first + size).
struct LabelBlock {
  template <typename T>
  __device__ LabelBlock(const Layer<T>& layer, int64_t block)
      : first(block * kLabels), size(static_cast<int>(min(int64_t{kLabels}, layer.shape.labels - first))) {}
  int64_t first;
  int size;
};

// Examples [first, first + size) of a tile.
struct Examples {
  __device__ Examples(int64_t batch, int64_t tile)
      : first(tile * kTile), size(static_cast<int>(min(int64_t{kTile}, batch - first))) {}
  int64_t first;
  int size;
};

// This thread's label within a block of them, and its lane of the label's group.
template <typename T>
__device__ int my_label() {
  return threadIdx.x / Group<T>::kLanes;
}
template <typename T>
__device__ int my_lane() {
  return threadIdx.x % Group<T>::kLanes;
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_LAYER_CUH_
