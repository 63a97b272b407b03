// The handlers of fan_in_loss, which each platform defines: their operands and results, and the checks of
// those.

#ifndef XLA_OPS_CSRC_FAN_IN_LOSS_H_
#define XLA_OPS_CSRC_FAN_IN_LOSS_H_

#include <utility>

#include "handler.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_loss_value);
XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_loss_gradients);

// `context` holds what a platform's handler takes before the operands.
template <typename Context>
auto bind_fan_in_loss_value(Context&& context) {
  return bind_inputs(std::move(context))
      .template Arg<ffi::AnyBuffer>()        // kernel [L, F]
      .template Arg<ffi::AnyBuffer>()        // indices [L, F]
      .template Arg<ffi::AnyBuffer>()        // bias [L], or [0] for none
      .template Arg<ffi::AnyBuffer>()        // positives [B, P]
      .template Attr<int64_t>("loss")        // 0: squared hinge, 1: binary cross-entropy
      .template Attr<int64_t>("num_labels")  // that the loss is a mean over
      .template Ret<ffi::AnyBuffer>();       // loss [] float32
}

template <typename Context>
auto bind_fan_in_loss_gradients(Context&& context) {
  return bind_fan_in_loss_value(std::move(context))
      .template Ret<ffi::AnyBuffer>()   // d_x [B, D], or [0, 0] for none
      .template Ret<ffi::AnyBuffer>()   // d_kernel [L, F]
      .template Ret<ffi::AnyBuffer>();  // d_bias [L], or [0]
}

inline ffi::Error check_fan_in_loss_value(const InputBuffers& in, const ffi::AnyBuffer& kernel,
                                          const ffi::AnyBuffer& indices, const ffi::AnyBuffer& bias,
                                          const ffi::AnyBuffer& positives, int64_t loss, int64_t num_labels,
                                          const ffi::AnyBuffer& mean, Shape* s) {
  XLA_OPS_RETURN_IF_ERROR(read_layer(in, kernel, indices, bias, s));
  return check_loss(positives, loss, num_labels, mean, s);
}

inline ffi::Error check_fan_in_loss_gradients(const Shape& s, const ffi::AnyBuffer& bias,
                                              const ffi::AnyBuffer& d_x, const ffi::AnyBuffer& d_kernel,
                                              const ffi::AnyBuffer& d_bias) {
  const ffi::DataType type = bias.element_type();
  XLA_OPS_RETURN_IF_ERROR(check_d_x(d_x, type, s));
  XLA_OPS_RETURN_IF_ERROR(check("d_kernel", d_kernel, type, {s.labels, s.fan_in}));
  return check("d_bias", d_bias, type, {bias.dimensions()[0]});
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_FAN_IN_LOSS_H_
