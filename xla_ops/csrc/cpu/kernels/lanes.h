// Operations across the lanes of vectors: transposition, sums, and tests for zero.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_LANES_H_
#define XLA_OPS_CSRC_CPU_KERNELS_LANES_H_

#include <stdint.h>

#include "vector.h"

namespace xla_ops {
namespace {

// Interleaving is the one shuffle that all of these are made of.

template <int... Is>
struct Lanes {};
template <int N, int... Is>
struct MakeLanes : MakeLanes<N - 1, N - 1, Is...> {};
template <int... Is>
struct MakeLanes<0, Is...> {
  typedef Lanes<Is...> type;
};

// Lane i of the low (Hi = 0) or high (Hi = 1) interleaving of a and b in runs of S lanes: of each 2S lanes,
// the first S come from a's low (high) half, the others from b's.
constexpr int interleaved(int i, int s, int hi) {
  return (i / (2 * s)) * 2 * s + i % s + hi * s + ((i / s) % 2) * W;
}

template <int S, int Hi, int... Is>
XLA_OPS_INLINE Vec interleave(Vec a, Vec b, Lanes<Is...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, interleaved(Is, S, Hi)...);
#else
  typedef int32_t IVec __attribute__((vector_size(4 * W)));
  return __builtin_shuffle(a, b, IVec{interleaved(Is, S, Hi)...});
#endif
}
template <int S, int Hi>
XLA_OPS_INLINE Vec interleave(Vec a, Vec b) {
  return interleave<S, Hi>(a, b, typename MakeLanes<W>::type());
}

// v[i][j], v[j][i] = v[j][i], v[i][j]
template <int S>
struct Transpose {
  static XLA_OPS_INLINE void run(Vec* v) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & S) continue;
      const Vec a = v[i], b = v[i + S];
      v[i] = interleave<S, 0>(a, b);
      v[i + S] = interleave<S, 1>(a, b);
    }
    Transpose<2 * S>::run(v);
  }
};
template <>
struct Transpose<W> {
  static XLA_OPS_INLINE void run(Vec*) {}
};

// Lane i of v[0] = the sum of v[i]'s lanes.
template <int S>
struct SumLanes {
  static XLA_OPS_INLINE void run(Vec* v) {
#pragma GCC unroll 16
    for (int i = 0; i < W / S / 2; ++i) {
      v[i] = interleave<S, 0>(v[2 * i], v[2 * i + 1]) + interleave<S, 1>(v[2 * i], v[2 * i + 1]);
    }
    SumLanes<2 * S>::run(v);
  }
};
template <>
struct SumLanes<W> {
  static XLA_OPS_INLINE void run(Vec*) {}
};

// All lanes of v folded into one, by halves.
template <int S, typename Combine>
struct Fold {
  static XLA_OPS_INLINE Vec run(Vec v, Combine combine) {
    return Fold<S / 2, Combine>::run(combine(interleave<S, 0>(v, v), interleave<S, 1>(v, v)), combine);
  }
};
template <typename Combine>
struct Fold<0, Combine> {
  static XLA_OPS_INLINE Vec run(Vec v, Combine) { return v; }
};

struct Add {
  XLA_OPS_INLINE Vec operator()(Vec a, Vec b) const { return a + b; }
};
XLA_OPS_INLINE float sum_lanes(Vec v) { return Fold<W / 2, Add>::run(v, Add())[0]; }

struct Or {
  XLA_OPS_INLINE Vec operator()(Vec a, Vec b) const {
    const UVec either = reinterpret_cast<const UVec&>(a) | reinterpret_cast<const UVec&>(b);
    return reinterpret_cast<const Vec&>(either);
  }
};
// Whether any lane has a bit set.
XLA_OPS_INLINE bool any_bit(UVec v) {
  const Vec folded = Fold<W / 2, Or>::run(reinterpret_cast<const Vec&>(v), Or());
  return reinterpret_cast<const UVec&>(folded)[0] != 0;
}

// Bits that are all 0 if and only if the values are: -0 is 0, NaN is not.
XLA_OPS_INLINE UVec nonzero_bits(Vec v) { return reinterpret_cast<const UVec&>(v) << 1; }

XLA_OPS_INLINE bool is_zero(const float* row, int64_t width) {
  UVec any = {};
  for (int64_t b = 0; b < width; b += W) any |= nonzero_bits(load(row + b));
  return !any_bit(any);
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_LANES_H_
