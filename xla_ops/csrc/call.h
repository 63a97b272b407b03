// The operands of calls, and what the handlers of all platforms share: checking shapes, and choosing the
// types that a call's buffers hold.

#ifndef XLA_OPS_CSRC_CALL_H_
#define XLA_OPS_CSRC_CALL_H_

#include <algorithm>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

#include "types.h"
#include "xla/ffi/api/ffi.h"

namespace xla_ops {

namespace ffi = xla::ffi;

// Thrown if the operands of a call do not fit together.
struct InvalidCall : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The operands of one call. A handler's subclass declares its arguments, attributes and results as members,
// in XLA's order, each initialized by argument(), attribute() or result(); its check() throws InvalidCall if
// they do not fit together. Python has checked the arguments; check() guards handlers that are called by
// other means.
class Call {
 public:
  Call(ffi::RemainingArgs arguments, ffi::RemainingRets results, ffi::Dictionary attributes)
      : arguments_(arguments), results_(results), attributes_(attributes) {}

  // Returns the next argument.
  ffi::AnyBuffer argument() {
    return value_of("arguments", arguments_.get<ffi::AnyBuffer>(arguments_read_++));
  }
  // Returns the next result.
  ffi::AnyBuffer result() { return *value_of("results", results_.get<ffi::AnyBuffer>(results_read_++)); }
  template <typename T>
  T attribute(const char* name) {
    return value_of(name, attributes_.get<T>(name));
  }
  void check_all_are_read() const {
    if (arguments_read_ == arguments_.size() && results_read_ == results_.size()) return;
    throw InvalidCall("expected " + std::to_string(arguments_read_) + " arguments and " +
                      std::to_string(results_read_) + " results, got " + std::to_string(arguments_.size()) +
                      " and " + std::to_string(results_.size()));
  }

 private:
  template <typename T>
  static T value_of(const char* name, const ffi::ErrorOr<T>& value) {
    if (value.has_error()) throw InvalidCall(std::string(name) + ": " + value.error().message());
    return value.value();
  }

  ffi::RemainingArgs arguments_;
  ffi::RemainingRets results_;
  ffi::Dictionary attributes_;
  size_t arguments_read_ = 0, results_read_ = 0;
};

// Calls fn, which returns an error; exceptions become errors as well.
template <typename Fn>
ffi::Error guarded(Fn&& fn) {
  try {
    return fn();
  } catch (const InvalidCall& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory for temporaries");
  }
}

// ---- checks ----

inline std::string shape_string(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

inline bool has_shape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> dims) {
  return std::equal(dims.begin(), dims.end(), buffer.dimensions().begin(), buffer.dimensions().end());
}

inline void check_buffer(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                         std::initializer_list<int64_t> dims) {
  if (buffer.element_type() != type) {
    throw InvalidCall(std::string(name) + " has an element type that does not fit the call");
  }
  if (has_shape(buffer, dims)) return;
  std::string expected = "[";
  for (int64_t d : dims) expected += (expected.size() > 1 ? ", " : "") + std::to_string(d);
  throw InvalidCall(std::string(name) + " must have shape " + expected + "], got " +
                    shape_string(buffer.dimensions()));
}

// Checks that the result `after` is the memory of the argument `before`, which an update in place requires.
inline void check_aliased(const char* name, const ffi::AnyBuffer& before, const ffi::AnyBuffer& after) {
  if (before.untyped_data() == after.untyped_data() || before.element_count() == 0) return;
  throw InvalidCall(std::string(name) + " must be updated in place: its result must alias it");
}

// ---- types ----

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// The same, but null for an array of no elements: no bias, or no gradient of x.
template <typename T>
T* optional_data(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() ? data<T>(buffer) : nullptr;
}

// Returns fn(T*), given a null pointer of the type that `values` holds.
template <typename Fn>
auto dispatch_values(const ffi::AnyBuffer& values, Fn&& fn) {
  switch (values.element_type()) {
    case ffi::F32: return fn(static_cast<float*>(nullptr));
    case ffi::BF16: return fn(static_cast<bfloat16*>(nullptr));
    default: throw InvalidCall("values must be float32 or bfloat16");
  }
}

// Returns fn(I*), given a null pointer of the type that `indices` holds.
template <typename Fn>
auto dispatch_indices(const ffi::AnyBuffer& indices, Fn&& fn) {
  switch (indices.element_type()) {
    case ffi::U16: return fn(static_cast<uint16_t*>(nullptr));
    case ffi::S32: return fn(static_cast<int32_t*>(nullptr));
    default: throw InvalidCall("indices must be uint16 or int32");
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CALL_H_
