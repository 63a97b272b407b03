// A whole training step of a fixed fan-in output layer in one sweep over the labels: loss, gradient of the
// input, and the update of kernel, bias and moments where they are. The kernel's gradient exists for one run
// of labels at a time.

#include "../fan_in_step.h"

#include <algorithm>

#include "backward.h"
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
    update_kernels().adam_f32(gradient, count, step, w + first, mu + first, nu + first);
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
  Update(const Shape& s, const Weights& kernel, const Weights& bias)
      : fan_in_(s.fan_in), kernel_(kernel), bias_(bias) {}

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

template <typename T, typename I, typename Weights>
void step(ffi::ThreadPool& pool, const Shape& s, const StepBuffers& a, const Weights& kernel,
          const Weights& bias) {
  const Layer<T, I> layer{s, data<T>(a.kernel), data<I>(a.indices), optional_data<T>(a.bias)};
  const Tiles tiles(s.batch, s.in_features);
  const Packed<T> packed(pool, tiles, inputs_of<T>(a.in));
  const auto sorted = by_label(data<int32_t>(a.positives), s.batch, a.positives.dimensions()[1], s.labels);
  const auto sums = backward(
      pool, layer, tiles, packed, [&] { return LossRows(s, static_cast<Loss>(a.loss), sorted); },
      [&] { return Update<Weights>(s, kernel, bias); }, optional_data<T>(a.d_x));
  *data<float>(a.mean) = mean_loss(sums, s);
}

ffi::Error adam_impl(ffi::ThreadPool pool, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                     ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                     ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::AnyBuffer positives,
                     ffi::AnyBuffer mu_kernel, ffi::AnyBuffer nu_kernel, ffi::AnyBuffer mu_bias,
                     ffi::AnyBuffer nu_bias, ffi::AnyBuffer rates, int64_t loss, int64_t num_labels, float b1,
                     float b2, float epsilon, ffi::Result<ffi::AnyBuffer> mean,
                     ffi::Result<ffi::AnyBuffer> d_x, ffi::Result<ffi::AnyBuffer> new_kernel,
                     ffi::Result<ffi::AnyBuffer> new_bias, ffi::Result<ffi::AnyBuffer> new_mu_kernel,
                     ffi::Result<ffi::AnyBuffer> new_nu_kernel, ffi::Result<ffi::AnyBuffer> new_mu_bias,
                     ffi::Result<ffi::AnyBuffer> new_nu_bias) {
  const InputBuffers in{x, rows, columns, values, num_columns};
  const StepBuffers buffers{in,         kernel, indices, bias,        positives, loss,
                            num_labels, *mean,  *d_x,    *new_kernel, *new_bias};
  Shape s;
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_step_adam(buffers,
                                                 {mu_kernel, nu_kernel, mu_bias, nu_bias, rates,
                                                  *new_mu_kernel, *new_nu_kernel, *new_mu_bias, *new_nu_bias},
                                                 &s));
  const float* r = data<float>(rates);
  const AdamStep adam{r[0], b1, b2, epsilon, r[1], r[2]};
  return dispatch(x, indices, [&](auto* t, auto* i) {
    using I = std::remove_pointer_t<decltype(i)>;
    // Only float32 gets here; the other branch would not compile.
    if constexpr (std::is_same_v<decltype(t), float*>) {
      const AdamWeights kernel_weights{data<float>(kernel), data<float>(mu_kernel), data<float>(nu_kernel),
                                       adam};
      const AdamWeights bias_weights{optional_data<float>(bias), data<float>(mu_bias), data<float>(nu_bias),
                                     adam};
      step<float, I>(pool, s, buffers, kernel_weights, bias_weights);
    }
  });
}

ffi::Error sgd_impl(ffi::ThreadPool pool, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                    ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                    ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::AnyBuffer positives,
                    ffi::AnyBuffer learning_rate, ffi::AnyBuffer key, int64_t loss, int64_t num_labels,
                    ffi::Result<ffi::AnyBuffer> mean, ffi::Result<ffi::AnyBuffer> d_x,
                    ffi::Result<ffi::AnyBuffer> new_kernel, ffi::Result<ffi::AnyBuffer> new_bias) {
  const InputBuffers in{x, rows, columns, values, num_columns};
  const StepBuffers buffers{in,         kernel, indices, bias,        positives, loss,
                            num_labels, *mean,  *d_x,    *new_kernel, *new_bias};
  Shape s;
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_step_sgd(buffers, learning_rate, key, &s));
  const uint32_t* k = data<uint32_t>(key);
  const RoundingKey rounding{{k[0], k[1]}, k[2]};
  const int64_t first_label = k[3];
  const float rate = *data<float>(learning_rate);
  return dispatch(x, indices, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    const SgdWeights<T> kernel_weights{data<T>(kernel), rate, rounding, first_label * s.fan_in};
    const SgdWeights<T> bias_weights{optional_data<T>(bias), rate, rounding,
                                     s.mean_labels * s.fan_in + first_label};
    step<T, I>(pool, s, buffers, kernel_weights, bias_weights);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_step_adam, adam_impl,
                              bind_fan_in_step_adam(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_step_sgd, sgd_impl,
                              bind_fan_in_step_sgd(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace xla_ops
