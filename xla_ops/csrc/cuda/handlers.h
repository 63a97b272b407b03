// What the Python module of the CUDA kernels exports besides the handlers.

#ifndef XLA_OPS_CSRC_CUDA_HANDLERS_H_
#define XLA_OPS_CSRC_CUDA_HANDLERS_H_

#include <cstdint>
#include <string>

#include "../types.h"

namespace xla_ops {

// What a CUDA error (cudaError_t) means for the user.
std::string error_message(int status);

// How large a handler's last result, the workspace, must be; k is that of fan_in_top_k, and a batch has so
// many entries of num_columns sparse inputs. It asks for no device.
int64_t workspace_bytes(const std::string& handler, bool is_bfloat16, const Shape& s, int64_t k,
                        int64_t entries, int64_t num_columns);

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CUDA_HANDLERS_H_
