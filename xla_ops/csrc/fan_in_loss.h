// The handlers of fan_in_loss, which each platform defines, and their operands.

#ifndef XLA_OPS_CSRC_FAN_IN_LOSS_H_
#define XLA_OPS_CSRC_FAN_IN_LOSS_H_

#include <string>

#include "fan_in_layer.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_loss_value);
XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_loss_gradients);

struct FanInLossValue : BiasedLayerCall {
  ffi::AnyBuffer positives = argument();                  // [B, P] int32
  int64_t loss = attribute<int64_t>("loss");              // a value of Loss
  int64_t num_labels = attribute<int64_t>("num_labels");  // that the loss is a mean over
  ffi::AnyBuffer mean = result();                         // [] float32, the loss

  using BiasedLayerCall::BiasedLayerCall;

  int64_t positives_width() const { return positives.dimensions()[1]; }

  void check() {
    BiasedLayerCall::check();
    shape.mean_labels = num_labels;
    const int64_t width = positives.dimensions().size() == 2 ? positives_width() : 0;
    check_buffer("positives", positives, ffi::S32, {shape.batch, width});
    if (loss != 0 && loss != 1) throw InvalidCall("loss must be 0 or 1, got " + std::to_string(loss));
    check_buffer("loss", mean, ffi::F32, {});
  }
};

struct FanInLossGradients : FanInLossValue {
  ffi::AnyBuffer d_x = result();       // [B, D], or [0, 0] for none
  ffi::AnyBuffer d_kernel = result();  // [L, F]
  ffi::AnyBuffer d_bias = result();    // of the shape of bias

  using FanInLossValue::FanInLossValue;

  void check() {
    FanInLossValue::check();
    check_d_x(d_x);
    check_buffer("d_kernel", d_kernel, type(), {shape.labels, shape.fan_in});
    check_buffer("d_bias", d_bias, type(), {bias.dimensions()[0]});
  }
};

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_FAN_IN_LOSS_H_
