// The handler of kth_smallest, which each platform defines: its operand and result, and the checks of those.

#ifndef XLA_OPS_CSRC_KTH_SMALLEST_H_
#define XLA_OPS_CSRC_KTH_SMALLEST_H_

#include <string>
#include <utility>

#include "handler.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(kth_smallest);

// `context` holds what a platform's handler takes before the operand.
template <typename Context>
auto bind_kth_smallest(Context&& context) {
  return std::move(context)
      .template Arg<ffi::AnyBuffer>()  // x, of any shape
      .template Attr<int64_t>("k")
      .template Ret<ffi::AnyBuffer>();  // float32 []
}

inline ffi::Error check_kth_smallest(const ffi::AnyBuffer& x, int64_t k, const ffi::AnyBuffer& result) {
  const int64_t n = x.element_count();
  if (k < 1 || k > n) {
    return ffi::Error::InvalidArgument("k must be in 1.." + std::to_string(n) + ", got " + std::to_string(k));
  }
  return check("result", result, ffi::F32, {});
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_KTH_SMALLEST_H_
