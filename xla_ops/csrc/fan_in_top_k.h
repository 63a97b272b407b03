// The handler of fan_in_top_k, which each platform defines: its operands and results, and the checks of
// those.

#ifndef XLA_OPS_CSRC_FAN_IN_TOP_K_H_
#define XLA_OPS_CSRC_FAN_IN_TOP_K_H_

#include <utility>

#include "handler.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_top_k);

// `context` holds what a platform's handler takes before the operands.
template <typename Context>
auto bind_fan_in_top_k(Context&& context) {
  return bind_inputs(std::move(context))
      .template Arg<ffi::AnyBuffer>()   // kernel [L, F]
      .template Arg<ffi::AnyBuffer>()   // indices [L, F]
      .template Arg<ffi::AnyBuffer>()   // bias [L], or [0] for none
      .template Ret<ffi::AnyBuffer>()   // scores [B, k] float32
      .template Ret<ffi::AnyBuffer>();  // labels [B, k] int32
}

inline ffi::Error check_fan_in_top_k(const InputBuffers& in, const ffi::AnyBuffer& kernel,
                                     const ffi::AnyBuffer& indices, const ffi::AnyBuffer& bias,
                                     const ffi::AnyBuffer& scores, const ffi::AnyBuffer& labels, Shape* s,
                                     int64_t* k) {
  XLA_OPS_RETURN_IF_ERROR(read_layer(in, kernel, indices, bias, s));
  *k = scores.dimensions().size() == 2 ? scores.dimensions()[1] : 0;
  XLA_OPS_RETURN_IF_ERROR(check("scores", scores, ffi::F32, {s->batch, *k}));
  return check("labels", labels, ffi::S32, {s->batch, *k});
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_FAN_IN_TOP_K_H_
