// What the handlers share: checking shapes, and choosing the types that a call's buffers hold.

#ifndef XLA_OPS_CSRC_HANDLER_H_
#define XLA_OPS_CSRC_HANDLER_H_

#include <algorithm>
#include <initializer_list>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

#include "types.h"
#include "xla/ffi/api/ffi.h"

namespace xla_ops {

namespace ffi = xla::ffi;

inline std::string shape_string(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

inline bool has_shape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> dims) {
  return std::equal(dims.begin(), dims.end(), buffer.dimensions().begin(), buffer.dimensions().end());
}

// Python has checked the arguments; this guards handlers that are called by other means.
inline ffi::Error check(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                        std::initializer_list<int64_t> dims) {
  if (buffer.element_type() != type) {
    return ffi::Error::InvalidArgument(std::string(name) + " has an element type that does not fit the call");
  }
  if (has_shape(buffer, dims)) return ffi::Error::Success();
  std::string expected = "[";
  for (int64_t d : dims) expected += (expected.size() > 1 ? ", " : "") + std::to_string(d);
  return ffi::Error::InvalidArgument(std::string(name) + " must have shape " + expected + "], got " +
                                     shape_string(buffer.dimensions()));
}

#define XLA_OPS_RETURN_IF_ERROR(expression) \
  if (ffi::Error error = (expression); error.failure()) return error

// Calls fn, which returns an error; running out of memory becomes one as well.
template <typename Fn>
ffi::Error guarded(Fn&& fn) {
  try {
    return fn();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory for temporaries");
  }
}

// Calls fn(T*), which returns an error, with a null pointer of the type that `values` holds.
template <typename Fn>
ffi::Error dispatch(const ffi::AnyBuffer& values, Fn&& fn) {
  return guarded([&] {
    switch (values.element_type()) {
      case ffi::F32: return fn(static_cast<float*>(nullptr));
      case ffi::BF16: return fn(static_cast<bfloat16*>(nullptr));
      default: return ffi::Error::InvalidArgument("values must be float32 or bfloat16");
    }
  });
}

// Calls fn(T*, I*) with null pointers of the types that `values` and `indices` hold.
template <typename Fn>
ffi::Error dispatch(const ffi::AnyBuffer& values, const ffi::AnyBuffer& indices, Fn&& fn) {
  return dispatch(values, [&](auto* t) {
    switch (indices.element_type()) {
      case ffi::U16: fn(t, static_cast<uint16_t*>(nullptr)); return ffi::Error::Success();
      case ffi::S32: fn(t, static_cast<int32_t*>(nullptr)); return ffi::Error::Success();
      default: return ffi::Error::InvalidArgument("indices must be uint16 or int32");
    }
  });
}

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// Checks that `after` is `before`'s memory, where an update reads what it writes.
inline ffi::Error check_aliased(const char* name, const ffi::AnyBuffer& before, const ffi::AnyBuffer& after) {
  if (before.untyped_data() == after.untyped_data() || before.element_count() == 0)
    return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string(name) +
                                     " must be updated in place: its result must alias it");
}

// What stands for no bias, or for no gradient of x, is an array of no elements.
template <typename T>
T* optional_data(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() ? data<T>(buffer) : nullptr;
}

// Checks the gradient of x, [batch, in_features]; [0, 0] stands for one that nobody asks for.
inline ffi::Error check_d_x(const ffi::AnyBuffer& d_x, ffi::DataType type, const Shape& s) {
  if (d_x.element_type() == type && has_shape(d_x, {0, 0})) return ffi::Error::Success();
  return check("d_x", d_x, type, {s.batch, s.in_features});
}

// The operands that hold the inputs of a batch: dense ones, and sparse ones behind them.
struct InputBuffers {
  ffi::AnyBuffer x;        // [batch, in_features]
  ffi::AnyBuffer rows;     // [entries] int32, which example an entry is of
  ffi::AnyBuffer columns;  // [entries] int32, which sparse input
  ffi::AnyBuffer values;   // [entries]
  int64_t num_columns;     // how many sparse inputs there are
};

inline ffi::Error check_inputs(const InputBuffers& in) {
  const int64_t entries = in.rows.element_count();
  XLA_OPS_RETURN_IF_ERROR(check("rows", in.rows, ffi::S32, {entries}));
  XLA_OPS_RETURN_IF_ERROR(check("columns", in.columns, ffi::S32, {entries}));
  XLA_OPS_RETURN_IF_ERROR(check("values", in.values, in.x.element_type(), {entries}));
  if (in.num_columns >= 0) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("num_columns must be at least 0, got " + std::to_string(in.num_columns));
}

// Reads a call's sizes from x [batch, in_features] and indices [labels, fan_in].
inline ffi::Error read_shape(const ffi::AnyBuffer& x, const ffi::AnyBuffer& indices, Shape* s) {
  const auto a = x.dimensions(), b = indices.dimensions();
  if (a.size() != 2 || b.size() != 2 || b[1] < 1) {
    return ffi::Error::InvalidArgument("expected matrices and a fan-in of at least 1, got shapes " +
                                       shape_string(a) + " and " + shape_string(b));
  }
  *s = {a[0], a[1], b[0], b[1], b[0]};
  return ffi::Error::Success();
}

// The same, and checks kernel [labels, fan_in] and bias ([labels], or [0] for none) against them.
inline ffi::Error read_layer(const InputBuffers& in, const ffi::AnyBuffer& kernel,
                             const ffi::AnyBuffer& indices, const ffi::AnyBuffer& bias, Shape* s) {
  XLA_OPS_RETURN_IF_ERROR(read_shape(in.x, indices, s));
  XLA_OPS_RETURN_IF_ERROR(check_inputs(in));
  XLA_OPS_RETURN_IF_ERROR(check("kernel", kernel, in.x.element_type(), {s->labels, s->fan_in}));
  return check("bias", bias, in.x.element_type(), {bias.element_count() ? s->labels : 0});
}

// Binds the operands of InputBuffers, the first ones of every handler of a fixed fan-in layer; `num_columns`
// is the first attribute.
template <typename Context>
auto bind_inputs(Context&& context) {
  return std::move(context)
      .template Attr<int64_t>("num_columns")
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // rows
      .template Arg<ffi::AnyBuffer>()   // columns
      .template Arg<ffi::AnyBuffer>();  // values
}

// Checks what a loss takes besides the layer: positives [batch, any], how many labels it is a mean over,
// which becomes part of the shape, and `mean`, the scalar result.
inline ffi::Error check_loss(const ffi::AnyBuffer& positives, int64_t loss, int64_t num_labels,
                             const ffi::AnyBuffer& mean, Shape* s) {
  s->mean_labels = num_labels;
  const auto dims = positives.dimensions();
  XLA_OPS_RETURN_IF_ERROR(
      check("positives", positives, ffi::S32, {s->batch, dims.size() == 2 ? dims[1] : 0}));
  if (loss != 0 && loss != 1)
    return ffi::Error::InvalidArgument("loss must be 0 or 1, got " + std::to_string(loss));
  return check("loss", mean, ffi::F32, {});
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_HANDLER_H_
