#ifndef XLA_OPS_CSRC_CPU_KTH_SMALLEST_H_
#define XLA_OPS_CSRC_CPU_KTH_SMALLEST_H_

#include "xla/ffi/api/ffi.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(kth_smallest);

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KTH_SMALLEST_H_
