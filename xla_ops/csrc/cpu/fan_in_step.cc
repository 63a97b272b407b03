// A whole training step of a fixed fan-in output layer in one sweep over the labels: loss, gradient of the
// input, and the update of kernel, bias and moments where they are. The kernel's gradient exists for one
// chunk of labels at a time.

#include "../fan_in_step.h"

#include <algorithm>

#include "backward.h"
#include "handler.h"
#include "kernels.h"
#include "layer.h"
#include "loss_rows.h"
#include "memory.h"
#include "packed.h"
#include "parallel.h"
#include "tiles.h"

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
    if (!sums_) sums_ = allocate<float>(labels * fan_in_);  // no later chunk is longer than the first
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
void step(ffi::ThreadPool& pool, const FanInStep& call, const Weights& kernel, const Weights& bias) {
  const LossPass<T, I> pass(pool, call);
  const auto sums = backward(
      pool, pass.layer, pass.tiles, pass.packed, [&] { return pass.rows; },
      [&] { return Update<Weights>(call.shape, kernel, bias); }, optional_data<T>(call.d_x));
  *data<float>(call.mean) = mean_loss(sums, call.shape);
}

void run_adam(ffi::ThreadPool& pool, const FanInStepAdam& call) {
  const float* rates = data<float>(call.rates);
  const AdamStep adam{rates[0], call.b1, call.b2, call.epsilon, rates[1], rates[2]};
  const AdamWeights kernel{data<float>(call.kernel), data<float>(call.mu_kernel), data<float>(call.nu_kernel),
                           adam};
  const AdamWeights bias{optional_data<float>(call.bias), data<float>(call.mu_bias),
                         data<float>(call.nu_bias), adam};
  dispatch_indices(call.indices, [&](auto* i) {
    using I = std::remove_pointer_t<decltype(i)>;
    step<float, I>(pool, call, kernel, bias);
  });
}

void run_sgd(ffi::ThreadPool& pool, const FanInStepSgd& call) {
  const uint32_t* key = data<uint32_t>(call.key);
  const RoundingKey rounding{{key[0], key[1]}, key[2]};
  const int64_t first_label = key[3];
  const float rate = *data<float>(call.learning_rate);
  const Shape& s = call.shape;
  dispatch(call, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    const SgdWeights<T> kernel{data<T>(call.kernel), rate, rounding, first_label * s.fan_in};
    const SgdWeights<T> bias{optional_data<T>(call.bias), rate, rounding,
                             s.mean_labels * s.fan_in + first_label};
    step<T, I>(pool, call, kernel, bias);
  });
}

}  // namespace

XLA_OPS_DEFINE_HANDLER(fan_in_step_adam, run_adam);
XLA_OPS_DEFINE_HANDLER(fan_in_step_sgd, run_sgd);

}  // namespace xla_ops
