// The operands that all ops of a fixed fan-in layer share.

#ifndef XLA_OPS_CSRC_FAN_IN_LAYER_H_
#define XLA_OPS_CSRC_FAN_IN_LAYER_H_

#include <string>

#include "call.h"

namespace xla_ops {

// The inputs of a batch, dense ones and sparse ones after them, and the connections of a layer.
struct LayerCall : Call {
  ffi::AnyBuffer x = argument();                            // [B, D]
  ffi::AnyBuffer rows = argument();                         // [N] int32, the example of each entry
  ffi::AnyBuffer columns = argument();                      // [N] int32, the sparse input of each entry
  ffi::AnyBuffer values = argument();                       // [N]
  ffi::AnyBuffer kernel = argument();                       // [L, F]
  ffi::AnyBuffer indices = argument();                      // [L, F]
  int64_t num_columns = attribute<int64_t>("num_columns");  // number of sparse inputs
  Shape shape{};                                            // set by check()

  using Call::Call;

  ffi::DataType type() const { return x.element_type(); }
  int64_t num_entries() const { return rows.element_count(); }

  void check() {
    const auto a = x.dimensions(), b = indices.dimensions();
    if (a.size() != 2 || b.size() != 2 || b[1] < 1) {
      throw InvalidCall("expected matrices and a fan-in of at least 1, got shapes " + shape_string(a) +
                        " and " + shape_string(b));
    }
    shape = {a[0], a[1], b[0], b[1], b[0]};
    check_buffer("rows", rows, ffi::S32, {num_entries()});
    check_buffer("columns", columns, ffi::S32, {num_entries()});
    check_buffer("values", values, type(), {num_entries()});
    check_buffer("kernel", kernel, type(), {shape.labels, shape.fan_in});
    if (num_columns < 0) {
      throw InvalidCall("num_columns must be at least 0, got " + std::to_string(num_columns));
    }
  }

 protected:
  // Checks a bias or its gradient: [L], or [0] for none.
  void check_bias(const char* name, const ffi::AnyBuffer& bias) const {
    check_buffer(name, bias, type(), {bias.element_count() ? shape.labels : 0});
  }
  // Checks the gradient of x: [B, D], or [0, 0] if it is not needed.
  void check_d_x(const ffi::AnyBuffer& d_x) const {
    if (d_x.element_type() == type() && has_shape(d_x, {0, 0})) return;
    check_buffer("d_x", d_x, type(), {shape.batch, shape.in_features});
  }
};

// Returns fn(T*, I*), given null pointers of the types that the kernel and the indices hold.
template <typename Fn>
auto dispatch(const LayerCall& call, Fn&& fn) {
  return dispatch_values(call.kernel, [&](auto* t) {
    return dispatch_indices(call.indices, [&](auto* i) { return fn(t, i); });
  });
}

struct BiasedLayerCall : LayerCall {
  ffi::AnyBuffer bias = argument();  // [L], or [0] for none

  using LayerCall::LayerCall;

  void check() {
    LayerCall::check();
    check_bias("bias", bias);
  }
};

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_FAN_IN_LAYER_H_
