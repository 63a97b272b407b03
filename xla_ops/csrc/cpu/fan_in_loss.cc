// The loss of a fixed fan-in output layer against sparse positives, and all of its gradients, in one sweep
// over the labels: the logits of all labels never exist.

#include "../fan_in_loss.h"

#include <algorithm>

#include "backward.h"
#include "handler.h"
#include "kernels.h"
#include "layer.h"
#include "loss_rows.h"
#include "packed.h"
#include "parallel.h"
#include "tiles.h"

namespace xla_ops {
namespace {

template <typename T, typename I>
float value(ffi::ThreadPool& pool, const Layer<T, I>& layer, const Tiles& tiles, const Packed<T>& packed,
            const LossRows& start) {
  const Shape& s = layer.shape;
  const LabelRanges ranges(s, std::max<int64_t>(1, std::min(pool.num_threads(), ceil_div(s.labels, kBlock))));
  std::vector<LossRows> sums(ranges.count, start);
  parallel_for(pool, ranges.count, [&](int64_t r) {
    alignas(64) float rows[kBlock * kTile];
    LabelChunk<T, I> chunk(layer, packed, kBlock);
    for (int64_t label = ranges.begin(r); label < ranges.end(r); label += kBlock) {
      const int64_t n = std::min(kBlock, ranges.end(r) - label);
      chunk.start(label, n);
      for (int64_t t = 0; t < tiles.count; ++t) sums[r](chunk, tiles[t], label, n, rows);
    }
  });
  return mean_loss(sums, s);
}

template <typename T, typename I>
float gradients(ffi::ThreadPool& pool, const Layer<T, I>& layer, const Tiles& tiles, const Packed<T>& packed,
                const LossRows& start, T* d_x, T* d_kernel, T* d_bias) {
  expect_writes(d_kernel, layer.shape.labels * layer.shape.fan_in * sizeof(T));
  const auto sums = backward(
      pool, layer, tiles, packed, [&] { return start; },
      [&] { return Gradients<T>(layer.shape, d_kernel, d_bias); }, d_x);
  return mean_loss(sums, layer.shape);
}

// Returns fn(layer, tiles, packed, rows) for the types of a call.
template <typename Fn>
float run(ffi::ThreadPool& pool, const FanInLossValue& call, const Fn& fn) {
  return dispatch(call, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    const Shape& s = call.shape;
    const Tiles tiles(s.batch, s.in_features);
    const Packed<T> packed(pool, tiles, inputs_of<T>(call));
    const auto sorted = by_label(data<int32_t>(call.positives), s.batch, call.positives_width(), s.labels);
    const LossRows rows(s, static_cast<Loss>(call.loss), sorted);
    return fn(layer_of<T, I>(call), tiles, packed, rows);
  });
}

void run_value(ffi::ThreadPool& pool, const FanInLossValue& call) {
  *data<float>(call.mean) =
      run(pool, call, [&](const auto& layer, const auto&... rest) { return value(pool, layer, rest...); });
}

void run_gradients(ffi::ThreadPool& pool, const FanInLossGradients& call) {
  *data<float>(call.mean) = run(pool, call, [&](const auto& layer, const auto&... rest) {
    using T = typename std::decay_t<decltype(layer)>::Value;
    return gradients(pool, layer, rest..., optional_data<T>(call.d_x), data<T>(call.d_kernel),
                     optional_data<T>(call.d_bias));
  });
}

}  // namespace

XLA_OPS_DEFINE_HANDLER(fan_in_loss_value, run_value);
XLA_OPS_DEFINE_HANDLER(fan_in_loss_gradients, run_gradients);

}  // namespace xla_ops
