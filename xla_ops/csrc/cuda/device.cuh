// What the kernels share.
//
// The batch is cut into tiles of 32 examples and the labels into blocks of 64. Features are packed tile by tile as
// [D + 1, 32], so that a connection reads one contiguous *row* of the batch (128 bytes of float32, 64 of bfloat16);
// the last row is zero, and every index outside [0, D) is redirected to it.
//
// A block of threads has one group of lanes for each of its labels. A lane holds 16 bytes of a row: a group is 8
// lanes with 4 examples each in float32, 4 lanes with 8 examples each in bfloat16. Connections are brought into
// shared memory, 32 of each label at a time, by all threads together: so indices and weights are read in order
// whatever the fan-in is, and all at once, which hides how far away they are.

#ifndef XLA_OPS_CSRC_CUDA_DEVICE_CUH_
#define XLA_OPS_CSRC_CUDA_DEVICE_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace xla_ops::cuda {

constexpr int kTile = 32;
constexpr int kLabels = 64;
constexpr int kConnections = 32;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
struct Group {
  static constexpr int kValues = 16 / sizeof(T);        // of a row, in a lane
  static constexpr int kLanes = kTile / kValues;        // that share a label
  static constexpr int kThreads = kLabels * kLanes;     // in a block
};

// Rows that a lane asks for before it uses the first: with all threads of a processor that is 64 KB under way.
constexpr int kAtOnce = 4;

// 1,024 threads on a processor leave each 64 registers: enough for kAtOnce rows, without spills.
#define XLA_OPS_GROUP_BOUNDS(T) __launch_bounds__(Group<T>::kThreads, 1024 / Group<T>::kThreads)

// The shared memory that a launch asks for, beside what a kernel declares.
#ifdef __CUDACC__  // the tests' stand-in for CUDA has one of its own
__device__ inline void* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}
#endif

// ---- values ----

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to nearest, ties to even; a NaN keeps its top bits and stays a NaN.
__device__ inline void set(float* p, float x) { *p = x; }
__device__ inline void set(bfloat16* p, float x) {
  const uint32_t bits = __float_as_uint(x);
  p->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ inline void unpack(const uint4& raw, float (&v)[4]) {
  v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
  v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
}
__device__ inline void unpack(const uint4& raw, float (&v)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
  }
}

// Loads of what is read once, and is not to push features out of the cache.
__device__ inline float load_once(const float* p) { return __ldcs(p); }
__device__ inline float load_once(const bfloat16* p) {
  return to_float(bfloat16{__ldcs(reinterpret_cast<const uint16_t*>(p))});
}

// ---- the layer, and a thread's place in it ----

template <typename T>
struct Layer {
  Shape shape;
  const T* packed;  // [tiles, D + 1, kTile]
  const T* kernel;
  Indices indices;
  const T* bias;

  __host__ __device__ int64_t tiles() const { return ceil_div(shape.batch, kTile); }
  __host__ __device__ int64_t blocks() const { return ceil_div(shape.labels, kLabels); }
  __device__ const T* tile(int64_t t) const { return packed + t * (shape.in_features + 1) * kTile; }
};

// How many blocks of threads may share the labels where each has temporaries of its own: the size of those must not
// depend on the device. No device so far runs as many at once.
constexpr int64_t kMostSharers = 1024;
template <typename T>
int64_t most_sharers(const Layer<T>& layer) {
  return layer.blocks() < kMostSharers ? layer.blocks() : kMostSharers;
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
__device__ int my_label() { return threadIdx.x / Group<T>::kLanes; }
template <typename T>
__device__ int my_lane() { return threadIdx.x % Group<T>::kLanes; }

// ---- connections ----

struct Connection {
  int32_t row;
  float weight;
};

// One more than fits, so that the labels of a warp, which are read together, are in different banks.
constexpr int kStagedStride = kConnections + 1;
constexpr int kStaged = kLabels * kStagedStride;

template <typename T>
__device__ Connection load_connection(const Layer<T>& layer, int64_t at) {
  const int64_t index = layer.indices.is_uint16 ? __ldcs(static_cast<const uint16_t*>(layer.indices.data) + at)
                                                : __ldcs(static_cast<const int32_t*>(layer.indices.data) + at);
  const bool inside = index >= 0 && index < layer.shape.in_features;
  return {static_cast<int32_t>(inside ? index : layer.shape.in_features), load_once(layer.kernel + at)};
}

// Brings the block's connections from number `f` on into shared memory. What is past the last connection, or the
// last label, is filled with connections to the zero row. To be called by all threads of a block.
template <typename T>
__device__ void stage(const Layer<T>& layer, const LabelBlock& labels, int64_t f, Connection* staged) {
  __syncthreads();  // what is in there may still be in use
  const int column = threadIdx.x % kConnections;
#pragma unroll
  for (int row = threadIdx.x / kConnections; row < kLabels; row += Group<T>::kThreads / kConnections) {
    Connection c{static_cast<int32_t>(layer.shape.in_features), 0};
    if (row < labels.size && f + column < layer.shape.fan_in) {
      c = load_connection(layer, (labels.first + row) * layer.shape.fan_in + f + column);
    }
    staged[row * kStagedStride + column] = c;
  }
  __syncthreads();
}

// The number of staged connections that there are from number `f` on.
template <typename T>
__device__ int staged_connections(const Layer<T>& layer, int64_t f) {
  return static_cast<int>(min(int64_t{kConnections}, layer.shape.fan_in - f));
}

// ---- the two products ----

// A lane's part of the rows that kAtOnce connections read.
template <bool kInShared, typename T>
__device__ void load_rows(const T* tile, const Connection* connections, int lane, uint4 (&rows)[kAtOnce]) {
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const T* p = tile + static_cast<int64_t>(connections[i].row) * kTile + lane * Group<T>::kValues;
    if constexpr (kInShared) {
      rows[i] = *reinterpret_cast<const uint4*>(p);
    } else {
      rows[i] = __ldg(reinterpret_cast<const uint4*>(p));
    }
  }
}

// The logits of this thread's label, for its examples of the tile: of `features`, which is the tile's, in global
// or shared memory. To be called by all threads of a block.
template <bool kInShared, typename T>
__device__ void logits(const Layer<T>& layer, const T* features, const LabelBlock& labels, Connection* staged,
                       float (&sum)[Group<T>::kValues]) {
  const int label = my_label<T>(), lane = my_lane<T>();
  const float bias = layer.bias && label < labels.size ? to_float(layer.bias[labels.first + label]) : 0;
  for (float& s : sum) s = bias;
  for (int64_t f = 0; f < layer.shape.fan_in; f += kConnections) {
    stage(layer, labels, f, staged);
    const Connection* mine = staged + label * kStagedStride;
    const int count = staged_connections(layer, f);
#pragma unroll 1  // more rows at once do not fit in the registers
    for (int c = 0; c < count; c += kAtOnce) {
      uint4 rows[kAtOnce];
      load_rows<kInShared>(features, mine + c, lane, rows);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float x[Group<T>::kValues];
        unpack(rows[i], x);
        const float weight = mine[c + i].weight;
#pragma unroll
        for (int v = 0; v < Group<T>::kValues; ++v) sum[v] = fmaf(weight, x[v], sum[v]);
      }
    }
  }
}

// The sum of values[i] over the lanes of a group, for i = lane % kAtOnce. Each step halves what a lane holds, so that
// this takes hardly more shuffles than there are sums. To be called by all threads of a warp.
template <int kLanes>
__device__ float sum_to_own_lane(float (&values)[kAtOnce], int lane) {
#pragma unroll
  for (int half = kAtOnce / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, half);
    }
  }
#pragma unroll
  for (int other = kAtOnce; other < kLanes; other *= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], other);
  return values[0];
}

// Sums of d_x for a tile are [D, kTile] like its features, but within a row they are in the order in which a warp adds
// to them: what one instruction adds for a label is contiguous. From compute capability 9.0 on that is 16 bytes of
// each lane, before it is one value of each. To be used by device code only, where the two are told apart.
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
  return XLA_OPS_VECTOR_ATOMICS ? example : value * Group<T>::kLanes + lane;
}

// row[b] += weight * dy[b], for this lane's examples b.
template <typename T>
__device__ void add_to_sums(float* row, int lane, float weight, const float (&dy)[Group<T>::kValues]) {
#if XLA_OPS_VECTOR_ATOMICS
#pragma unroll
  for (int v = 0; v < Group<T>::kValues; v += 4) {
    atomicAdd(reinterpret_cast<float4*>(row + lane * Group<T>::kValues + v),
              make_float4(weight * dy[v], weight * dy[v + 1], weight * dy[v + 2], weight * dy[v + 3]));
  }
#else
#pragma unroll
  for (int v = 0; v < Group<T>::kValues; ++v) atomicAdd(row + v * Group<T>::kLanes + lane, weight * dy[v]);
#endif
}

// Adds one tile's part of the gradients, given dy, those of this thread's label for its examples (0 where there is
// no such label or example):
//   sums[label, f] (+)= sum_b dy[b] * x[b, index], for the labels of the block: added to only if `add`.
//   sums_of_d_x[index, b] += kernel[label, f] * dy[b], atomically.
// Returns false, and does nothing, if all gradients of the block are 0. A label whose gradients are all 0 costs no
// row of features or of d_x. To be called by all threads of a block.
template <typename T>
__device__ bool add_gradients(const Layer<T>& layer, const T* features, const LabelBlock& labels,
                              const float (&dy)[Group<T>::kValues], bool add, Connection* staged, float* sums,
                              float* sums_of_d_x) {
  constexpr int kLanes = Group<T>::kLanes, kValues = Group<T>::kValues;
  const int label = my_label<T>(), lane = my_lane<T>();
  bool nonzero = false;
  for (float d : dy) nonzero |= d != 0;
  const unsigned nonzero_lanes = __ballot_sync(kAllLanes, nonzero);
  if (!__syncthreads_or(nonzero_lanes != 0)) return false;
  const bool label_nonzero = (nonzero_lanes >> (threadIdx.x % kWarp - lane)) & ((1u << kLanes) - 1);

  for (int64_t f = 0; f < layer.shape.fan_in; f += kConnections) {
    stage(layer, labels, f, staged);
    if (add && nonzero_lanes == 0) continue;
    const Connection* mine = staged + label * kStagedStride;
    const int count = staged_connections(layer, f);
#pragma unroll 1
    for (int c = 0; c < count; c += kAtOnce) {
      float products[kAtOnce] = {};
      if (label_nonzero) {
        uint4 rows[kAtOnce];
        load_rows<false>(features, mine + c, lane, rows);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float x[kValues];
          unpack(rows[i], x);
          const Connection connection = mine[c + i];
#pragma unroll
          for (int v = 0; v < kValues; ++v) products[i] = fmaf(dy[v], x[v], products[i]);
          if (connection.row < layer.shape.in_features) {
            add_to_sums<T>(sums_of_d_x + static_cast<int64_t>(connection.row) * kTile, lane, connection.weight, dy);
          }
        }
      }
      const float sum = sum_to_own_lane<kLanes>(products, lane);
      if (label < labels.size && lane < kAtOnce && c + lane < count) {
        float& total = sums[label * layer.shape.fan_in + f + c + lane];
        total = add ? total + sum : sum;
      }
    }
  }
  return true;
}

// Calls take(number of the weight, its gradient) for the kernel's weights of a block of labels: the gradients are
// `sums`, or 0 if there are none. To be called by all threads of a block.
template <typename T, typename Fn>
__device__ void for_each_kernel_gradient(const Layer<T>& layer, const LabelBlock& labels, bool any, const float* sums,
                                         Fn&& take) {
  __syncthreads();  // sums were written by other threads
  const int64_t first = labels.first * layer.shape.fan_in;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < labels.size * layer.shape.fan_in; i += blockDim.x) {
    take(first + i, any ? sums[i] : 0);
  }
  __syncthreads();  // before they are written again
}

// Calls take(label, gradient of its bias), which is the sum of `sum` over the lanes of the label's group. To be
// called by all threads of a block.
template <typename T, typename Fn>
__device__ void for_each_bias_gradient(const LabelBlock& labels, float sum, Fn&& take) {
#pragma unroll
  for (int other = 1; other < Group<T>::kLanes; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
  if (my_lane<T>() == 0 && my_label<T>() < labels.size) take(labels.first + my_label<T>(), sum);
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_DEVICE_CUH_
