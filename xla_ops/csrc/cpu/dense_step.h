#ifndef XLA_OPS_CSRC_CPU_DENSE_STEP_H_
#define XLA_OPS_CSRC_CPU_DENSE_STEP_H_

#include "xla/ffi/api/ffi.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(dense_step_adam);
XLA_FFI_DECLARE_HANDLER_SYMBOL(dense_step_sgd);

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_DENSE_STEP_H_
