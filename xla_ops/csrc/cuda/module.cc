// The Python module of the CUDA kernels. It loads without a GPU, and without CUDA's libraries.

#include "../module.h"

PYBIND11_MODULE(_cuda, m) { xla_ops::export_handlers(m); }
