// Types that the CPU and the CUDA kernels share. Like kernels.cc, this includes nothing but <stdint.h>.

#ifndef XLA_OPS_CSRC_TYPES_H_
#define XLA_OPS_CSRC_TYPES_H_

#include <stdint.h>

namespace xla_ops {

struct bfloat16 {
  uint16_t bits;
};

struct Shape {
  int64_t batch, in_features, labels, fan_in;
};

// Of a dense layer, whose kernel is [rows, columns].
struct DenseShape {
  int64_t batch, rows, columns;
};

enum class Loss { kSquaredHinge, kBinaryCrossEntropy };

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_TYPES_H_
