// The batch cut into tiles, and its inputs packed feature-major within each tile.

#ifndef XLA_OPS_CSRC_CPU_PACKED_H_
#define XLA_OPS_CSRC_CPU_PACKED_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../fan_in_layer.h"
#include "kernels.h"
#include "parallel.h"

namespace xla_ops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr uintptr_t kHugePage = 2 << 20;

// Asks for huge pages under a large buffer that is about to be written. XLA takes results fresh from the
// system on every call, and faulting them in 4 KiB at a time costs about as much as computing them.
inline void expect_writes(void* data, size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The bytes of temporaries that all calls together hold now, and the most they ever held.
struct Scratch {
  std::atomic<int64_t> now{0}, peak{0};

  void add(int64_t bytes) {
    const int64_t total = now += bytes;
    int64_t most = peak;
    while (total > most && !peak.compare_exchange_weak(most, total)) {
    }
  }
};
inline Scratch& scratch() {
  static Scratch total;
  return total;
}

struct Free {
  int64_t bytes = 0;
  void operator()(void* p) const {
    std::free(p);
    scratch().add(-bytes);
  }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Uninitialised and aligned to a cache line. Large ones are in huge pages: features are read all over the
// place, and would miss the address cache as well. Throws std::bad_alloc.
template <typename T>
Buffer<T> allocate(int64_t count) {
  const int64_t wanted = std::max<int64_t>(1, count) * sizeof(T);
  const int64_t alignment = wanted < static_cast<int64_t>(kHugePage) ? 64 : kHugePage;
  const size_t bytes = ceil_div(wanted, alignment) * alignment;
  void* p = std::aligned_alloc(alignment, bytes);
  if (!p) throw std::bad_alloc();
  if (alignment == kHugePage) expect_writes(p, bytes);
  scratch().add(bytes);
  return Buffer<T>(static_cast<T*>(p), Free{static_cast<int64_t>(bytes)});
}

// Where float32 sums that end up in `out` are kept: there, or in `*beside` if `out` is narrower. The same
// `beside` serves again for a count that is no larger.
inline float* accumulator(float* out, int64_t, Buffer<float>*) { return out; }
inline float* accumulator(bfloat16*, int64_t count, Buffer<float>* beside) {
  if (!*beside) *beside = allocate<float>(count);
  return beside->get();
}

// Threads that scatter into the same inputs each use a copy of their own. A copy costs as much as in_features
// connections, so there are never more copies than the work pays for.
inline int64_t worthwhile_copies(const Shape& s) { return s.labels * s.fan_in / (s.in_features + 1); }

struct Tile {
  int64_t first, size;  // examples [first, first + size)
  int64_t width;        // size rounded up to kLanes; the padding is zero
  int64_t offset;       // of the tile's gradient, [in_features + 1, width], in elements
};

// All tiles but the last are kTile wide.
struct Tiles {
  Tiles(int64_t batch, int64_t in_features)
      : batch(batch),
        in_features(in_features),
        count(ceil_div(batch, kTile)),
        elements((in_features + 1) * ceil_div(batch, kLanes) * kLanes) {}

  Tile operator[](int64_t t) const {
    const int64_t first = t * kTile, size = std::min(kTile, batch - first);
    return {first, size, ceil_div(size, kLanes) * kLanes, first * (in_features + 1)};
  }

  int64_t batch, in_features, count, elements;
};

// The inputs of a batch: dense ones, x [batch, in_features], then `columns` sparse ones, of which the batch
// has `entries`: row_of[n] is an example's number, column_of[n] an input's, and what is out of range is
// padding. Entries of the same example and input are added.
template <typename T>
struct Inputs {
  const T* x;
  const int32_t* row_of;
  const int32_t* column_of;
  const T* values;
  int64_t entries, columns;
};

template <typename T>
Inputs<T> inputs_of(const LayerCall& call) {
  return {data<T>(call.x),      data<int32_t>(call.rows), data<int32_t>(call.columns),
          data<T>(call.values), call.num_entries(),       call.num_columns};
}

inline void add(float value, float* sum) { *sum += value; }
inline void add(bfloat16 value, bfloat16* sum) {
  const auto wide = [](bfloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof(f));
    return f;
  };
  const float total = wide(*sum) + wide(value);
  layout_kernels<bfloat16>().narrow(&total, 1, sum);
}

constexpr int64_t kFeaturesAtOnce = 1024;

// Inputs packed by tile: the dense ones, a row of zeros, and a row for each sparse input that the batch has.
template <typename T>
class Packed {
 public:
  Packed(xla::ffi::ThreadPool& pool, const Tiles& tiles, const Inputs<T>& inputs)
      : in_features_(tiles.in_features), columns_(inputs.columns) {
    if (columns_) find_present(tiles, inputs);
    values_ = allocate<T>(rows_ * ceil_div(tiles.batch, kLanes) * kLanes);
    pack_dense(pool, tiles, inputs.x);
    if (columns_) add_sparse(tiles, inputs);
  }

  bool has_sparse() const { return columns_ > 0; }
  int64_t in_features() const { return in_features_; }
  const T* of(const Tile& tile) const { return values_.get() + tile.first * rows_; }
  SparseMap map() const { return {in_features_, columns_, present_.get(), first_.get()}; }

 private:
  // Calls fn(row, column, n) for each entry that is in range.
  template <typename Fn>
  static void for_each(const Tiles& tiles, const Inputs<T>& inputs, const Fn& fn) {
    for (int64_t n = 0; n < inputs.entries; ++n) {
      const int64_t row = inputs.row_of[n], column = inputs.column_of[n];
      if (row >= 0 && row < tiles.batch && column >= 0 && column < inputs.columns) fn(row, column, n);
    }
  }

  // Finds the sparse inputs that the batch has, and numbers their rows in order.
  void find_present(const Tiles& tiles, const Inputs<T>& inputs) {
    const int64_t words = ceil_div(columns_, 32);
    present_ = allocate<uint32_t>(words);
    first_ = allocate<int32_t>(words);
    std::fill_n(present_.get(), words, 0);
    for_each(tiles, inputs,
             [&](int64_t, int64_t column, int64_t) { present_[column / 32] |= uint32_t{1} << column % 32; });
    for (int64_t w = 0; w < words; ++w) {
      first_[w] = static_cast<int32_t>(rows_);
      rows_ += __builtin_popcount(present_[w]);
    }
  }

  void pack_dense(xla::ffi::ThreadPool& pool, const Tiles& tiles, const T* x) {
    const int64_t chunks = ceil_div(in_features_ + 1, kFeaturesAtOnce);
    parallel_for(pool, tiles.count * chunks, [&](int64_t item) {
      const Tile tile = tiles[item / chunks];
      const int64_t first = item % chunks * kFeaturesAtOnce;
      const int64_t n = std::min(kFeaturesAtOnce, in_features_ - first);
      T* rows = values_.get() + tile.first * rows_;
      layout_kernels<T>().to_packed(x + tile.first * in_features_ + first, in_features_, n, tile.size,
                                    tile.width, rows + first * tile.width, tile.width);
      if (first + kFeaturesAtOnce > in_features_) {  // the zeros, and sparse inputs before they are added
        std::fill(rows + in_features_ * tile.width, rows + rows_ * tile.width, T{});
      }
    });
  }

  void add_sparse(const Tiles& tiles, const Inputs<T>& inputs) {
    for_each(tiles, inputs, [&](int64_t row, int64_t column, int64_t n) {
      const Tile tile = tiles[row / kTile];
      const int64_t at = map().row_of(column);
      add(inputs.values[n], values_.get() + tile.first * rows_ + at * tile.width + row - tile.first);
    });
  }

  const int64_t in_features_, columns_;
  int64_t rows_ = in_features_ + 1;
  Buffer<uint32_t> present_;
  Buffer<int32_t> first_;
  Buffer<T> values_;
};

// The labels cut into `count` parts of whole blocks.
struct Parts {
  Parts(const Shape& s, int64_t count)
      : count(count), labels(s.labels), each(ceil_div(ceil_div(s.labels, kBlock), count) * kBlock) {}

  int64_t begin(int64_t part) const { return std::min(labels, part * each); }
  int64_t end(int64_t part) const { return begin(part + 1); }

  const int64_t count, labels, each;
};

// Labels taken through all tiles together have so many connections: their weights stay in the second-level
// cache.
constexpr int64_t kConnectionsPerRun = 1 << 17;

inline int64_t labels_per_run(const Shape& s) {
  return std::max(kBlock, kConnectionsPerRun / std::max<int64_t>(1, s.fan_in) / kBlock * kBlock);
}

// A fixed fan-in layer: kernel and indices [labels, fan_in], bias [labels] or null.
template <typename T, typename I>
struct Layer {
  using Value = T;

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

// What a layer computes of one tile after the other, for a run of labels.
template <typename T, typename I>
class Run {
 public:
  // No run will have more than `most` labels. The layer and the packed inputs are kept by reference.
  Run(const Layer<T, I>& layer, const Packed<T>& packed, int64_t most) : layer_(layer), packed_(packed) {
    if (!packed.has_sparse()) return;
    const int64_t of_label = layer.shape.fan_in + kLanes, all = most * layer.shape.fan_in + kLanes;
    bounds_ = allocate<int64_t>(2 * most + 1);
    numbers_ = allocate<int32_t>(2 * (all + of_label));
    weights_ = allocate<T>(all);
    int32_t* const n = numbers_.get();
    lists_ = {bounds_.get(), bounds_.get() + most + 1, n, n + all, weights_.get()};
    spare_ = n + 2 * all;
    most_ = all;
  }

  // What follows is of labels from [first, first + count).
  void start(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    if (!packed_.has_sparse()) return;
    list_kernels<T, I>().list(packed_.map(), layer_.kernel + first * fan_in(), indices(first), count,
                              fan_in(), spare_, lists_);
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
      for (int64_t k = lists_.first[n]; k < lists_.first[n + 1]; ++k) d[lists_.at[k]] = d_weights_[k];
    }
  }

 private:
  static const FanInKernels<T, I>& plain() { return fan_in_kernels<T, I>(); }
  int64_t fan_in() const { return layer_.shape.fan_in; }
  const I* indices(int64_t label) const { return layer_.indices + label * fan_in(); }
  Lists<T> lists(int64_t label) const {
    const int64_t n = label - first_;
    return {lists_.first + n, lists_.dense + n, lists_.row, lists_.at, lists_.weight};
  }

  const Layer<T, I>& layer_;
  const Packed<T>& packed_;
  int64_t first_ = 0, count_ = 0, most_ = 0;
  float* d_kernel_ = nullptr;
  // What the lists hold, and the gradients of their weights.
  Buffer<int64_t> bounds_;
  Buffer<int32_t> numbers_;
  Buffer<T> weights_;
  Buffer<float> d_weights_;
  Lists<T> lists_{};
  int32_t* spare_ = nullptr;
};

// out [batch, in_features] = the sum of `parts` packed matrices; the first of them is overwritten.
template <typename T>
void unpack_sum(xla::ffi::ThreadPool& pool, const Tiles& tiles, float* packed, int64_t parts, T* out) {
  const int64_t in_features = tiles.in_features, chunks = ceil_div(in_features, kFeaturesAtOnce);
  parallel_for(pool, tiles.count * chunks, [&](int64_t item) {
    const Tile tile = tiles[item / chunks];
    const int64_t first = item % chunks * kFeaturesAtOnce;
    const int64_t n = std::min(kFeaturesAtOnce, in_features - first);
    float* sum = packed + tile.offset + first * tile.width;
    for (int64_t part = 1; part < parts; ++part) {
      const float* other = sum + part * tiles.elements;
      for (int64_t i = 0; i < n * tile.width; ++i) sum[i] += other[i];
    }
    layout_kernels<T>().from_rows(sum, tile.width, tile.size, n, n, out + tile.first * in_features + first,
                                  in_features);
  });
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_PACKED_H_
