// The Python module of the CPU kernels.

#include "../module.h"

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "memory.h"
#include "scratch.h"

PYBIND11_MODULE(_cpu, m) {
  xla_ops::export_handlers(m);
  m.def("scratch_bytes", &xla_ops::scratch_bytes);
  m.def("peak_scratch_bytes", [] { return xla_ops::scratch().peak.load(); });
  m.def("isa", [] { return xla_ops::isa().name; });
  m.def("select_isa", [](const std::string& name) {
    if (!xla_ops::select_isa(name.c_str())) {
      throw std::invalid_argument("instruction set '" + name +
                                  "' is not in this build or not on this processor");
    }
  });
}
