#ifndef XLA_OPS_CSRC_CPU_FAN_IN_STEP_H_
#define XLA_OPS_CSRC_CPU_FAN_IN_STEP_H_

#include "xla/ffi/api/ffi.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_step_adam);
XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_step_sgd);

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_FAN_IN_STEP_H_
