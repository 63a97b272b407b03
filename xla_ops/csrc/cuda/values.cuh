// Loads, stores and conversions of values.

#ifndef XLA_OPS_CSRC_CUDA_VALUES_CUH_
#define XLA_OPS_CSRC_CUDA_VALUES_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"

namespace xla_ops::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to nearest, ties to even; a NaN keeps its top bits and stays a NaN.
__device__ inline void set(float* p, float x) { *p = x; }
__device__ inline void set(bfloat16* p, float x) {
  const uint32_t bits = __float_as_uint(x);
  p->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ inline void unpack(const uint4& raw, float (&v)[4]) {
  v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
  v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
}
__device__ inline void unpack(const uint4& raw, float (&v)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
  }
}

// Four at once, from an address that is a multiple of their size.
struct alignas(8) bfloat16x4 {
  bfloat16 values[4];
};
__device__ inline float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ inline void set4(float* p, const float4& v) { *reinterpret_cast<float4*>(p) = v; }
__device__ inline void set4(bfloat16* p, const float4& v) {
  bfloat16x4 four;
  set(four.values, v.x), set(four.values + 1, v.y), set(four.values + 2, v.z), set(four.values + 3, v.w);
  *reinterpret_cast<bfloat16x4*>(p) = four;
}

// Loads of what is read once, and is not to push features out of the cache.
__device__ inline float load_once(const float* p) { return __ldcs(p); }
__device__ inline float4 load4_once(const float* p) { return __ldcs(reinterpret_cast<const float4*>(p)); }
__device__ inline float load_once(const bfloat16* p) {
  return to_float(bfloat16{__ldcs(reinterpret_cast<const uint16_t*>(p))});
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_VALUES_CUH_
