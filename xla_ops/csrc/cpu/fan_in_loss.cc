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
float value(ffi::ThreadPool& pool, const LossPass<T, I>& pass) {
  const Shape& s = pass.layer.shape;
  const LabelRanges ranges(s, std::max<int64_t>(1, std::min(pool.num_threads(), ceil_div(s.labels, kBlock))));
  std::vector<LossRows> sums(ranges.count, pass.rows);
  parallel_for(pool, ranges.count, [&](int64_t r) {
    alignas(64) float rows[kBlock * kTile];
    LabelChunk<T, I> chunk(pass.layer, pass.packed, kBlock);
    for (int64_t label = ranges.begin(r); label < ranges.end(r); label += kBlock) {
      const int64_t n = std::min(kBlock, ranges.end(r) - label);
      chunk.start(label, n);
      for (int64_t t = 0; t < pass.tiles.count; ++t) sums[r](chunk, pass.tiles[t], label, n, rows);
    }
  });
  return mean_loss(sums, s);
}

template <typename T, typename I>
float gradients(ffi::ThreadPool& pool, const LossPass<T, I>& pass, T* d_x, T* d_kernel, T* d_bias) {
  const Shape& s = pass.layer.shape;
  expect_writes(d_kernel, s.labels * s.fan_in * sizeof(T));
  const auto sums = backward(
      pool, pass.layer, pass.tiles, pass.packed, [&] { return pass.rows; },
      [&] { return Gradients<T>(s, d_kernel, d_bias); }, d_x);
  return mean_loss(sums, s);
}

void run_value(ffi::ThreadPool& pool, const FanInLossValue& call) {
  *data<float>(call.mean) = dispatch(call, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    return value(pool, LossPass<T, I>(pool, call));
  });
}

void run_gradients(ffi::ThreadPool& pool, const FanInLossGradients& call) {
  *data<float>(call.mean) = dispatch(call, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    return gradients(pool, LossPass<T, I>(pool, call), optional_data<T>(call.d_x), data<T>(call.d_kernel),
                     optional_data<T>(call.d_bias));
  });
}

}  // namespace

XLA_OPS_DEFINE_HANDLER(fan_in_loss_value, run_value);
XLA_OPS_DEFINE_HANDLER(fan_in_loss_gradients, run_gradients);

}  // namespace xla_ops
