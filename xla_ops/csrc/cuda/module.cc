// The Python module of the CUDA kernels. It loads without a GPU, and without CUDA's libraries.

#include "../module.h"

#include "handlers.h"

PYBIND11_MODULE(_cuda, m) {
  xla_ops::export_handlers(m);
  m.def("error_message", &xla_ops::error_message);
  m.def("workspace_bytes",
        [](const std::string& handler, bool is_bfloat16, int64_t batch, int64_t in_features, int64_t labels,
           int64_t fan_in, int64_t k, int64_t num_entries, int64_t num_columns) {
          const xla_ops::Shape shape{batch, in_features, labels, fan_in};
          return xla_ops::workspace_bytes(handler, is_bfloat16, shape, k, num_entries, num_columns);
        });
}
