// Vectors of the instruction set that is compiled for: types, loads, stores and conversions.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_VECTOR_H_
#define XLA_OPS_CSRC_CPU_KERNELS_VECTOR_H_

#include <stdint.h>

#include "../../types.h"
#include "../kernels.h"

#if defined(__AVX512F__)
#define XLA_OPS_VECTOR 16
#elif defined(__AVX__)
#define XLA_OPS_VECTOR 8
#else
#define XLA_OPS_VECTOR 4
#endif

namespace xla_ops {
namespace {

constexpr int W = XLA_OPS_VECTOR;
static_assert(kLanes % W == 0, "a row is a whole number of vectors");

typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t HVec __attribute__((vector_size(2 * W), aligned(2), may_alias));

XLA_OPS_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
XLA_OPS_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

XLA_OPS_INLINE Vec load(const bfloat16* p) {
  const UVec bits = __builtin_convertvector(*reinterpret_cast<const HVec*>(p), UVec) << 16;
  return reinterpret_cast<const Vec&>(bits);
}
XLA_OPS_INLINE void store(bfloat16* p, Vec v) {
  // Round to nearest, ties to even; a NaN keeps its top bits and stays a NaN.
  const UVec bits = reinterpret_cast<const UVec&>(v);
  const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto unordered = v != v;
  const UVec nan = reinterpret_cast<const UVec&>(unordered);
  const UVec result = (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
  *reinterpret_cast<HVec*>(p) = __builtin_convertvector(result, HVec);
}

XLA_OPS_INLINE float to_float(float x) { return x; }
XLA_OPS_INLINE float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
XLA_OPS_INLINE void set(float* p, float x) { *p = x; }
XLA_OPS_INLINE void set(bfloat16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  p->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_VECTOR_H_
