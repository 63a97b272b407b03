// The loss of a fixed fan-in output layer against sparse positives, and all of its gradients, in one sweep
// over the labels: the logits of all labels never exist.

#include "../fan_in_loss.h"

#include <algorithm>

#include "backward.h"
#include "kernels.h"
#include "loss_rows.h"
#include "packed.h"
#include "parallel.h"

namespace xla_ops {
namespace {

template <typename T, typename I>
float value(ffi::ThreadPool& pool, const Layer<T, I>& layer, const Tiles& tiles, const Packed<T>& packed,
            const LossRows& start) {
  const Shape& s = layer.shape;
  const Parts parts(s, std::max<int64_t>(1, std::min(pool.num_threads(), ceil_div(s.labels, kBlock))));
  std::vector<LossRows> sums(parts.count, start);
  parallel_for(pool, parts.count, [&](int64_t p) {
    alignas(64) float rows[kBlock * kTile];
    Run<T, I> run(layer, packed, kBlock);
    for (int64_t label = parts.begin(p); label < parts.end(p); label += kBlock) {
      const int64_t n = std::min(kBlock, parts.end(p) - label);
      run.start(label, n);
      for (int64_t t = 0; t < tiles.count; ++t) sums[p](run, tiles[t], label, n, rows);
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

// ---- handlers ----

struct GradientBuffers {
  ffi::AnyBuffer x, kernel, bias;
};

// Without gradients `d` is null.
ffi::Error impl(ffi::ThreadPool& pool, const InputBuffers& in, ffi::AnyBuffer& kernel,
                ffi::AnyBuffer& indices, ffi::AnyBuffer& bias, ffi::AnyBuffer& positives, int64_t loss,
                int64_t num_labels, ffi::AnyBuffer& mean, GradientBuffers* d) {
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(
      check_fan_in_loss_value(in, kernel, indices, bias, positives, loss, num_labels, mean, &s));
  if (d) XLA_OPS_RETURN_IF_ERROR(check_fan_in_loss_gradients(s, bias, d->x, d->kernel, d->bias));
  return dispatch(in.x, indices, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    const Layer<T, I> layer{s, data<T>(kernel), data<I>(indices), optional_data<T>(bias)};
    const Tiles tiles(s.batch, s.in_features);
    const Packed<T> packed(pool, tiles, inputs_of<T>(in));
    const auto sorted = by_label(data<int32_t>(positives), s.batch, positives.dimensions()[1], s.labels);
    const LossRows rows(s, static_cast<Loss>(loss), sorted);
    *data<float>(mean) = d ? gradients(pool, layer, tiles, packed, rows, optional_data<T>(d->x),
                                       data<T>(d->kernel), optional_data<T>(d->bias))
                           : value(pool, layer, tiles, packed, rows);
  });
}

ffi::Error value_impl(ffi::ThreadPool pool, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                      ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                      ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::AnyBuffer positives, int64_t loss,
                      int64_t num_labels, ffi::Result<ffi::AnyBuffer> mean) {
  return impl(pool, {x, rows, columns, values, num_columns}, kernel, indices, bias, positives, loss,
              num_labels, *mean, nullptr);
}

ffi::Error gradients_impl(ffi::ThreadPool pool, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                          ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                          ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::AnyBuffer positives, int64_t loss,
                          int64_t num_labels, ffi::Result<ffi::AnyBuffer> mean,
                          ffi::Result<ffi::AnyBuffer> d_x, ffi::Result<ffi::AnyBuffer> d_kernel,
                          ffi::Result<ffi::AnyBuffer> d_bias) {
  GradientBuffers d{*d_x, *d_kernel, *d_bias};
  return impl(pool, {x, rows, columns, values, num_columns}, kernel, indices, bias, positives, loss,
              num_labels, *mean, &d);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_loss_value, value_impl,
                              bind_fan_in_loss_value(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_loss_gradients, gradients_impl,
                              bind_fan_in_loss_gradients(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace xla_ops
