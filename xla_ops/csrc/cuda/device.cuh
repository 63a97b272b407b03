// What the kernels share.
//
// The batch is cut into tiles of 32 examples and the labels into blocks of 64. Features are packed tile by
// tile as [D + 1, 32], so that a connection reads one contiguous *row* of the batch (128 bytes of float32, 64
// of bfloat16); the last row is zero, and every index outside [0, D) is redirected to it. Behind all tiles
// there is a row for each sparse input that a tile has, and a bitmap of those that it has says where (Packed
// in layout.h).
//
// A block of threads has one group of lanes for each of its labels. A lane holds 16 bytes of a row: a group
// is 8 lanes with 4 examples each in float32, 4 lanes with 8 examples each in bfloat16. Connections are
// brought into shared memory, 32 of each label at a time, by all threads together: so indices and weights are
// read in order whatever the fan-in is, and all at once, which hides how far away they are. Where a label has
// no more than that, they stay there for all that is done with the block, and so do the sums of their
// gradients. Where there are sparse inputs, the connections that read nothing of the tile go behind the
// others of their label, and are left out from there on.

#ifndef XLA_OPS_CSRC_CUDA_DEVICE_CUH_
#define XLA_OPS_CSRC_CUDA_DEVICE_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "layout.h"

namespace xla_ops::cuda {

constexpr int kLabels = 64;
constexpr int kConnections = 32;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

template <typename T>
struct Group {
  static constexpr int kValues = 16 / sizeof(T);     // of a row, in a lane
  static constexpr int kLanes = kTile / kValues;     // that share a label
  static constexpr int kThreads = kLabels * kLanes;  // in a block
  static constexpr int kQuads = kValues / 4;         // of a lane's examples, which are added at once
};

// Rows that a lane asks for before it uses the first: with all threads of a processor that is 64 KB under
// way.
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

// Four at once, from an address that is a multiple of their size.
struct alignas(8) bfloat16x4 {
  bfloat16 values[4];
};
__device__ inline float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ inline void set4(float* p, const float4& v) { *reinterpret_cast<float4*>(p) = v; }
__device__ inline void set4(bfloat16* p, const float4& v) {
  bfloat16x4 four;
  set(four.values, v.x), set(four.values + 1, v.y), set(four.values + 2, v.z), set(four.values + 3, v.w);
  *reinterpret_cast<bfloat16x4*>(p) = four;
}

// Loads of what is read once, and is not to push features out of the cache.
__device__ inline float load_once(const float* p) { return __ldcs(p); }
__device__ inline float4 load4_once(const float* p) { return __ldcs(reinterpret_cast<const float4*>(p)); }
__device__ inline float load_once(const bfloat16* p) {
  return to_float(bfloat16{__ldcs(reinterpret_cast<const uint16_t*>(p))});
}

// ---- the layer, and a thread's place in it ----

// What a tile's connections read: rows of features and, where there are sparse inputs, the tile's number,
// which says where the map has it: registers are few.
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

// Calls fn(the layer), which returns an error, with the type of it that fits.
template <typename T, typename Fn>
cudaError_t dispatch(const Layer<T>& layer, const SparseMap& map, Fn&& fn) {
  return map.columns > 0 ? fn(Layer<T, true>{layer, map}) : fn(layer);
}

// How many blocks of threads may share the labels where each has temporaries of its own: the size of those
// must not depend on the device. No device so far runs as many at once.
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
__device__ int my_label() {
  return threadIdx.x / Group<T>::kLanes;
}
template <typename T>
__device__ int my_lane() {
  return threadIdx.x % Group<T>::kLanes;
}

// ---- connections ----

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
  uint8_t numbers[kStaged];  // which of the staged connections of its label each was before it was moved
  int32_t counts[kLabels];   // how many of a label are not to the zero row: its first ones
};

template <typename T>
__device__ int32_t load_index(const Layer<T>& layer, int64_t at) {
  return layer.indices.is_uint16 ? __ldcs(static_cast<const uint16_t*>(layer.indices.data) + at)
                                 : __ldcs(static_cast<const int32_t*>(layer.indices.data) + at);
}

// The row of an input, dense or sparse: the zero row if the tile has no such.
template <typename T>
__device__ int32_t row_of(const Layer<T, true>& layer, const Word* words, int32_t first, int32_t index) {
  // Inputs are fewer than 2^31: what is negative, or dense, is above the columns.
  const uint32_t dense = static_cast<uint32_t>(layer.shape.in_features), input = static_cast<uint32_t>(index);
  const uint32_t column = input - dense;
  const Word word = column < static_cast<uint32_t>(layer.map.columns) ? load_word(words, column) : Word{0, 0};
  return word.has(column) ? first + word.row(column) : static_cast<int32_t>(input < dense ? input : dense);
}

// As below, where there are sparse inputs: a warp has the connections of a label, of which it moves those to
// the zero row behind the others.
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
    for (int i = 0; i < kStagedAtOnce; ++i) rows[i] = row_of(layer, words, first_sparse, rows[i]);
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

// Brings the block's connections from number `f` on into shared memory. What is past the last connection, or
// the last label, is filled with connections to the zero row. To be called by all threads of a block.
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

// Which of its label's connections one is, counted from number `f`.
__device__ inline int number_of(const Staged<false>&, int, int c) { return c; }
__device__ inline int number_of(const Staged<true>& staged, int label, int c) {
  return staged.numbers[label * kStagedStride + c];
}

// ---- the two products ----

// A lane's part of the rows that some connections read.
template <bool kInShared, typename T, int kCount>
__device__ void load_rows(const T* tile, const Connection* connections, int lane, uint4 (&rows)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T* p = tile + static_cast<int64_t>(connections[i].row) * kTile + lane * Group<T>::kValues;
    if constexpr (kInShared) {
      rows[i] = *reinterpret_cast<const uint4*>(p);
    } else {
      rows[i] = __ldg(reinterpret_cast<const uint4*>(p));
    }
  }
}

// The logits of this thread's label, for its examples of the tile: of `features`, which is the tile's, in
// global or shared memory. `there` says that all of the label's connections are staged already. To be called
// by all threads of a block.
template <bool kInShared, typename T, bool kSparse>
__device__ void logits(const Layer<T, kSparse>& layer, const Features<T, kSparse>& features,
                       const LabelBlock& labels, Staged<kSparse>& staged, bool there,
                       float (&sum)[Group<T>::kValues]) {
  const int label = my_label<T>(), lane = my_lane<T>();
  const float bias = layer.bias && label < labels.size ? to_float(layer.bias[labels.first + label]) : 0;
  for (float& s : sum) s = bias;
  for (int f = 0; f < layer.shape.fan_in; f += kConnections) {
    if (!there) stage(layer, features, labels, f, staged);
    const Connection* mine = staged.connections + label * kStagedStride;
    const int count = staged_connections(layer, f, staged, label);
#pragma unroll 1  // more rows at once do not fit in the registers
    for (int c = 0; c < count; c += kAtOnce) {
      uint4 rows[kAtOnce];
      load_rows<kInShared>(features.rows, mine + c, lane, rows);
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
// costs no part of a row of features, or of d_x. `there` says that all of the label's connections are staged
// already. To be called by all threads of a block.
template <typename T, bool kSparse>
__device__ bool add_gradients(const Layer<T, kSparse>& layer, const Features<T, kSparse>& features,
                              const LabelBlock& labels, const float (&dy)[Group<T>::kValues], bool add,
                              Staged<kSparse>& staged, bool there, float* sums, float* sums_of_d_x) {
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
    if (!there) stage(layer, features, labels, f, staged);
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

#endif  // XLA_OPS_CSRC_CUDA_DEVICE_CUH_
