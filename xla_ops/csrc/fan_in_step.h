// The handlers of fan_in_step, which each platform defines, and their operands.

#ifndef XLA_OPS_CSRC_FAN_IN_STEP_H_
#define XLA_OPS_CSRC_FAN_IN_STEP_H_

#include "fan_in_loss.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_step_adam);
XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_step_sgd);

// The operands of both steps.
struct FanInStep : FanInLossValue {
  ffi::AnyBuffer d_x = result();         // [B, D], or [0, 0] for none
  ffi::AnyBuffer new_kernel = result();  // this and all results below: the argument, updated in place
  ffi::AnyBuffer new_bias = result();

  using FanInLossValue::FanInLossValue;

  void check() {
    FanInLossValue::check();
    check_d_x(d_x);
    check_aliased("kernel", kernel, new_kernel);
    check_aliased("bias", bias, new_bias);
  }
};

struct FanInStepAdam : FanInStep {
  ffi::AnyBuffer mu_kernel = argument();  // [L, F], first moment
  ffi::AnyBuffer nu_kernel = argument();  // [L, F], second moment
  ffi::AnyBuffer mu_bias = argument();    // of the shape of bias
  ffi::AnyBuffer nu_bias = argument();    // of the shape of bias
  ffi::AnyBuffer rates = argument();      // learning rate, 1 / (1 - b1^t), 1 / (1 - b2^t)
  float b1 = attribute<float>("b1");
  float b2 = attribute<float>("b2");
  float epsilon = attribute<float>("epsilon");
  ffi::AnyBuffer new_mu_kernel = result();
  ffi::AnyBuffer new_nu_kernel = result();
  ffi::AnyBuffer new_mu_bias = result();
  ffi::AnyBuffer new_nu_bias = result();

  using FanInStep::FanInStep;

  void check() {
    FanInStep::check();
    const int64_t biases = bias.dimensions()[0];
    check_buffer("kernel", kernel, ffi::F32, {shape.labels, shape.fan_in});
    check_buffer("mu_kernel", mu_kernel, ffi::F32, {shape.labels, shape.fan_in});
    check_buffer("nu_kernel", nu_kernel, ffi::F32, {shape.labels, shape.fan_in});
    check_buffer("mu_bias", mu_bias, ffi::F32, {biases});
    check_buffer("nu_bias", nu_bias, ffi::F32, {biases});
    check_buffer("rates", rates, ffi::F32, {3});
    check_aliased("mu_kernel", mu_kernel, new_mu_kernel);
    check_aliased("nu_kernel", nu_kernel, new_nu_kernel);
    check_aliased("mu_bias", mu_bias, new_mu_bias);
    check_aliased("nu_bias", nu_bias, new_nu_bias);
  }
};

struct FanInStepSgd : FanInStep {
  ffi::AnyBuffer learning_rate = argument();  // [] float32
  ffi::AnyBuffer key = argument();            // [4] uint32: seed (two words), step, and the first label

  using FanInStep::FanInStep;

  void check() {
    FanInStep::check();
    check_buffer("learning_rate", learning_rate, ffi::F32, {});
    check_buffer("key", key, ffi::U32, {4});
  }
};

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_FAN_IN_STEP_H_
