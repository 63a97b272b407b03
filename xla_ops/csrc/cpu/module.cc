// The Python module of the CPU kernels.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "dense_step.h"
#include "fan_in_loss.h"
#include "fan_in_matmul.h"
#include "fan_in_step.h"
#include "fan_in_top_k.h"
#include "kernels.h"
#include "kth_smallest.h"
#include "packed.h"
#include "xla/ffi/api/ffi.h"

namespace py = pybind11;

namespace {

template <typename Handler>
py::capsule capsule(Handler* handler) {
  static_assert(std::is_invocable_r_v<XLA_FFI_Error*, Handler, XLA_FFI_CallFrame*>, "not an XLA FFI handler");
  return py::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.attr("ffi_version") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("registrations", [] {
    py::dict handlers;
    handlers["xla_ops.dense_step.adam"] = capsule(xla_ops::dense_step_adam);
    handlers["xla_ops.dense_step.sgd"] = capsule(xla_ops::dense_step_sgd);
    handlers["xla_ops.fan_in_matmul.forward"] = capsule(xla_ops::fan_in_matmul_forward);
    handlers["xla_ops.fan_in_matmul.gradients"] = capsule(xla_ops::fan_in_matmul_gradients);
    handlers["xla_ops.fan_in_loss.value"] = capsule(xla_ops::fan_in_loss_value);
    handlers["xla_ops.fan_in_loss.gradients"] = capsule(xla_ops::fan_in_loss_gradients);
    handlers["xla_ops.fan_in_step.adam"] = capsule(xla_ops::fan_in_step_adam);
    handlers["xla_ops.fan_in_step.sgd"] = capsule(xla_ops::fan_in_step_sgd);
    handlers["xla_ops.fan_in_top_k"] = capsule(xla_ops::fan_in_top_k);
    handlers["xla_ops.kth_smallest"] = capsule(xla_ops::kth_smallest);
    return handlers;
  });
  m.def("peak_scratch_bytes", [] { return xla_ops::scratch().peak.load(); });
  m.def("isa", [] { return xla_ops::isa().name; });
  m.def("select_isa", [](const std::string& name) {
    if (!xla_ops::select_isa(name.c_str())) {
      throw std::invalid_argument("instruction set '" + name + "' is not in this build or not on this processor");
    }
  });
}
