// Types that the CPU and the CUDA kernels share. Like cpu/kernels.cc, this includes nothing but <stdint.h>.

#ifndef XLA_OPS_CSRC_TYPES_H_
#define XLA_OPS_CSRC_TYPES_H_

#include <stdint.h>

// A function of the kernels that exists only within its callers: a copy of its own could be compiled for one
// instruction set and called for another (cpu/kernels.cc).
#ifdef __CUDACC__
#define XLA_OPS_INLINE __device__ __forceinline__
#else
#define XLA_OPS_INLINE inline __attribute__((always_inline))
#endif

namespace xla_ops {

struct bfloat16 {
  uint16_t bits;
};

struct Shape {
  int64_t batch, in_features, labels, fan_in;
  int64_t mean_labels;  // the labels that a loss is a mean over: with those that other devices have
};

// Of a dense layer, whose kernel is [rows, columns].
struct DenseShape {
  int64_t batch, rows, columns;
};

enum class Loss { kSquaredHinge, kBinaryCrossEntropy };

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_TYPES_H_
