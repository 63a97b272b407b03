// What the handlers share: checking shapes, and choosing the types that a call's buffers hold.

#ifndef XLA_OPS_CSRC_HANDLER_H_
#define XLA_OPS_CSRC_HANDLER_H_

#include <algorithm>
#include <initializer_list>
#include <new>
#include <string>
#include <type_traits>

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

// Calls fn(T*, I*) with null pointers of the types that `values` and `indices` hold.
template <typename Fn>
ffi::Error dispatch(const ffi::AnyBuffer& values, const ffi::AnyBuffer& indices, Fn&& fn) {
  const auto with_index = [&](auto* t) {
    switch (indices.element_type()) {
      case ffi::U16: fn(t, static_cast<uint16_t*>(nullptr)); return ffi::Error::Success();
      case ffi::S32: fn(t, static_cast<int32_t*>(nullptr)); return ffi::Error::Success();
      default: return ffi::Error::InvalidArgument("indices must be uint16 or int32");
    }
  };
  try {
    switch (values.element_type()) {
      case ffi::F32: return with_index(static_cast<float*>(nullptr));
      case ffi::BF16: return with_index(static_cast<bfloat16*>(nullptr));
      default: return ffi::Error::InvalidArgument("values must be float32 or bfloat16");
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory for temporaries");
  }
}

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

inline bool has_bias(const ffi::AnyBuffer& bias) { return !has_shape(bias, {0}); }

// Checks that both are matrices, and reads the call's sizes from them: `batched` is [B, D], `indices` [L, F].
inline ffi::Error check_matrices(const ffi::AnyBuffer& batched, const ffi::AnyBuffer& indices, Shape* s) {
  const auto b = batched.dimensions(), i = indices.dimensions();
  if (b.size() != 2 || i.size() != 2 || i[1] < 1) {
    return ffi::Error::InvalidArgument("expected matrices and a fan-in of at least 1, got shapes " + shape_string(b) +
                                       " and " + shape_string(i));
  }
  *s = {b[0], b[1], i[0], i[1]};
  return ffi::Error::Success();
}

// Checks the operands that describe the layer and its input, and reads the sizes.
inline ffi::Error check_layer(const ffi::AnyBuffer& x, const ffi::AnyBuffer& kernel, const ffi::AnyBuffer& indices,
                              const ffi::AnyBuffer& bias, Shape* s) {
  XLA_OPS_RETURN_IF_ERROR(check_matrices(x, indices, s));
  XLA_OPS_RETURN_IF_ERROR(check("kernel", kernel, x.element_type(), {s->labels, s->fan_in}));
  if (!has_bias(bias)) return ffi::Error::Success();
  return check("bias", bias, x.element_type(), {s->labels});
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_HANDLER_H_
