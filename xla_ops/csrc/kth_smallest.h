// The handler of kth_smallest, which each platform defines, and its operands.

#ifndef XLA_OPS_CSRC_KTH_SMALLEST_H_
#define XLA_OPS_CSRC_KTH_SMALLEST_H_

#include <string>

#include "call.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(kth_smallest);

struct KthSmallest : Call {
  ffi::AnyBuffer x = argument();  // of any shape
  int64_t k = attribute<int64_t>("k");
  ffi::AnyBuffer smallest = result();  // [] float32

  using Call::Call;

  void check() {
    const int64_t n = x.element_count();
    if (k < 1 || k > n) {
      throw InvalidCall("k must be in 1.." + std::to_string(n) + ", got " + std::to_string(k));
    }
    check_buffer("result", smallest, ffi::F32, {});
  }
};

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_KTH_SMALLEST_H_
