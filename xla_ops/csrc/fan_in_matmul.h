// The handlers of fan_in_matmul, which each platform defines: their operands and results, and the checks of
// those.

#ifndef XLA_OPS_CSRC_FAN_IN_MATMUL_H_
#define XLA_OPS_CSRC_FAN_IN_MATMUL_H_

#include <utility>

#include "handler.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_matmul_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_matmul_gradients);

// `context` holds what a platform's handler takes before the operands.
template <typename Context>
auto bind_fan_in_matmul_forward(Context&& context) {
  return bind_inputs(std::move(context))
      .template Arg<ffi::AnyBuffer>()   // kernel [L, F]
      .template Arg<ffi::AnyBuffer>()   // indices [L, F]
      .template Arg<ffi::AnyBuffer>()   // bias [L], or [0] for none
      .template Ret<ffi::AnyBuffer>();  // y [B, L]
}

inline ffi::Error check_fan_in_matmul_forward(const InputBuffers& in, const ffi::AnyBuffer& kernel,
                                              const ffi::AnyBuffer& indices, const ffi::AnyBuffer& bias,
                                              const ffi::AnyBuffer& y, Shape* s) {
  XLA_OPS_RETURN_IF_ERROR(read_layer(in, kernel, indices, bias, s));
  return check("y", y, in.x.element_type(), {s->batch, s->labels});
}

template <typename Context>
auto bind_fan_in_matmul_gradients(Context&& context) {
  return bind_inputs(std::move(context))
      .template Arg<ffi::AnyBuffer>()   // kernel [L, F]
      .template Arg<ffi::AnyBuffer>()   // indices [L, F]
      .template Arg<ffi::AnyBuffer>()   // dy [B, L]
      .template Ret<ffi::AnyBuffer>()   // d_x [B, D], or [0, 0] for none
      .template Ret<ffi::AnyBuffer>()   // d_kernel [L, F]
      .template Ret<ffi::AnyBuffer>();  // d_bias [L], or [0] for none
}

inline ffi::Error check_fan_in_matmul_gradients(const InputBuffers& in, const ffi::AnyBuffer& kernel,
                                                const ffi::AnyBuffer& indices, const ffi::AnyBuffer& dy,
                                                const ffi::AnyBuffer& d_x, const ffi::AnyBuffer& d_kernel,
                                                const ffi::AnyBuffer& d_bias, Shape* s) {
  XLA_OPS_RETURN_IF_ERROR(read_layer(in, kernel, indices, d_bias, s));
  XLA_OPS_RETURN_IF_ERROR(check("dy", dy, in.x.element_type(), {s->batch, s->labels}));
  XLA_OPS_RETURN_IF_ERROR(check_d_x(d_x, in.x.element_type(), *s));
  return check("d_kernel", d_kernel, in.x.element_type(), {s->labels, s->fan_in});
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_FAN_IN_MATMUL_H_
