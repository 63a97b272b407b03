// The exports that the Python modules of all platforms share.

#ifndef XLA_OPS_CSRC_MODULE_H_
#define XLA_OPS_CSRC_MODULE_H_

#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "dense_step.h"
#include "fan_in_loss.h"
#include "fan_in_matmul.h"
#include "fan_in_step.h"
#include "fan_in_top_k.h"
#include "kth_smallest.h"
#include "xla/ffi/api/ffi.h"

namespace xla_ops {

using Handlers = std::map<std::string, XLA_FFI_Handler*>;

// Sets `ffi_version`, the version of XLA's FFI that the handlers were built for, and `registrations()`, which
// maps the names of the handlers to capsules.
inline void export_handlers(pybind11::module_& m) {
  m.attr("ffi_version") = pybind11::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  const Handlers handlers = {
      {"xla_ops.dense_step.adam", dense_step_adam},
      {"xla_ops.fan_in_matmul.forward", fan_in_matmul_forward},
      {"xla_ops.fan_in_matmul.gradients", fan_in_matmul_gradients},
      {"xla_ops.fan_in_loss.value", fan_in_loss_value},
      {"xla_ops.fan_in_loss.gradients", fan_in_loss_gradients},
      {"xla_ops.fan_in_step.adam", fan_in_step_adam},
      {"xla_ops.fan_in_step.sgd", fan_in_step_sgd},
      {"xla_ops.fan_in_top_k", fan_in_top_k},
      {"xla_ops.kth_smallest", kth_smallest},
  };
  m.def("registrations", [handlers] {
    pybind11::dict capsules;
    for (const auto& [name, handler] : handlers) {
      capsules[name.c_str()] = pybind11::capsule(reinterpret_cast<void*>(handler));
    }
    return capsules;
  });
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_MODULE_H_
