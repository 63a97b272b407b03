// The loss of a fixed fan-in output layer against sparse positives, and all of its gradients, in one sweep over the
// labels: the logits of all labels never exist.

#include "fan_in_loss.h"

#include <algorithm>

#include "backward.h"
#include "handler.h"
#include "kernels.h"
#include "loss_rows.h"
#include "packed.h"
#include "parallel.h"

namespace xla_ops {
namespace {

template <typename T, typename I>
float value(ffi::ThreadPool& pool, const Layer<T, I>& layer, const Tiles& tiles, const LossRows<T, I>& start) {
  const Shape& s = layer.shape;
  const Parts parts(s, std::max<int64_t>(1, std::min(pool.num_threads(), ceil_div(s.labels, kBlock))));
  std::vector<LossRows<T, I>> sums(parts.count, start);
  parallel_for(pool, parts.count, [&](int64_t p) {
    alignas(64) float rows[kBlock * kTile];
    for (int64_t label = parts.begin(p); label < parts.end(p); label += kBlock) {
      for (int64_t t = 0; t < tiles.count; ++t) sums[p](tiles[t], label, std::min(kBlock, parts.end(p) - label), rows);
    }
  });
  return mean_loss(sums, s);
}

template <typename T, typename I>
float gradients(ffi::ThreadPool& pool, const Layer<T, I>& layer, const Tiles& tiles, const T* packed,
                const LossRows<T, I>& start, T* d_x, T* d_kernel, T* d_bias) {
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
ffi::Error impl(ffi::ThreadPool& pool, ffi::AnyBuffer& x, ffi::AnyBuffer& kernel, ffi::AnyBuffer& indices,
                ffi::AnyBuffer& bias, ffi::AnyBuffer& positives, int64_t loss, ffi::AnyBuffer& mean,
                GradientBuffers* d) {
  Shape s;
  XLA_OPS_RETURN_IF_ERROR(read_layer(x, kernel, indices, bias, &s));
  XLA_OPS_RETURN_IF_ERROR(check_loss(s, positives, loss, mean));
  if (d) {
    XLA_OPS_RETURN_IF_ERROR(check("d_x", d->x, x.element_type(), {s.batch, s.in_features}));
    XLA_OPS_RETURN_IF_ERROR(check("d_kernel", d->kernel, x.element_type(), {s.labels, s.fan_in}));
    XLA_OPS_RETURN_IF_ERROR(check("d_bias", d->bias, x.element_type(), {bias.dimensions()[0]}));
  }
  return dispatch(x, indices, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    const Layer<T, I> layer{s, data<T>(kernel), data<I>(indices), optional_data<T>(bias)};
    const Tiles tiles(s.batch, s.in_features);
    const Buffer<T> packed = pack(pool, tiles, data<T>(x));
    const auto sorted = by_label(data<int32_t>(positives), s.batch, positives.dimensions()[1], s.labels);
    const LossRows<T, I> rows(layer, static_cast<Loss>(loss), packed.get(), sorted);
    *data<float>(mean) = d ? gradients(pool, layer, tiles, packed.get(), rows, data<T>(d->x), data<T>(d->kernel),
                                       optional_data<T>(d->bias))
                           : value(pool, layer, tiles, rows);
  });
}

ffi::Error value_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer indices,
                      ffi::AnyBuffer bias, ffi::AnyBuffer positives, int64_t loss, ffi::Result<ffi::AnyBuffer> mean) {
  return impl(pool, x, kernel, indices, bias, positives, loss, *mean, nullptr);
}

ffi::Error gradients_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer indices,
                          ffi::AnyBuffer bias, ffi::AnyBuffer positives, int64_t loss,
                          ffi::Result<ffi::AnyBuffer> mean, ffi::Result<ffi::AnyBuffer> d_x,
                          ffi::Result<ffi::AnyBuffer> d_kernel, ffi::Result<ffi::AnyBuffer> d_bias) {
  GradientBuffers d{*d_x, *d_kernel, *d_bias};
  return impl(pool, x, kernel, indices, bias, positives, loss, *mean, &d);
}

}  // namespace

#define XLA_OPS_LOSS_ARGUMENTS                   \
  ffi::Ffi::Bind()                               \
      .Ctx<ffi::ThreadPool>()                    \
      .Arg<ffi::AnyBuffer>() /* x [B, D] */      \
      .Arg<ffi::AnyBuffer>() /* kernel [L, F] */ \
      .Arg<ffi::AnyBuffer>() /* indices [L, F] */ \
      .Arg<ffi::AnyBuffer>() /* bias [L], or [0] for none */ \
      .Arg<ffi::AnyBuffer>() /* positives [B, P] */ \
      .Attr<int64_t>("loss") /* 0: squared hinge, 1: binary cross-entropy */ \
      .Ret<ffi::AnyBuffer>() /* loss [] float32 */

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_loss_value, value_impl, XLA_OPS_LOSS_ARGUMENTS);

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_loss_gradients, gradients_impl,
                              XLA_OPS_LOSS_ARGUMENTS.Ret<ffi::AnyBuffer>()  // d_x [B, D]
                                  .Ret<ffi::AnyBuffer>()                    // d_kernel [L, F]
                                  .Ret<ffi::AnyBuffer>());                  // d_bias [L], or [0]

}  // namespace xla_ops
