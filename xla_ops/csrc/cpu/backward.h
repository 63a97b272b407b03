// The backward pass of a fixed fan-in layer: all gradients in one sweep over the labels.
//
// A block of labels is taken through everything while its rows and the features that it reads are in cache:
// gradient of the logits, gradient of the kernel, gradient of the input. Where the gradient of the logits is
// zero for a label in a tile, which for the squared hinge is nearly everywhere once training is under way,
// the two products are skipped. The gradients of the kernel and the bias go to a *sink*: `Gradients`
// writes them out, `Update` in fan_in_step.cc applies them.

#ifndef XLA_OPS_CSRC_CPU_BACKWARD_H_
#define XLA_OPS_CSRC_CPU_BACKWARD_H_

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "layer.h"
#include "memory.h"
#include "packed.h"
#include "parallel.h"
#include "tiles.h"

namespace xla_ops {

// The sink that writes gradients out: d_kernel [labels, fan_in] and d_bias [labels], or null.
template <typename T>
class Gradients {
 public:
  Gradients(const Shape& s, T* d_kernel, T* d_bias)
      : fan_in_(s.fan_in), d_kernel_(d_kernel), d_bias_(d_bias) {}

  // Where the kernel's gradient of labels [first, first + labels) is to be summed.
  float* kernel_sums(int64_t first, int64_t labels) {
    return accumulator(d_kernel_ + first * fan_in_, labels * fan_in_, &beside_);
  }
  // Takes the finished sums of those labels.
  void take(int64_t first, int64_t labels, const float* d_kernel, const float* d_bias) {
    if (beside_) layout_kernels<T>().narrow(d_kernel, labels * fan_in_, d_kernel_ + first * fan_in_);
    if (d_bias_) layout_kernels<T>().narrow(d_bias, labels, d_bias_ + first);
  }

 private:
  const int64_t fan_in_;
  T* const d_kernel_;
  T* const d_bias_;
  Buffer<float> beside_;
};

// Computes the gradients of labels [begin, end), in one thread. gradient_rows(chunk, tile, label, n, rows)
// computes the gradient of the logits of n labels, and returns the mask of the rows that are not zero; the
// gradient of the packed input is added to d_packed, unless it is null.
//
// The loop over tiles is within the loop over chunks of labels, so that the sink gets gradients summed over
// the batch. A chunk is long enough to pay for bringing a tile's features into the cache.
template <typename T, typename I, typename Rows, typename Sink>
void backward_range(const Layer<T, I>& layer, const Tiles& tiles, const Packed<T>& packed, int64_t begin,
                    int64_t end, Rows& gradient_rows, Sink& sink, float* d_packed) {
  const Shape& s = layer.shape;
  const int64_t chunk_size = labels_per_chunk(s);
  LabelChunk<T, I> chunk(layer, packed, std::min(chunk_size, end - begin));
  const Buffer<float> d_bias = allocate<float>(chunk_size);
  alignas(64) float rows[kBlock * kTile];
  for (int64_t first = begin; first < end; first += chunk_size) {
    const int64_t labels = std::min(chunk_size, end - first);
    chunk.start(first, labels);
    float* d_kernel = sink.kernel_sums(first, labels);
    chunk.start_gradients(d_kernel);
    std::fill_n(d_bias.get(), labels, 0.0f);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const Tile tile = tiles[t];
      for (int64_t done = 0; done < labels; done += kBlock) {
        const int64_t label = first + done, n = std::min(kBlock, labels - done);
        const uint64_t mask = gradient_rows(chunk, tile, label, n, rows);
        row_kernels().sums(rows, mask, tile.width, d_bias.get() + done);
        chunk.gradients(tile, label, rows, mask, d_packed ? d_packed + tile.gradient_offset : nullptr);
      }
    }
    chunk.finish_gradients();
    sink.take(first, labels, d_kernel, d_bias.get());
  }
}

// Threads that scatter into the same inputs each use a copy of their own. A copy costs as much as in_features
// connections, so there are never more copies than the work pays for.
inline int64_t worthwhile_copies(const Shape& s) { return s.labels * s.fan_in / (s.in_features + 1); }

// Computes d_x [batch, in_features], unless it is null, and passes all other gradients to the sinks.
// make_rows() and make_sink() are called once per range of labels. Returns the rows, which have summed the
// loss.
template <typename T, typename I, typename MakeRows, typename MakeSink>
auto backward(xla::ffi::ThreadPool& pool, const Layer<T, I>& layer, const Tiles& tiles,
              const Packed<T>& packed, const MakeRows& make_rows, const MakeSink& make_sink, T* d_x) {
  const Shape& s = layer.shape;
  const LabelRanges ranges(s, std::max<int64_t>(1, std::min(pool.num_threads(), worthwhile_copies(s))));
  const Buffer<float> d_packed = d_x ? allocate<float>(ranges.count * tiles.elements) : nullptr;
  std::vector<decltype(make_rows())> rows(ranges.count, make_rows());
  parallel_for(pool, ranges.count, [&](int64_t r) {
    float* const d = d_x ? d_packed.get() + r * tiles.elements : nullptr;
    if (d) std::memset(d, 0, tiles.elements * sizeof(float));
    auto sink = make_sink();
    backward_range(layer, tiles, packed, ranges.begin(r), ranges.end(r), rows[r], sink, d);
  });
  if (d_x) unpack_sum(pool, tiles, d_packed.get(), ranges.count, d_x);
  return rows;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_BACKWARD_H_
