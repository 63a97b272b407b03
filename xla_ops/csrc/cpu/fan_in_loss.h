#ifndef XLA_OPS_CSRC_CPU_FAN_IN_LOSS_H_
#define XLA_OPS_CSRC_CPU_FAN_IN_LOSS_H_

#include "xla/ffi/api/ffi.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_loss_value);
XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_loss_gradients);

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_FAN_IN_LOSS_H_
