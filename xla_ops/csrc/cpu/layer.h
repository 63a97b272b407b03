// A fixed fan-in layer, of which chunks of labels are computed.

#ifndef XLA_OPS_CSRC_CPU_LAYER_H_
#define XLA_OPS_CSRC_CPU_LAYER_H_

#include <algorithm>
#include <cstdint>

#include "../fan_in_layer.h"
#include "kernels.h"
#include "memory.h"
#include "packed.h"
#include "tiles.h"

namespace xla_ops {

// A chunk of labels goes through all tiles together. It has so many connections: their weights stay in the
// second-level cache.
constexpr int64_t kConnectionsPerChunk = 1 << 17;

inline int64_t labels_per_chunk(const Shape& s) {
  return std::max(kBlock, kConnectionsPerChunk / std::max<int64_t>(1, s.fan_in) / kBlock * kBlock);
}

// A fixed fan-in layer: kernel and indices [labels, fan_in], bias [labels] or null.
template <typename T, typename I>
struct Layer {
  Shape shape;
  const T* kernel;
  const I* indices;
  const T* bias;
};
template <typename T, typename I>
Layer<T, I> layer_of(const LayerCall& call) {
  return {call.shape, data<T>(call.kernel), data<I>(call.indices), nullptr};
}
template <typename T, typename I>
Layer<T, I> layer_of(const BiasedLayerCall& call) {
  return {call.shape, data<T>(call.kernel), data<I>(call.indices), optional_data<T>(call.bias)};
}

// Computes logits and gradients of a chunk of labels, for one tile after the other.
template <typename T, typename I>
class LabelChunk {
 public:
  // No chunk will have more than `most` labels. The layer and the packed inputs are kept by reference.
  LabelChunk(const Layer<T, I>& layer, const Packed<T>& packed, int64_t most)
      : layer_(layer), packed_(packed) {
    if (!packed.has_sparse()) return;
    const int64_t of_label = layer.shape.fan_in + kLanes, all = most * layer.shape.fan_in + kLanes;
    bounds_ = allocate<int64_t>(2 * most + 1);
    numbers_ = allocate<int32_t>(2 * (all + of_label));
    weights_ = allocate<T>(all);
    int32_t* const n = numbers_.get();
    lists_ = {bounds_.get(), bounds_.get() + most + 1, n, n + all, weights_.get()};
    scratch_ = n + 2 * all;
    most_ = all;
  }

  // Starts the chunk of labels [first, first + count).
  void start(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    if (!packed_.has_sparse()) return;
    list_kernels<T, I>().list_connections(packed_.map(), layer_.kernel + first * fan_in(), indices(first),
                                          count, fan_in(), scratch_, lists_);
  }

  // rows[n, tile.width] = the logits of labels [label, label + n).
  void logits(const Tile& tile, int64_t label, int64_t n, float* rows) const {
    const T *kernel = layer_.kernel + label * fan_in(), *bias = layer_.bias ? layer_.bias + label : nullptr;
    const T* packed = packed_.of(tile);
    if (packed_.has_sparse()) {
      listed_kernels<T>().logits(packed, lists(label), tile.width, bias, n, rows);
    } else {
      plain().logits(packed, packed_.in_features(), tile.width, kernel, indices(label), bias, n, fan_in(),
                     rows);
    }
  }

  // Sets the kernel's gradient of all labels, d_kernel [labels, fan_in], to 0 before gradients are added.
  void start_gradients(float* d_kernel) {
    d_kernel_ = d_kernel;
    std::fill_n(d_kernel, count_ * fan_in(), 0.0f);
    if (!packed_.has_sparse()) return;
    if (!d_weights_) d_weights_ = allocate<float>(most_);
    std::fill_n(d_weights_.get(), lists_.first[count_], 0.0f);
  }

  // Adds to d_kernel and, unless it is null, d_packed, from the rows of a mask of labels from `label`.
  void gradients(const Tile& tile, int64_t label, const float* rows, uint64_t mask, float* d_packed) const {
    const T *kernel = layer_.kernel + label * fan_in(), *packed = packed_.of(tile);
    if (packed_.has_sparse()) {
      listed_kernels<T>().kernel_grad(packed, lists(label), tile.width, rows, mask, d_weights_.get());
      if (d_packed) listed_kernels<T>().input_grad(rows, mask, lists(label), tile.width, d_packed);
    } else {
      const int64_t in_features = packed_.in_features();
      plain().kernel_grad(packed, in_features, tile.width, rows, mask, indices(label), fan_in(),
                          d_kernel_ + (label - first_) * fan_in());
      if (d_packed) {
        plain().input_grad(rows, mask, in_features, tile.width, kernel, indices(label), fan_in(), d_packed);
      }
    }
  }

  // After this, d_kernel has all that was added.
  void finish_gradients() const {
    if (!packed_.has_sparse()) return;
    for (int64_t n = 0; n < count_; ++n) {
      float* const d = d_kernel_ + n * fan_in();
      for (int64_t k = lists_.first[n]; k < lists_.first[n + 1]; ++k) d[lists_.slot[k]] = d_weights_[k];
    }
  }

 private:
  static const FanInKernels<T, I>& plain() { return fan_in_kernels<T, I>(); }
  int64_t fan_in() const { return layer_.shape.fan_in; }
  const I* indices(int64_t label) const { return layer_.indices + label * fan_in(); }
  ConnectionLists<T> lists(int64_t label) const {
    const int64_t n = label - first_;
    return {lists_.first + n, lists_.end_of_dense + n, lists_.row, lists_.slot, lists_.weight};
  }

  const Layer<T, I>& layer_;
  const Packed<T>& packed_;
  int64_t first_ = 0, count_ = 0, most_ = 0;
  float* d_kernel_ = nullptr;
  // Memory of the lists, and the gradients of their weights.
  Buffer<int64_t> bounds_;
  Buffer<int32_t> numbers_;
  Buffer<T> weights_;
  Buffer<float> d_weights_;
  ConnectionLists<T> lists_{};
  int32_t* scratch_ = nullptr;
};

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_LAYER_H_
