// The handler of fan_in_top_k, which each platform defines, and its operands.

#ifndef XLA_OPS_CSRC_FAN_IN_TOP_K_H_
#define XLA_OPS_CSRC_FAN_IN_TOP_K_H_

#include "fan_in_layer.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_top_k);

struct FanInTopK : BiasedLayerCall {
  ffi::AnyBuffer scores = result();  // [B, k] float32
  ffi::AnyBuffer labels = result();  // [B, k] int32

  using BiasedLayerCall::BiasedLayerCall;

  int64_t k() const { return scores.dimensions().size() == 2 ? scores.dimensions()[1] : 0; }

  void check() {
    BiasedLayerCall::check();
    check_buffer("scores", scores, ffi::F32, {shape.batch, k()});
    check_buffer("labels", labels, ffi::S32, {shape.batch, k()});
  }
};

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_FAN_IN_TOP_K_H_
