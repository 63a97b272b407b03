// The backward pass of a fixed fan-in layer: all gradients in one sweep over the labels.
//
// A block of labels is taken through everything while its rows and the features that it reads are in cache:
// gradient of the logits, gradient of the kernel, gradient of the input. Where the gradient of the logits is
// zero for a label in a tile, which for the squared hinge is nearly everywhere once training is under way,
// the two products are skipped. What becomes of the gradients of the kernel and the bias is up to a *sink*:
// `Gradients` writes them out, the updates of fan_in_step.cc apply them and forget them.

#ifndef XLA_OPS_CSRC_CPU_BACKWARD_H_
#define XLA_OPS_CSRC_CPU_BACKWARD_H_

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "packed.h"
#include "parallel.h"

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

// One thread's part of the labels, [begin, end). rows_of(run, tile, label, n, rows) fills in the gradient of
// the logits of n labels, and returns the mask of those that have any; the gradient of the packed input is
// added to d_packed, unless that is null.
//
// Tiles are on the inside, so that the sink gets a run's gradients summed over the batch, but a run is long
// enough to pay for bringing a tile's features into the cache.
template <typename T, typename I, typename Rows, typename Sink>
void backward_part(const Layer<T, I>& layer, const Tiles& tiles, const Packed<T>& packed, int64_t begin,
                   int64_t end, Rows& rows_of, Sink& sink, float* d_packed) {
  const Shape& s = layer.shape;
  const int64_t run_length = labels_per_run(s);
  Run<T, I> run(layer, packed, std::min(run_length, end - begin));
  const Buffer<float> d_bias = allocate<float>(run_length);
  alignas(64) float rows[kBlock * kTile];
  for (int64_t first = begin; first < end; first += run_length) {
    const int64_t labels = std::min(run_length, end - first);
    run.start(first, labels);
    float* d_kernel = sink.kernel_sums(first, labels);
    run.start_gradients(d_kernel);
    std::fill_n(d_bias.get(), labels, 0.0f);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const Tile tile = tiles[t];
      for (int64_t done = 0; done < labels; done += kBlock) {
        const int64_t label = first + done, n = std::min(kBlock, labels - done);
        const uint64_t mask = rows_of(run, tile, label, n, rows);
        row_kernels().sums(rows, mask, tile.width, d_bias.get() + done);
        run.gradients(tile, label, rows, mask, d_packed ? d_packed + tile.offset : nullptr);
      }
    }
    run.finish_gradients();
    sink.take(first, labels, d_kernel, d_bias.get());
  }
}

// d_x [batch, in_features], unless that is null, and everything else into the sinks. make_rows() and
// make_sink() are called once per part; the rows come back, for what they have counted.
template <typename T, typename I, typename MakeRows, typename MakeSink>
auto backward(xla::ffi::ThreadPool& pool, const Layer<T, I>& layer, const Tiles& tiles,
              const Packed<T>& packed, const MakeRows& make_rows, const MakeSink& make_sink, T* d_x) {
  const Shape& s = layer.shape;
  const Parts parts(s, std::max<int64_t>(1, std::min(pool.num_threads(), worthwhile_copies(s))));
  const Buffer<float> d_packed = d_x ? allocate<float>(parts.count * tiles.elements) : nullptr;
  std::vector<decltype(make_rows())> rows(parts.count, make_rows());
  parallel_for(pool, parts.count, [&](int64_t p) {
    float* const d = d_x ? d_packed.get() + p * tiles.elements : nullptr;
    if (d) std::memset(d, 0, tiles.elements * sizeof(float));
    auto sink = make_sink();
    backward_part(layer, tiles, packed, parts.begin(p), parts.end(p), rows[p], sink, d);
  });
  if (d_x) unpack_sum(pool, tiles, d_packed.get(), parts.count, d_x);
  return rows;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_BACKWARD_H_
