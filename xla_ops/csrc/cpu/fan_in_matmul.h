#ifndef XLA_OPS_CSRC_CPU_FAN_IN_MATMUL_H_
#define XLA_OPS_CSRC_CPU_FAN_IN_MATMUL_H_

#include "xla/ffi/api/ffi.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_matmul_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_matmul_gradients);

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_FAN_IN_MATMUL_H_
