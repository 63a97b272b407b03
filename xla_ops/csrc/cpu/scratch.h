// The scratch memory that a handler will take.

#ifndef XLA_OPS_CSRC_CPU_SCRATCH_H_
#define XLA_OPS_CSRC_CPU_SCRATCH_H_

#include <cstdint>
#include <string>

namespace xla_ops {

// Returns an upper bound on the bytes of a fixed fan-in handler's large buffers: the packed inputs and, if it
// computes gradients, the sums of the gradient of x of each thread. Buffers for a block or a chunk of labels
// are not counted. Throws std::invalid_argument for another handler.
int64_t scratch_bytes(const std::string& handler, bool is_bfloat16, int64_t batch, int64_t in_features,
                      int64_t num_entries, int64_t num_threads);

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_SCRATCH_H_
