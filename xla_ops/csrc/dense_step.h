// The handler of dense_step, which each platform defines, and its operands.

#ifndef XLA_OPS_CSRC_DENSE_STEP_H_
#define XLA_OPS_CSRC_DENSE_STEP_H_

#include "call.h"

namespace xla_ops {

XLA_FFI_DECLARE_HANDLER_SYMBOL(dense_step_adam);

struct DenseStepAdam : Call {
  ffi::AnyBuffer x = argument();           // [B, D]
  ffi::AnyBuffer kernel = argument();      // [D, O]
  ffi::AnyBuffer dy = argument();          // [B, O]
  ffi::AnyBuffer mu = argument();          // [D, O], first moment, float32 or bfloat16
  ffi::AnyBuffer nu = argument();          // [D, O], second moment, of the same type
  ffi::AnyBuffer rates = argument();       // learning rate, 1 / (1 - b1^t), 1 / (1 - b2^t)
  ffi::AnyBuffer key = argument();         // [3] uint32: seed (two words) and step
  ffi::AnyBuffer depends_on = argument();  // any array that must be computed before the update
  float b1 = attribute<float>("b1");
  float b2 = attribute<float>("b2");
  float epsilon = attribute<float>("epsilon");
  ffi::AnyBuffer new_kernel = result();  // the results: arguments, updated in place
  ffi::AnyBuffer new_mu = result();
  ffi::AnyBuffer new_nu = result();
  DenseShape shape{};  // set by check()

  using Call::Call;

  void check() {
    if (x.dimensions().size() != 2 || dy.dimensions().size() != 2) {
      throw InvalidCall("x and dy must be matrices, got shapes " + shape_string(x.dimensions()) + " and " +
                        shape_string(dy.dimensions()));
    }
    shape = {x.dimensions()[0], x.dimensions()[1], dy.dimensions()[1]};
    const ffi::DataType type = mu.element_type() == ffi::BF16 ? ffi::BF16 : ffi::F32;
    check_buffer("x", x, ffi::F32, {shape.batch, shape.rows});
    check_buffer("kernel", kernel, ffi::F32, {shape.rows, shape.columns});
    check_buffer("dy", dy, ffi::F32, {shape.batch, shape.columns});
    check_buffer("mu", mu, type, {shape.rows, shape.columns});
    check_buffer("nu", nu, type, {shape.rows, shape.columns});
    check_buffer("rates", rates, ffi::F32, {3});
    check_buffer("key", key, ffi::U32, {3});
    check_aliased("kernel", kernel, new_kernel);
    check_aliased("mu", mu, new_mu);
    check_aliased("nu", nu, new_nu);
  }
};

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_DENSE_STEP_H_
