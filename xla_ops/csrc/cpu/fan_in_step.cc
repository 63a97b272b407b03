// A whole training step of a fixed fan-in output layer in one sweep over the labels: loss, gradient of the input, and
// the update of kernel, bias and moments where they are. The kernel's gradient exists for one run of labels at a time.

#include "fan_in_step.h"

#include <algorithm>

#include "backward.h"
#include "handler.h"
#include "kernels.h"
#include "loss_rows.h"
#include "packed.h"
#include "parallel.h"

namespace xla_ops {
namespace {

// Weights that Adam updates.
struct AdamWeights {
  float *w, *mu, *nu;
  const AdamStep& step;

  void update(int64_t first, int64_t count, const float* gradient) const {
    update_kernels().adam(gradient, count, step, w + first, mu + first, nu + first);
  }
};

// Weights that SGD updates; bfloat16 ones are rounded stochastically.
template <typename T>
struct SgdWeights {
  T* w;
  float learning_rate;
  const RoundingKey& key;
  int64_t position;  // of w[0] among all weights of the layer

  void update(int64_t first, int64_t count, const float* gradient) const {
    if constexpr (std::is_same_v<T, float>) {
      update_kernels().sgd_f32(gradient, count, learning_rate, w + first);
    } else {
      update_kernels().sgd_bf16(gradient, count, learning_rate, key, position + first, w + first);
    }
  }
};

// The sink that applies gradients.
template <typename Weights>
class Update {
 public:
  Update(const Shape& s, const Weights& kernel, const Weights& bias) : fan_in_(s.fan_in), kernel_(kernel), bias_(bias) {}

  float* kernel_sums(int64_t, int64_t labels) {
    if (!sums_) sums_ = allocate<float>(labels * fan_in_);  // no later run is longer than the first
    return sums_.get();
  }
  void take(int64_t first, int64_t labels, const float* d_kernel, const float* d_bias) {
    kernel_.update(first * fan_in_, labels * fan_in_, d_kernel);
    if (bias_.w) bias_.update(first, labels, d_bias);
  }

 private:
  const int64_t fan_in_;
  const Weights kernel_, bias_;
  Buffer<float> sums_;
};

struct Arguments {
  ffi::AnyBuffer &x, &kernel, &indices, &bias, &positives;
  int64_t loss;
  ffi::AnyBuffer &mean, &d_x;
};

ffi::Error check_step(const Arguments& a, Shape* s) {
  XLA_OPS_RETURN_IF_ERROR(read_layer(a.x, a.kernel, a.indices, a.bias, s));
  XLA_OPS_RETURN_IF_ERROR(check_loss(*s, a.positives, a.loss, a.mean));
  return check("d_x", a.d_x, a.x.element_type(), {s->batch, s->in_features});
}

template <typename T, typename I, typename Weights>
void step(ffi::ThreadPool& pool, const Shape& s, const Arguments& a, const Weights& kernel, const Weights& bias) {
  const Layer<T, I> layer{s, data<T>(a.kernel), data<I>(a.indices), optional_data<T>(a.bias)};
  const Tiles tiles(s.batch, s.in_features);
  const Buffer<T> packed = pack(pool, tiles, data<T>(a.x));
  const auto sorted = by_label(data<int32_t>(a.positives), s.batch, a.positives.dimensions()[1], s.labels);
  const auto sums = backward(
      pool, layer, tiles, packed.get(),
      [&] { return LossRows<T, I>(layer, static_cast<Loss>(a.loss), packed.get(), sorted); },
      [&] { return Update<Weights>(s, kernel, bias); }, data<T>(a.d_x));
  *data<float>(a.mean) = mean_loss(sums, s);
}

ffi::Error adam_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer indices,
                     ffi::AnyBuffer bias, ffi::AnyBuffer positives, ffi::AnyBuffer mu_kernel,
                     ffi::AnyBuffer nu_kernel, ffi::AnyBuffer mu_bias, ffi::AnyBuffer nu_bias, ffi::AnyBuffer rates,
                     int64_t loss, float b1, float b2, float epsilon, ffi::Result<ffi::AnyBuffer> mean,
                     ffi::Result<ffi::AnyBuffer> d_x, ffi::Result<ffi::AnyBuffer> new_kernel,
                     ffi::Result<ffi::AnyBuffer> new_bias, ffi::Result<ffi::AnyBuffer> new_mu_kernel,
                     ffi::Result<ffi::AnyBuffer> new_nu_kernel, ffi::Result<ffi::AnyBuffer> new_mu_bias,
                     ffi::Result<ffi::AnyBuffer> new_nu_bias) {
  const Arguments arguments{x, kernel, indices, bias, positives, loss, *mean, *d_x};
  Shape s;
  XLA_OPS_RETURN_IF_ERROR(check_step(arguments, &s));
  XLA_OPS_RETURN_IF_ERROR(check("kernel", kernel, ffi::F32, {s.labels, s.fan_in}));
  const int64_t biases = bias.dimensions()[0];
  XLA_OPS_RETURN_IF_ERROR(check("mu_kernel", mu_kernel, ffi::F32, {s.labels, s.fan_in}));
  XLA_OPS_RETURN_IF_ERROR(check("nu_kernel", nu_kernel, ffi::F32, {s.labels, s.fan_in}));
  XLA_OPS_RETURN_IF_ERROR(check("mu_bias", mu_bias, ffi::F32, {biases}));
  XLA_OPS_RETURN_IF_ERROR(check("nu_bias", nu_bias, ffi::F32, {biases}));
  XLA_OPS_RETURN_IF_ERROR(check("rates", rates, ffi::F32, {3}));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("kernel", kernel, *new_kernel));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("bias", bias, *new_bias));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("mu_kernel", mu_kernel, *new_mu_kernel));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("nu_kernel", nu_kernel, *new_nu_kernel));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("mu_bias", mu_bias, *new_mu_bias));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("nu_bias", nu_bias, *new_nu_bias));
  const float* r = data<float>(rates);
  const AdamStep adam{r[0], b1, b2, epsilon, r[1], r[2]};
  return dispatch(x, indices, [&](auto* t, auto* i) {
    using I = std::remove_pointer_t<decltype(i)>;
    // Only float32 gets here; the other branch would not compile.
    if constexpr (std::is_same_v<decltype(t), float*>) {
      const AdamWeights kernel_weights{data<float>(kernel), data<float>(mu_kernel), data<float>(nu_kernel), adam};
      const AdamWeights bias_weights{optional_data<float>(bias), data<float>(mu_bias), data<float>(nu_bias), adam};
      step<float, I>(pool, s, arguments, kernel_weights, bias_weights);
    }
  });
}

ffi::Error sgd_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer indices,
                    ffi::AnyBuffer bias, ffi::AnyBuffer positives, ffi::AnyBuffer learning_rate, ffi::AnyBuffer key,
                    int64_t loss, ffi::Result<ffi::AnyBuffer> mean, ffi::Result<ffi::AnyBuffer> d_x,
                    ffi::Result<ffi::AnyBuffer> new_kernel, ffi::Result<ffi::AnyBuffer> new_bias) {
  const Arguments arguments{x, kernel, indices, bias, positives, loss, *mean, *d_x};
  Shape s;
  XLA_OPS_RETURN_IF_ERROR(check_step(arguments, &s));
  XLA_OPS_RETURN_IF_ERROR(check("learning_rate", learning_rate, ffi::F32, {}));
  XLA_OPS_RETURN_IF_ERROR(check("key", key, ffi::U32, {3}));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("kernel", kernel, *new_kernel));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("bias", bias, *new_bias));
  const uint32_t* k = data<uint32_t>(key);
  const RoundingKey rounding{{k[0], k[1]}, k[2]};
  const float rate = *data<float>(learning_rate);
  return dispatch(x, indices, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    const SgdWeights<T> kernel_weights{data<T>(kernel), rate, rounding, 0};
    const SgdWeights<T> bias_weights{optional_data<T>(bias), rate, rounding, s.labels * s.fan_in};
    step<T, I>(pool, s, arguments, kernel_weights, bias_weights);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_step_adam, adam_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x [B, D]
                                  .Arg<ffi::AnyBuffer>()  // kernel [L, F]
                                  .Arg<ffi::AnyBuffer>()  // indices [L, F]
                                  .Arg<ffi::AnyBuffer>()  // bias [L], or [0] for none
                                  .Arg<ffi::AnyBuffer>()  // positives [B, P]
                                  .Arg<ffi::AnyBuffer>()  // first moment of the kernel [L, F]
                                  .Arg<ffi::AnyBuffer>()  // second moment of the kernel [L, F]
                                  .Arg<ffi::AnyBuffer>()  // first moment of the bias, of its shape
                                  .Arg<ffi::AnyBuffer>()  // second moment of the bias, of its shape
                                  .Arg<ffi::AnyBuffer>()  // learning rate, 1 / (1 - b1^t), 1 / (1 - b2^t)
                                  .Attr<int64_t>("loss")
                                  .Attr<float>("b1")
                                  .Attr<float>("b2")
                                  .Attr<float>("epsilon")
                                  .Ret<ffi::AnyBuffer>()    // loss []
                                  .Ret<ffi::AnyBuffer>()    // d_x [B, D]
                                  .Ret<ffi::AnyBuffer>()    // kernel, and so on: the arguments, updated in place
                                  .Ret<ffi::AnyBuffer>()    // bias
                                  .Ret<ffi::AnyBuffer>()    // first moment of the kernel
                                  .Ret<ffi::AnyBuffer>()    // second moment of the kernel
                                  .Ret<ffi::AnyBuffer>()    // first moment of the bias
                                  .Ret<ffi::AnyBuffer>());  // second moment of the bias

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_step_sgd, sgd_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x [B, D]
                                  .Arg<ffi::AnyBuffer>()  // kernel [L, F]
                                  .Arg<ffi::AnyBuffer>()  // indices [L, F]
                                  .Arg<ffi::AnyBuffer>()  // bias [L], or [0] for none
                                  .Arg<ffi::AnyBuffer>()  // positives [B, P]
                                  .Arg<ffi::AnyBuffer>()  // learning rate [] float32
                                  .Arg<ffi::AnyBuffer>()  // seed (two words) and step [3] uint32
                                  .Attr<int64_t>("loss")
                                  .Ret<ffi::AnyBuffer>()    // loss []
                                  .Ret<ffi::AnyBuffer>()    // d_x [B, D]
                                  .Ret<ffi::AnyBuffer>()    // kernel, updated in place
                                  .Ret<ffi::AnyBuffer>());  // bias, updated in place

}  // namespace xla_ops
