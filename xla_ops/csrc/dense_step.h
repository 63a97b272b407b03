// The handler of dense_step, which each platform defines: its operands and results, and the checks of those.

#ifndef XLA_OPS_CSRC_DENSE_STEP_H_
#define XLA_OPS_CSRC_DENSE_STEP_H_

#include <utility>

#include "handler.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(dense_step_adam);

// `context` holds what a platform's handler takes before the operands.
template <typename Context>
auto bind_dense_step_adam(Context&& context) {
  return std::move(context)
      .template Arg<ffi::AnyBuffer>()  // x [B, D]
      .template Arg<ffi::AnyBuffer>()  // kernel [D, O]
      .template Arg<ffi::AnyBuffer>()  // dy [B, O]
      .template Arg<ffi::AnyBuffer>()  // first moment [D, O], float32 or bfloat16
      .template Arg<ffi::AnyBuffer>()  // second moment [D, O], the same
      .template Arg<ffi::AnyBuffer>()  // rates: learning rate, 1 / (1 - b1^t), 1 / (1 - b2^t)
      .template Arg<ffi::AnyBuffer>()  // key: seed (two words) and step [3] uint32
      .template Arg<ffi::AnyBuffer>()  // anything that must be computed before the update
      .template Attr<float>("b1")
      .template Attr<float>("b2")
      .template Attr<float>("epsilon")
      .template Ret<ffi::AnyBuffer>()   // kernel, and so on: the arguments, updated in place
      .template Ret<ffi::AnyBuffer>()   // first moment
      .template Ret<ffi::AnyBuffer>();  // second moment
}

struct DenseStepBuffers {
  ffi::AnyBuffer &x, &kernel, &dy, &mu, &nu, &rates, &key;
  ffi::AnyBuffer &new_kernel, &new_mu, &new_nu;
};

inline ffi::Error check_dense_step_adam(const DenseStepBuffers& b, DenseShape* s) {
  const auto x = b.x.dimensions(), dy = b.dy.dimensions();
  if (x.size() != 2 || dy.size() != 2) {
    return ffi::Error::InvalidArgument("x and dy must be matrices, got shapes " + shape_string(x) + " and " +
                                       shape_string(dy));
  }
  *s = {x[0], x[1], dy[1]};
  const ffi::DataType type = b.mu.element_type() == ffi::BF16 ? ffi::BF16 : ffi::F32;
  XLA_OPS_RETURN_IF_ERROR(check("x", b.x, ffi::F32, {s->batch, s->rows}));
  XLA_OPS_RETURN_IF_ERROR(check("kernel", b.kernel, ffi::F32, {s->rows, s->columns}));
  XLA_OPS_RETURN_IF_ERROR(check("dy", b.dy, ffi::F32, {s->batch, s->columns}));
  XLA_OPS_RETURN_IF_ERROR(check("mu", b.mu, type, {s->rows, s->columns}));
  XLA_OPS_RETURN_IF_ERROR(check("nu", b.nu, type, {s->rows, s->columns}));
  XLA_OPS_RETURN_IF_ERROR(check("rates", b.rates, ffi::F32, {3}));
  XLA_OPS_RETURN_IF_ERROR(check("key", b.key, ffi::U32, {3}));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("kernel", b.kernel, b.new_kernel));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("mu", b.mu, b.new_mu));
  return check_aliased("nu", b.nu, b.new_nu);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_DENSE_STEP_H_
