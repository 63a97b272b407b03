// The forward product of a fixed fan-in layer.

#ifndef XLA_OPS_CSRC_CUDA_LOGITS_CUH_
#define XLA_OPS_CSRC_CUDA_LOGITS_CUH_

#include <cstdint>

#include "layer.cuh"
#include "staging.cuh"
#include "values.cuh"

namespace xla_ops::cuda {

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
// global or shared memory. `already_staged` says that all of the label's connections are staged already. To
// be called by all threads of a block.
template <bool kInShared, typename T, bool kSparse>
__device__ void logits(const Layer<T, kSparse>& layer, const Features<T, kSparse>& features,
                       const LabelBlock& labels, Staged<kSparse>& staged, bool already_staged,
                       float (&sum)[Group<T>::kValues]) {
  const int label = my_label<T>(), lane = my_lane<T>();
  const float bias = layer.bias && label < labels.size ? to_float(layer.bias[labels.first + label]) : 0;
  for (float& s : sum) s = bias;
  for (int f = 0; f < layer.shape.fan_in; f += kConnections) {
    if (!already_staged) stage(layer, features, labels, f, staged);
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

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_LOGITS_CUH_
