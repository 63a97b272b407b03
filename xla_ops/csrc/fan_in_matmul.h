// The handlers of fan_in_matmul, which each platform defines, and their operands.

#ifndef XLA_OPS_CSRC_FAN_IN_MATMUL_H_
#define XLA_OPS_CSRC_FAN_IN_MATMUL_H_

#include "fan_in_layer.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_matmul_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_matmul_gradients);

struct FanInMatmulForward : BiasedLayerCall {
  ffi::AnyBuffer y = result();  // [B, L]

  using BiasedLayerCall::BiasedLayerCall;

  void check() {
    BiasedLayerCall::check();
    check_buffer("y", y, type(), {shape.batch, shape.labels});
  }
};

struct FanInMatmulGradients : LayerCall {
  ffi::AnyBuffer dy = argument();      // [B, L]
  ffi::AnyBuffer d_x = result();       // [B, D], or [0, 0] for none
  ffi::AnyBuffer d_kernel = result();  // [L, F]
  ffi::AnyBuffer d_bias = result();    // [L], or [0] for none

  using LayerCall::LayerCall;

  void check() {
    LayerCall::check();
    check_buffer("dy", dy, type(), {shape.batch, shape.labels});
    check_d_x(d_x);
    check_buffer("d_kernel", d_kernel, type(), {shape.labels, shape.fan_in});
    check_bias("d_bias", d_bias);
  }
};

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_FAN_IN_MATMUL_H_
