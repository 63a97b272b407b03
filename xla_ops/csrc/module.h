// What the Python modules of all platforms export.

#ifndef XLA_OPS_CSRC_MODULE_H_
#define XLA_OPS_CSRC_MODULE_H_

#include <pybind11/pybind11.h>

#include <type_traits>

#include "fan_in_loss.h"
#include "fan_in_matmul.h"
#include "fan_in_top_k.h"
#include "xla/ffi/api/ffi.h"

namespace xla_ops {

template <typename Handler>
pybind11::capsule capsule(Handler* handler) {
  static_assert(std::is_invocable_r_v<XLA_FFI_Error*, Handler, XLA_FFI_CallFrame*>, "not an XLA FFI handler");
  return pybind11::capsule(reinterpret_cast<void*>(handler));
}

// Sets `ffi_version`, the version of XLA's FFI that the handlers were built for, and `registrations()`, which maps
// the names of the handlers to capsules.
inline void export_handlers(pybind11::module_& m) {
  m.attr("ffi_version") = pybind11::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("registrations", [] {
    pybind11::dict handlers;
    handlers["xla_ops.fan_in_matmul.forward"] = capsule(fan_in_matmul_forward);
    handlers["xla_ops.fan_in_matmul.gradients"] = capsule(fan_in_matmul_gradients);
    handlers["xla_ops.fan_in_loss.value"] = capsule(fan_in_loss_value);
    handlers["xla_ops.fan_in_loss.gradients"] = capsule(fan_in_loss_gradients);
    handlers["xla_ops.fan_in_top_k"] = capsule(fan_in_top_k);
    return handlers;
  });
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_MODULE_H_
