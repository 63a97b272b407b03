// The inputs of a batch, packed feature-major within each tile.

#ifndef XLA_OPS_CSRC_CPU_PACKED_H_
#define XLA_OPS_CSRC_CPU_PACKED_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../fan_in_layer.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "tiles.h"

namespace xla_ops {

// The inputs of a batch: dense ones, x [batch, in_features], then sparse ones. Entry n of those is at rows[n]
// (an example) and columns[n] (a sparse input); entries out of range are padding. Entries of the same example
// and input are added.
template <typename T>
struct Inputs {
  const T* x;
  const int32_t* rows;
  const int32_t* columns;
  const T* values;
  int64_t num_entries, num_columns;
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
      : in_features_(tiles.in_features), columns_(inputs.num_columns) {
    if (columns_) find_present(tiles, inputs);
    values_ = allocate<T>(rows_ * tiles.padded_batch);
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
    for (int64_t n = 0; n < inputs.num_entries; ++n) {
      const int64_t row = inputs.rows[n], column = inputs.columns[n];
      if (row >= 0 && row < tiles.batch && column >= 0 && column < inputs.num_columns) fn(row, column, n);
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
      const int64_t at = map().packed_row(column);
      add(inputs.values[n], values_.get() + tile.first * rows_ + at * tile.width + row - tile.first);
    });
  }

  const int64_t in_features_, columns_;
  int64_t rows_ = in_features_ + 1;
  Buffer<uint32_t> present_;
  Buffer<int32_t> first_;
  Buffer<T> values_;
};

// out [batch, in_features] = the sum of `copies` packed matrices; the first of them is overwritten.
template <typename T>
void unpack_sum(xla::ffi::ThreadPool& pool, const Tiles& tiles, float* packed, int64_t copies, T* out) {
  const int64_t in_features = tiles.in_features, chunks = ceil_div(in_features, kFeaturesAtOnce);
  parallel_for(pool, tiles.count * chunks, [&](int64_t item) {
    const Tile tile = tiles[item / chunks];
    const int64_t first = item % chunks * kFeaturesAtOnce;
    const int64_t n = std::min(kFeaturesAtOnce, in_features - first);
    float* sum = packed + tile.gradient_offset + first * tile.width;
    for (int64_t copy = 1; copy < copies; ++copy) {
      const float* other = sum + copy * tiles.elements;
      for (int64_t i = 0; i < n * tile.width; ++i) sum[i] += other[i];
    }
    layout_kernels<T>().from_rows(sum, tile.width, tile.size, n, n, out + tile.first * in_features + first,
                                  in_features);
  });
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_PACKED_H_
