#ifndef XLA_OPS_CSRC_CPU_FAN_IN_TOP_K_H_
#define XLA_OPS_CSRC_CPU_FAN_IN_TOP_K_H_

#include "xla/ffi/api/ffi.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(fan_in_top_k);

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_FAN_IN_TOP_K_H_
