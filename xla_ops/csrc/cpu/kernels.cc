// See kernels.h. setup.py compiles this file once per instruction set, with XLA_OPS_ISA naming it.
//
// Only <stdint.h> is included, and everything but the exported table has internal linkage: an inline
// function of the standard library compiled here with AVX-512 could otherwise be the copy that the linker
// keeps for the whole program, and crash processors without it.

#include "kernels.h"

#include <stdint.h>

#if defined(__AVX512F__)
#define XLA_OPS_VECTOR 16
#elif defined(__AVX__)
#define XLA_OPS_VECTOR 8
#else
#define XLA_OPS_VECTOR 4
#endif

#define XLA_OPS_INLINE inline __attribute__((always_inline))

namespace xla_ops {
namespace {

constexpr int W = XLA_OPS_VECTOR;
static_assert(kLanes % W == 0, "a row is a whole number of vectors");

typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t HVec __attribute__((vector_size(2 * W), aligned(2), may_alias));

// ---- loads, stores, conversions ----

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

// ---- interleaving: the one shuffle behind both the transposition and the horizontal sums ----

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

// ---- layout ----

template <typename In, typename Out>
void transpose(const In* in, int64_t in_stride, int64_t rows, int64_t cols, int64_t out_width, Out* out,
               int64_t out_stride) {
  const int64_t full_rows = rows - rows % W, full_cols = cols - cols % W;
  for (int64_t c = 0; c < full_cols; c += W) {
    for (int64_t r = 0; r < full_rows; r += W) {
      Vec v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load(in + (c + i) * in_stride + r);
      Transpose<1>::run(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + (r + i) * out_stride + c, v[i]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < full_rows ? full_cols : 0; c < cols; ++c) {
      set(out + r * out_stride + c, to_float(in[c * in_stride + r]));
    }
    for (int64_t c = cols; c < out_width; ++c) set(out + r * out_stride + c, 0.0f);
  }
}

template <typename T>
void narrow(const float* in, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(in + i));
  for (; i < count; ++i) set(out + i, in[i]);
}

// ---- fixed fan-in ----

// An index as a row of the packed features; every index out of range becomes the zero row.
template <typename I>
XLA_OPS_INLINE int64_t row_of(I index, int64_t in_features) {
  const uint64_t i = static_cast<uint64_t>(static_cast<int64_t>(index));
  return static_cast<int64_t>(i < static_cast<uint64_t>(in_features) ? i : in_features);
}

// Bits that are all 0 if and only if the values are: -0 is 0, NaN is not.
XLA_OPS_INLINE UVec nonzero_bits(Vec v) { return reinterpret_cast<const UVec&>(v) << 1; }

XLA_OPS_INLINE bool is_zero(const float* row, int64_t width) {
  UVec any = {};
  for (int64_t b = 0; b < width; b += W) any |= nonzero_bits(load(row + b));
  return !any_bit(any);
}

static_assert(kBlock <= 64, "a mask has a bit for each row of a block");

// Calls fn<NV>(...) with NV = the number of vectors in a row of `width`, so that a row stays in registers.
#define XLA_OPS_FOR_WIDTH(fn, width, ...)                    \
  switch ((width) / kLanes) {                                \
    case 1: return fn<T, I, 1 * kLanes / W>(__VA_ARGS__);    \
    case 2: return fn<T, I, 2 * kLanes / W>(__VA_ARGS__);    \
    case 3: return fn<T, I, 3 * kLanes / W>(__VA_ARGS__);    \
    default: return fn<T, I, 4 * kLanes / W>(__VA_ARGS__);   \
  }
static_assert(kTile == 4 * kLanes, "XLA_OPS_FOR_WIDTH covers every width");

// The gather's latency is hidden by asking for the next label's features while this one's are summed.
template <int NV, int Write, typename T, typename I>
XLA_OPS_INLINE void prefetch(const T* packed, int64_t in_features, I index) {
  const char* row = reinterpret_cast<const char*>(packed + row_of(index, in_features) * NV * W);
#pragma GCC unroll 16
  for (int64_t byte = 0; byte < static_cast<int64_t>(NV * W * sizeof(T)); byte += 64) {
    __builtin_prefetch(row + byte, Write);
  }
}

template <typename T, typename I, int NV>
void logits_of_width(const T* packed, int64_t in_features, const T* kernel, const I* indices, const T* bias,
                     int64_t labels, int64_t fan_in, float* rows) {
  for (int64_t n = 0; n < labels; ++n) {
    const I* next = indices + (n + 1 < labels ? fan_in : 0);
    Vec sum[NV];
    const Vec start = Vec{} + (bias ? to_float(bias[n]) : 0.0f);
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) sum[i] = start;
    for (int64_t f = 0; f < fan_in; ++f) {
      prefetch<NV, 0>(packed, in_features, next[f]);
      const T* x = packed + row_of(indices[f], in_features) * NV * W;
      const float weight = to_float(kernel[f]);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) sum[i] += weight * load(x + i * W);
    }
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) store(rows + i * W, sum[i]);
    kernel += fan_in;
    indices += fan_in;
    rows += NV * W;
  }
}

template <typename T, typename I>
void logits(const T* packed, int64_t in_features, int64_t width, const T* kernel, const I* indices,
            const T* bias, int64_t labels, int64_t fan_in, float* rows) {
  XLA_OPS_FOR_WIDTH(logits_of_width, width, packed, in_features, kernel, indices, bias, labels, fan_in, rows);
}

template <typename T, typename I, int NV>
void kernel_grad_of_width(const T* packed, int64_t in_features, const float* rows, uint64_t mask,
                          const I* indices, int64_t fan_in, float* d_kernel) {
  for (; mask; mask &= mask - 1) {
    const int64_t n = __builtin_ctzll(mask), first = n * fan_in;
    const float* row = rows + n * NV * W;
    int64_t f = 0;
    for (; f + W <= fan_in; f += W) {  // W connections at a time, summed over the lanes together
      Vec sum[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) {
        const T* x = packed + row_of(indices[first + f + j], in_features) * NV * W;
        Vec s = load(row) * load(x);
#pragma GCC unroll 16
        for (int i = 1; i < NV; ++i) s += load(row + i * W) * load(x + i * W);
        sum[j] = s;
      }
      SumLanes<1>::run(sum);
      float* d = d_kernel + first + f;
      store(d, load(d) + sum[0]);
    }
    for (; f < fan_in; ++f) {
      const T* x = packed + row_of(indices[first + f], in_features) * NV * W;
      Vec s = load(row) * load(x);
      for (int i = 1; i < NV; ++i) s += load(row + i * W) * load(x + i * W);
      d_kernel[first + f] += sum_lanes(s);
    }
  }
}

template <typename T, typename I>
void kernel_grad(const T* packed, int64_t in_features, int64_t width, const float* rows, uint64_t mask,
                 const I* indices, int64_t fan_in, float* d_kernel) {
  XLA_OPS_FOR_WIDTH(kernel_grad_of_width, width, packed, in_features, rows, mask, indices, fan_in, d_kernel);
}

template <typename T, typename I, int NV>
void input_grad_of_width(const float* rows, uint64_t mask, int64_t in_features, const T* kernel,
                         const I* indices, int64_t fan_in, float* d_packed) {
  for (; mask; mask &= mask - 1) {
    const int64_t n = __builtin_ctzll(mask);
    const uint64_t others = mask & (mask - 1);
    const I* next = indices + (others ? __builtin_ctzll(others) : n) * fan_in;
    Vec row[NV];
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) row[i] = load(rows + (n * NV + i) * W);
    for (int64_t f = 0; f < fan_in; ++f) {
      prefetch<NV, 1>(d_packed, in_features, next[f]);
      float* d = d_packed + row_of(indices[n * fan_in + f], in_features) * NV * W;
      const float weight = to_float(kernel[n * fan_in + f]);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) store(d + i * W, load(d + i * W) + weight * row[i]);
    }
  }
}

template <typename T, typename I>
void input_grad(const float* rows, uint64_t mask, int64_t in_features, int64_t width, const T* kernel,
                const I* indices, int64_t fan_in, float* d_packed) {
  XLA_OPS_FOR_WIDTH(input_grad_of_width, width, rows, mask, in_features, kernel, indices, fan_in, d_packed);
}

// ---- losses ----

// Comparisons are turned so that NaN passes through.
XLA_OPS_INLINE Vec max0(Vec x) { return x < 0 ? Vec{} : x; }

struct SquaredHinge {
  static XLA_OPS_INLINE Vec value_and_slope(Vec s, Vec* slope) {
    const Vec slack = max0(1 + s);
    *slope = 2 * slack;
    return slack * slack;
  }
};

// e^x for -87 <= x <= 0, to 2 units in the last place.
XLA_OPS_INLINE Vec exp_negative(Vec x) {
  typedef int32_t IVec __attribute__((vector_size(4 * W)));
  const Vec shifted = x * 1.44269504f - 0.5f;
  const IVec n = __builtin_convertvector(shifted, IVec);  // truncates, so rounds x / ln 2 to nearest for x <= 0
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two pieces
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  const IVec power = (n + 127) << 23;
  return p * reinterpret_cast<const Vec&>(power);
}

struct BinaryCrossEntropy {
  static XLA_OPS_INLINE Vec value_and_slope(Vec s, Vec* slope) {
    const Vec magnitude = s > 0 ? s : -s;
    const Vec e = exp_negative(magnitude > 87 ? Vec{} - 87 : -magnitude);
    *slope = (s > 0 ? Vec{} + 1 : e) / (1 + e);
    // log(1 + e) = 2 artanh(z) with z = e / (2 + e) <= 1/3
    const Vec z = e / (2 + e), z2 = z * z;
    Vec p = Vec{} + 1.0f / 13;
    p = p * z2 + 1.0f / 11;
    p = p * z2 + 1.0f / 9;
    p = p * z2 + 1.0f / 7;
    p = p * z2 + 1.0f / 5;
    p = p * z2 + 1.0f / 3;
    p = p * z2 + 1;
    return max0(s) + 2 * z * p;
  }
};

template <typename LossFunction>
float negatives(float* rows, int64_t labels, int64_t width, int64_t size, float scale, uint64_t* mask) {
  Vec total = {};
  *mask = 0;
  for (int64_t n = 0; n < labels; ++n, rows += width) {
    Vec sum = {};
    UVec any = {};
    for (int64_t b = 0; b < width; b += W) {
      Vec slope, value = LossFunction::value_and_slope(load(rows + b), &slope);
      if (b + W > size) {  // the end of the tile, and the padding after it
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          if (b + i >= size) value[i] = slope[i] = 0;
        }
      }
      sum += value;
      const Vec gradient = slope * scale;
      any |= nonzero_bits(gradient);
      store(rows + b, gradient);
    }
    total += sum;
    *mask |= uint64_t{any_bit(any)} << n;
  }
  return sum_lanes(total);
}

void row_sums(const float* rows, uint64_t mask, int64_t width, float* sums) {
  for (; mask; mask &= mask - 1) {
    const int64_t n = __builtin_ctzll(mask);
    Vec sum = {};
    for (int64_t b = 0; b < width; b += W) sum += load(rows + n * width + b);
    sums[n] += sum_lanes(sum);
  }
}

uint64_t nonzero(const float* rows, int64_t labels, int64_t width) {
  uint64_t mask = 0;
  for (int64_t n = 0; n < labels; ++n) mask |= uint64_t{!is_zero(rows + n * width, width)} << n;
  return mask;
}

uint64_t above(const float* rows, int64_t labels, int64_t width, const float* bounds) {
  uint64_t mask = 0;
  for (int64_t n = 0; n < labels; ++n) {
    UVec any = {};
    for (int64_t b = 0; b < width; b += W) {
      const auto greater = load(rows + n * width + b) > load(bounds + b);
      any |= reinterpret_cast<const UVec&>(greater);
    }
    mask |= uint64_t{any_bit(any)} << n;
  }
  return mask;
}

// ---- updates ----

void adam(const float* __restrict gradient, int64_t count, const AdamStep& step, float* __restrict w,
          float* __restrict mu, float* __restrict nu) {
  const AdamStep s = step;
  for (int64_t i = 0; i < count; ++i) {
    const float g = gradient[i];
    const float m = s.b1 * mu[i] + (1 - s.b1) * g, v = s.b2 * nu[i] + (1 - s.b2) * g * g;
    mu[i] = m;
    nu[i] = v;
    w[i] -= s.learning_rate * (m * s.scale1) / (__builtin_sqrtf(v * s.scale2) + s.epsilon);
  }
}

void sgd(const float* __restrict gradient, int64_t count, float learning_rate, float* __restrict w) {
  for (int64_t i = 0; i < count; ++i) w[i] -= learning_rate * gradient[i];
}

XLA_OPS_INLINE void multiply(uint32_t a, uint32_t b, uint32_t* high, uint32_t* low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  *high = static_cast<uint32_t>(product >> 32);
  *low = static_cast<uint32_t>(product);
}
XLA_OPS_INLINE void multiply(UVec a, uint32_t b, UVec* high, UVec* low) {
  typedef uint64_t QVec __attribute__((vector_size(8 * W)));
  const QVec product = __builtin_convertvector(a, QVec) * static_cast<uint64_t>(b);
  *high = __builtin_convertvector(product >> 32, UVec);
  *low = __builtin_convertvector(product, UVec);
}

// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) for one counter, or for a
// vector of them.
template <typename V>
XLA_OPS_INLINE void philox(V counter_low, uint32_t counter_high, const RoundingKey& key, V* words) {
  uint32_t k0 = key.seed[0], k1 = key.seed[1];
  V c0 = counter_low, c1 = V{} + counter_high, c2 = V{} + key.step, c3 = V{};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    V high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, &high0, &low0);
    multiply(c2, 0xCD9E8D57u, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

constexpr int64_t kPositions = 128;  // that kLanes counters serve
static_assert(kColumns == kPositions, "a dense layer is updated in runs that one set of counters serves");

// values.one(i), or the vector values.many(i), rounded into out[i]: each is asked for once. What values.keeps(i), or
// of a run values.keeps_run(i), says to keep stays as it is.
template <typename Values>
void round_one(const Values& values, int64_t i, const RoundingKey& key, uint64_t position, bfloat16* out) {
  if (values.keeps(i)) return;
  const uint64_t counter = position / kPositions * kLanes + position % kLanes;
  uint32_t words[4];
  philox(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), key, words);
  const uint32_t word = words[position % kPositions / (2 * kLanes)];
  const float x = values.one(i);
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t random = position / kLanes % 2 ? word >> 16 : word & 0xffff;
  out[i].bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : bits + random) >> 16);
}

template <typename Values>
void round_stochastically(const Values& values, int64_t count, const RoundingKey& key, int64_t position,
                          bfloat16* out) {
  int64_t i = 0;
  for (; i < count && (position + i) % kPositions; ++i) round_one(values, i, key, position + i, out);
  UVec lane;
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) lane[j] = j;
  for (; i + kPositions <= count; i += kPositions) {
    if (values.keeps_run(i)) continue;
    const uint64_t counter = static_cast<uint64_t>(position + i) / kPositions * kLanes;
    for (int64_t first = 0; first < kLanes; first += W) {
      UVec words[4];
      philox(lane + static_cast<uint32_t>(counter + first), static_cast<uint32_t>(counter >> 32), key, words);
#pragma GCC unroll 8
      for (int q = 0; q < kPositions / kLanes; ++q) {
        const int64_t at = i + q * kLanes + first;
        const Vec x = values.many(at);
        const UVec bits = reinterpret_cast<const UVec&>(x);
        const auto unordered = x != x;
        const UVec nan = reinterpret_cast<const UVec&>(unordered);
        const UVec random = q % 2 ? words[q / 2] >> 16 : words[q / 2] & 0xffff;
        const UVec rounded = ((bits + (random & ~nan)) | (nan & 0x400000)) >> 16;
        *reinterpret_cast<HVec*>(out + at) = __builtin_convertvector(rounded, HVec);
      }
    }
  }
  for (; i < count; ++i) round_one(values, i, key, position + i, out);
}

struct SgdValues {
  const float* gradient;
  float learning_rate;
  const bfloat16* w;

  bool keeps(int64_t i) const { return gradient[i] == 0; }
  // As for nearly all labels, once training is under way.
  bool keeps_run(int64_t i) const { return is_zero(gradient + i, kPositions); }
  float one(int64_t i) const { return to_float(w[i]) - learning_rate * gradient[i]; }
  Vec many(int64_t i) const { return load(w + i) - learning_rate * load(gradient + i); }
};

// Second moments; on the way the first ones and the weights take their step.
struct AdamValues {
  const float* gradient;
  const AdamStep s;
  float* w;
  bfloat16 *mu, *nu;

  bool keeps(int64_t) const { return false; }
  bool keeps_run(int64_t) const { return false; }
  float one(int64_t i) const {
    float m = to_float(mu[i]), v = to_float(nu[i]);
    adam(gradient + i, 1, s, w + i, &m, &v);
    set(mu + i, m);
    return v;
  }
  Vec many(int64_t i) const {
    const Vec g = load(gradient + i);
    const Vec m = s.b1 * load(mu + i) + (1 - s.b1) * g, v = s.b2 * load(nu + i) + (1 - s.b2) * g * g;
    store(mu + i, m);
    Vec root;
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) root[j] = __builtin_sqrtf(v[j] * s.scale2);
    store(w + i, load(w + i) - s.learning_rate * (m * s.scale1) / (root + s.epsilon));
    return v;
  }
};

void sgd_stochastic(const float* gradient, int64_t count, float learning_rate, const RoundingKey& key,
                    int64_t position, bfloat16* w) {
  round_stochastically(SgdValues{gradient, learning_rate, w}, count, key, position, w);
}

void adam_bf16(const float* gradient, int64_t count, const AdamStep& step, const RoundingKey& key, int64_t position,
               float* w, bfloat16* mu, bfloat16* nu) {
  round_stochastically(AdamValues{gradient, step, w, mu, nu}, count, key, position, nu);
}

// ---- dense layers ----

void products(const float* x, int64_t x_stride, const float* dy, int64_t batch, float* out) {
  constexpr int V = 4;  // kRows * V sums fit in the registers
  for (int64_t first = 0; first < kColumns; first += V * W) {
    Vec sums[kRows][V] = {};
    for (int64_t b = 0; b < batch; ++b) {
      const float* values = x + b * x_stride;
      Vec d[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) d[v] = load(dy + b * kColumns + first + v * W);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] += values[r] * d[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(out + r * kColumns + first + v * W, sums[r][v]);
    }
  }
}

template <typename T, typename I>
constexpr FanInKernels<T, I> fan_in_table() {
  return {logits<T, I>, kernel_grad<T, I>, input_grad<T, I>};
}

template <typename T>
constexpr LayoutKernels<T> layout_table() {
  return {transpose<T, T>, transpose<T, float>, transpose<float, T>, narrow<T>};
}

}  // namespace

#define XLA_OPS_STRING_(x) #x
#define XLA_OPS_STRING(x) XLA_OPS_STRING_(x)
#define XLA_OPS_TABLE_(isa) isa_##isa
#define XLA_OPS_TABLE(isa) XLA_OPS_TABLE_(isa)

extern const Isa XLA_OPS_TABLE(XLA_OPS_ISA);
const Isa XLA_OPS_TABLE(XLA_OPS_ISA) = {
    XLA_OPS_STRING(XLA_OPS_ISA),
    fan_in_table<float, uint16_t>(),
    fan_in_table<float, int32_t>(),
    fan_in_table<bfloat16, uint16_t>(),
    fan_in_table<bfloat16, int32_t>(),
    layout_table<float>(),
    layout_table<bfloat16>(),
    {negatives<SquaredHinge>, negatives<BinaryCrossEntropy>, row_sums, nonzero, above},
    {adam, adam_bf16, sgd, sgd_stochastic},
    {products},
};

}  // namespace xla_ops
