// The handlers of fan_in_step, which each platform defines: their operands and results, and the checks of
// those.

#ifndef XLA_OPS_CSRC_FAN_IN_STEP_H_
#define XLA_OPS_CSRC_FAN_IN_STEP_H_

#include <utility>

#include "handler.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_step_adam);
XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_step_sgd);

// `context` holds what a platform's handler takes before the operands.
template <typename Context>
auto bind_fan_in_step_adam(Context&& context) {
  return bind_inputs(std::move(context))
      .template Arg<ffi::AnyBuffer>()        // kernel [L, F]
      .template Arg<ffi::AnyBuffer>()        // indices [L, F]
      .template Arg<ffi::AnyBuffer>()        // bias [L], or [0] for none
      .template Arg<ffi::AnyBuffer>()        // positives [B, P]
      .template Arg<ffi::AnyBuffer>()        // first moment of the kernel [L, F]
      .template Arg<ffi::AnyBuffer>()        // second moment of the kernel [L, F]
      .template Arg<ffi::AnyBuffer>()        // first moment of the bias, of its shape
      .template Arg<ffi::AnyBuffer>()        // second moment of the bias, of its shape
      .template Arg<ffi::AnyBuffer>()        // rates: learning rate, 1 / (1 - b1^t), 1 / (1 - b2^t)
      .template Attr<int64_t>("loss")        // 0: squared hinge, 1: binary cross-entropy
      .template Attr<int64_t>("num_labels")  // that the loss is a mean over
      .template Attr<float>("b1")
      .template Attr<float>("b2")
      .template Attr<float>("epsilon")
      .template Ret<ffi::AnyBuffer>()   // loss []
      .template Ret<ffi::AnyBuffer>()   // d_x [B, D], or [0, 0] for none
      .template Ret<ffi::AnyBuffer>()   // kernel, and so on: the arguments, updated in place
      .template Ret<ffi::AnyBuffer>()   // bias
      .template Ret<ffi::AnyBuffer>()   // first moment of the kernel
      .template Ret<ffi::AnyBuffer>()   // second moment of the kernel
      .template Ret<ffi::AnyBuffer>()   // first moment of the bias
      .template Ret<ffi::AnyBuffer>();  // second moment of the bias
}

template <typename Context>
auto bind_fan_in_step_sgd(Context&& context) {
  return bind_inputs(std::move(context))
      .template Arg<ffi::AnyBuffer>()        // kernel [L, F]
      .template Arg<ffi::AnyBuffer>()        // indices [L, F]
      .template Arg<ffi::AnyBuffer>()        // bias [L], or [0] for none
      .template Arg<ffi::AnyBuffer>()        // positives [B, P]
      .template Arg<ffi::AnyBuffer>()        // learning rate [] float32
      .template Arg<ffi::AnyBuffer>()        // key: seed (two words), step, and the first label [4] uint32
      .template Attr<int64_t>("loss")        // 0: squared hinge, 1: binary cross-entropy
      .template Attr<int64_t>("num_labels")  // that the loss is a mean over
      .template Ret<ffi::AnyBuffer>()        // loss []
      .template Ret<ffi::AnyBuffer>()        // d_x [B, D], or [0, 0] for none
      .template Ret<ffi::AnyBuffer>()        // kernel, updated in place
      .template Ret<ffi::AnyBuffer>();       // bias, updated in place
}

// What both steps take and return.
struct StepBuffers {
  const InputBuffers& in;
  ffi::AnyBuffer &kernel, &indices, &bias, &positives;
  int64_t loss, num_labels;
  ffi::AnyBuffer &mean, &d_x, &new_kernel, &new_bias;
};

inline ffi::Error check_fan_in_step(const StepBuffers& b, Shape* s) {
  XLA_OPS_RETURN_IF_ERROR(read_layer(b.in, b.kernel, b.indices, b.bias, s));
  XLA_OPS_RETURN_IF_ERROR(check_loss(b.positives, b.loss, b.num_labels, b.mean, s));
  XLA_OPS_RETURN_IF_ERROR(check_d_x(b.d_x, b.in.x.element_type(), *s));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("kernel", b.kernel, b.new_kernel));
  return check_aliased("bias", b.bias, b.new_bias);
}

// What Adam takes and returns besides.
struct AdamBuffers {
  ffi::AnyBuffer &mu_kernel, &nu_kernel, &mu_bias, &nu_bias, &rates;
  ffi::AnyBuffer &new_mu_kernel, &new_nu_kernel, &new_mu_bias, &new_nu_bias;
};

inline ffi::Error check_fan_in_step_adam(const StepBuffers& b, const AdamBuffers& adam, Shape* s) {
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_step(b, s));
  const int64_t biases = b.bias.dimensions()[0];
  XLA_OPS_RETURN_IF_ERROR(check("kernel", b.kernel, ffi::F32, {s->labels, s->fan_in}));
  XLA_OPS_RETURN_IF_ERROR(check("mu_kernel", adam.mu_kernel, ffi::F32, {s->labels, s->fan_in}));
  XLA_OPS_RETURN_IF_ERROR(check("nu_kernel", adam.nu_kernel, ffi::F32, {s->labels, s->fan_in}));
  XLA_OPS_RETURN_IF_ERROR(check("mu_bias", adam.mu_bias, ffi::F32, {biases}));
  XLA_OPS_RETURN_IF_ERROR(check("nu_bias", adam.nu_bias, ffi::F32, {biases}));
  XLA_OPS_RETURN_IF_ERROR(check("rates", adam.rates, ffi::F32, {3}));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("mu_kernel", adam.mu_kernel, adam.new_mu_kernel));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("nu_kernel", adam.nu_kernel, adam.new_nu_kernel));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("mu_bias", adam.mu_bias, adam.new_mu_bias));
  return check_aliased("nu_bias", adam.nu_bias, adam.new_nu_bias);
}

inline ffi::Error check_fan_in_step_sgd(const StepBuffers& b, const ffi::AnyBuffer& learning_rate,
                                        const ffi::AnyBuffer& key, Shape* s) {
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_step(b, s));
  XLA_OPS_RETURN_IF_ERROR(check("learning_rate", learning_rate, ffi::F32, {}));
  return check("key", key, ffi::U32, {4});
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_FAN_IN_STEP_H_
