// Functions that the Python module of the CUDA kernels exports, besides the handlers.

#ifndef XLA_OPS_CSRC_CUDA_HANDLERS_H_
#define XLA_OPS_CSRC_CUDA_HANDLERS_H_

#include <cstdint>
#include <string>

#include "../types.h"

namespace xla_ops {

// Returns the message for a CUDA error (cudaError_t).
std::string error_message(int status);

// Returns the size of the last result of a handler, its workspace, in bytes. Only fan_in_top_k uses k. No
// device is needed.
int64_t workspace_bytes(const std::string& handler, bool is_bfloat16, const Shape& s, int64_t k,
                        int64_t num_entries, int64_t num_columns);

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CUDA_HANDLERS_H_
