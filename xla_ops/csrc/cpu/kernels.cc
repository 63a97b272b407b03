// See kernels.h. setup.py compiles this file once per instruction set, with XLA_OPS_ISA naming it.
//
// No header with functions that could be compiled on their own is included, and everything but the exported
// table has internal linkage: an inline function of the standard library compiled here with AVX-512 could
// otherwise be the copy that the linker keeps for the whole program, and crash processors without it.

#include "kernels.h"

#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>                                  // whose functions are never compiled on their own
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 takes its undefined vectors for mistakes
#endif

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

// An index as a row of the packed inputs; every index out of range becomes the row of zeros.
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

// The connections of labels, label after label: all of them, each reading a row.
template <typename T, typename I>
struct All {
  const T* kernel;
  const I* indices;
  int64_t in_features, fan_in;

  XLA_OPS_INLINE int64_t begin(int64_t n) const { return n * fan_in; }
  XLA_OPS_INLINE int64_t end(int64_t n) const { return (n + 1) * fan_in; }
  XLA_OPS_INLINE int64_t end_of_dense(int64_t n) const { return end(n); }
  XLA_OPS_INLINE int64_t row(int64_t k) const { return row_of(indices[k], in_features); }
  XLA_OPS_INLINE float weight(int64_t k) const { return to_float(kernel[k]); }
};

// The same of connections that were listed.
template <typename T>
struct Chosen {
  Lists<T> lists;

  XLA_OPS_INLINE int64_t begin(int64_t n) const { return lists.first[n]; }
  XLA_OPS_INLINE int64_t end(int64_t n) const { return lists.first[n + 1]; }
  XLA_OPS_INLINE int64_t end_of_dense(int64_t n) const { return lists.dense[n]; }
  XLA_OPS_INLINE int64_t row(int64_t k) const { return lists.row[k]; }
  XLA_OPS_INLINE float weight(int64_t k) const { return to_float(lists.weight[k]); }
};

// Calls fn<NV>(...) with NV = the number of vectors in a row of `width`, so that a row stays in registers.
#define XLA_OPS_FOR_WIDTH(fn, width, ...)            \
  switch ((width) / kLanes) {                        \
    case 1: return fn<1 * kLanes / W>(__VA_ARGS__);  \
    case 2: return fn<2 * kLanes / W>(__VA_ARGS__);  \
    case 3: return fn<3 * kLanes / W>(__VA_ARGS__);  \
    default: return fn<4 * kLanes / W>(__VA_ARGS__); \
  }
static_assert(kTile == 4 * kLanes, "XLA_OPS_FOR_WIDTH covers every width");

// The gather's latency is hidden by asking for the rows of later connections while those before are summed.
constexpr int64_t kAhead = 48;
template <int NV, int Write, typename T>
XLA_OPS_INLINE void prefetch(const T* packed, int64_t row) {
  const char* start = reinterpret_cast<const char*>(packed + row * NV * W);
#pragma GCC unroll 16
  for (int64_t byte = 0; byte < static_cast<int64_t>(NV * W * sizeof(T)); byte += 64) {
    __builtin_prefetch(start + byte, Write);
  }
}

template <int NV, typename T, typename Connections>
void logits_of_width(const T* packed, const Connections& connections, const T* bias, int64_t labels,
                     float* rows) {
  const int64_t last = connections.end(labels - 1) - 1;
  int64_t k = connections.begin(0);
  for (int64_t n = 0; n < labels; ++n) {
    Vec sum[NV];
    const Vec start = Vec{} + (bias ? to_float(bias[n]) : 0.0f);
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) sum[i] = start;
    for (const int64_t end = connections.end(n); k < end; ++k) {
      prefetch<NV, 0>(packed, connections.row(k + kAhead < last ? k + kAhead : last));
      const T* x = packed + connections.row(k) * NV * W;
      const float weight = connections.weight(k);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) sum[i] += weight * load(x + i * W);
    }
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) store(rows + (n * NV + i) * W, sum[i]);
  }
}

// The products of two rows, not yet summed over the lanes.
template <int NV, typename T>
XLA_OPS_INLINE Vec products_of_rows(const float* row, const T* x) {
  Vec s = load(row) * load(x);
#pragma GCC unroll 16
  for (int i = 1; i < NV; ++i) s += load(row + i * W) * load(x + i * W);
  return s;
}

// d[k] += the gradient of connection k's weight.
template <int NV, typename T, typename Connections>
void kernel_grad_of_width(const T* packed, const Connections& connections, const float* rows, uint64_t mask,
                          float* d) {
  for (; mask; mask &= mask - 1) {
    const int64_t n = __builtin_ctzll(mask), end = connections.end(n);
    const float* row = rows + n * NV * W;
    int64_t k = connections.begin(n);
    for (; k + W <= end; k += W) {  // W connections at a time, summed over the lanes together
      Vec sum[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j)
        sum[j] = products_of_rows<NV>(row, packed + connections.row(k + j) * NV * W);
      SumLanes<1>::run(sum);
      store(d + k, load(d + k) + sum[0]);
    }
    for (; k < end; ++k) d[k] += sum_lanes(products_of_rows<NV>(row, packed + connections.row(k) * NV * W));
  }
}

template <int NV, typename Connections>
void input_grad_of_width(const float* rows, uint64_t mask, const Connections& connections, float* d_packed) {
  for (; mask; mask &= mask - 1) {
    const int64_t n = __builtin_ctzll(mask), end = connections.end_of_dense(n);
    const uint64_t others = mask & (mask - 1);
    const int64_t next = others ? __builtin_ctzll(others) : n, end_of_next = connections.end_of_dense(next);
    Vec row[NV];
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) row[i] = load(rows + (n * NV + i) * W);
    for (int64_t k = connections.begin(n), ahead = connections.begin(next); k < end; ++k, ++ahead) {
      if (ahead < end_of_next) prefetch<NV, 1>(d_packed, connections.row(ahead));
      float* d = d_packed + connections.row(k) * NV * W;
      const float weight = connections.weight(k);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) store(d + i * W, load(d + i * W) + weight * row[i]);
    }
  }
}

template <typename T, typename I>
void logits(const T* packed, int64_t in_features, int64_t width, const T* kernel, const I* indices,
            const T* bias, int64_t labels, int64_t fan_in, float* rows) {
  const All<T, I> all{kernel, indices, in_features, fan_in};
  XLA_OPS_FOR_WIDTH(logits_of_width, width, packed, all, bias, labels, rows);
}
template <typename T, typename I>
void kernel_grad(const T* packed, int64_t in_features, int64_t width, const float* rows, uint64_t mask,
                 const I* indices, int64_t fan_in, float* d_kernel) {
  const All<T, I> all{nullptr, indices, in_features, fan_in};
  XLA_OPS_FOR_WIDTH(kernel_grad_of_width, width, packed, all, rows, mask, d_kernel);
}
template <typename T, typename I>
void input_grad(const float* rows, uint64_t mask, int64_t in_features, int64_t width, const T* kernel,
                const I* indices, int64_t fan_in, float* d_packed) {
  const All<T, I> all{kernel, indices, in_features, fan_in};
  XLA_OPS_FOR_WIDTH(input_grad_of_width, width, rows, mask, all, d_packed);
}

template <typename T>
void listed_logits(const T* packed, const Lists<T>& lists, int64_t width, const T* bias, int64_t labels,
                   float* rows) {
  const Chosen<T> chosen{lists};
  XLA_OPS_FOR_WIDTH(logits_of_width, width, packed, chosen, bias, labels, rows);
}
template <typename T>
void listed_kernel_grad(const T* packed, const Lists<T>& lists, int64_t width, const float* rows,
                        uint64_t mask, float* d_weight) {
  const Chosen<T> chosen{lists};
  XLA_OPS_FOR_WIDTH(kernel_grad_of_width, width, packed, chosen, rows, mask, d_weight);
}
template <typename T>
void listed_input_grad(const float* rows, uint64_t mask, const Lists<T>& lists, int64_t width,
                       float* d_packed) {
  const Chosen<T> chosen{lists};
  XLA_OPS_FOR_WIDTH(input_grad_of_width, width, rows, mask, chosen, d_packed);
}

// ---- listing connections ----

// Appends one label's connections to a dense input to row and at, those to sparse inputs that the batch has
// to column and at_sparse, and returns how many there are of each. Which they are is hard to predict: no
// branches. Writes up to kLanes elements beyond.
struct Counts {
  int64_t dense, sparse;
};
#if defined(__AVX512F__)
XLA_OPS_INLINE __m512i load_indices(const uint16_t* p, __mmask16 lanes) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
}
XLA_OPS_INLINE __m512i load_indices(const int32_t* p, __mmask16 lanes) {
  return _mm512_maskz_loadu_epi32(lanes, p);
}

template <typename I>
XLA_OPS_INLINE Counts split(const SparseMap& map, const I* indices, int64_t fan_in, int32_t* row, int32_t* at,
                            int32_t* column, int32_t* at_sparse) {
  static_assert(kLanes == 16, "a vector of int32");
  const __m512i all_dense = _mm512_set1_epi32(static_cast<int32_t>(map.dense));
  const __m512i all_sparse = _mm512_set1_epi32(static_cast<int32_t>(map.sparse));
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  Counts n{0, 0};
  for (int64_t f = 0; f < fan_in; f += 16) {
    const __mmask16 lanes = static_cast<__mmask16>(fan_in - f < 16 ? (1u << (fan_in - f)) - 1 : 0xffff);
    const __m512i index = load_indices(indices + f, lanes), columns = _mm512_sub_epi32(index, all_dense);
    const __m512i position = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(f)));
    const __mmask16 dense = _mm512_mask_cmplt_epu32_mask(lanes, index, all_dense);
    if (dense == 0xffff) {  // as of labels whose connections are in order
      _mm512_storeu_si512(row + n.dense, index);
      _mm512_storeu_si512(at + n.dense, position);
      n.dense += 16;
      continue;
    }
    const __mmask16 sparse = _mm512_mask_cmplt_epu32_mask(lanes & ~dense, columns, all_sparse);
    const __m512i words = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), sparse,
                                                      _mm512_srli_epi32(columns, 5), map.present, 4);
    const __m512i bit =
        _mm512_sllv_epi32(_mm512_set1_epi32(1), _mm512_and_epi32(columns, _mm512_set1_epi32(31)));
    const __mmask16 present = _mm512_mask_test_epi32_mask(sparse, words, bit);
    _mm512_storeu_si512(row + n.dense, _mm512_maskz_compress_epi32(dense, index));
    _mm512_storeu_si512(at + n.dense, _mm512_maskz_compress_epi32(dense, position));
    _mm512_storeu_si512(column + n.sparse, _mm512_maskz_compress_epi32(present, columns));
    _mm512_storeu_si512(at_sparse + n.sparse, _mm512_maskz_compress_epi32(present, position));
    n.dense += __builtin_popcount(dense);
    n.sparse += __builtin_popcount(present);
  }
  return n;
}
#else
template <typename I>
XLA_OPS_INLINE Counts split(const SparseMap& map, const I* indices, int64_t fan_in, int32_t* row, int32_t* at,
                            int32_t* column, int32_t* at_sparse) {
  const uint64_t all_dense = static_cast<uint64_t>(map.dense), all_sparse = static_cast<uint64_t>(map.sparse);
  Counts n{0, 0};
  for (int64_t f = 0; f < fan_in; ++f) {
    const uint64_t index = static_cast<uint64_t>(static_cast<int64_t>(indices[f])), c = index - all_dense;
    row[n.dense] = static_cast<int32_t>(index);
    at[n.dense] = static_cast<int32_t>(f);
    n.dense += index < all_dense;
    const uint64_t inside = c < all_sparse ? c : 0;
    column[n.sparse] = static_cast<int32_t>(c);
    at_sparse[n.sparse] = static_cast<int32_t>(f);
    n.sparse += (c < all_sparse) & (map.present[inside / 32] >> inside % 32);
  }
  return n;
}
#endif

// Indices come from memory, and are asked for so many labels ahead.
constexpr int64_t kLabelsAhead = 8;

template <typename T, typename I>
void list(const SparseMap& map, const T* kernel, const I* indices, int64_t labels, int64_t fan_in,
          int32_t* spare, const Lists<T>& out) {
  int32_t *const column = spare, *const at_sparse = spare + fan_in + kLanes;
  int64_t end = 0;
  for (int64_t n = 0; n < labels; ++n) {
    int32_t *row = out.row + end, *at = out.at + end;
    T* weight = out.weight + end;
    const int64_t ahead = n + kLabelsAhead < labels ? n + kLabelsAhead : labels - 1;
    const char* later = reinterpret_cast<const char*>(indices + ahead * fan_in);
    for (int64_t byte = 0; byte < fan_in * static_cast<int64_t>(sizeof(I)); byte += 64)
      __builtin_prefetch(later + byte);
    const Counts counts = split(map, indices + n * fan_in, fan_in, row, at, column, at_sparse);
    for (int64_t k = 0; k < counts.sparse; ++k) {
      row[counts.dense + k] = map.row_of(column[k]);
      at[counts.dense + k] = at_sparse[k];
    }
    for (int64_t k = 0; k < counts.dense + counts.sparse; ++k) weight[k] = kernel[n * fan_in + at[k]];
    out.first[n] = end;
    out.dense[n] = end + counts.dense;
    end += counts.dense + counts.sparse;
  }
  out.first[labels] = end;
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
  const IVec n =
      __builtin_convertvector(shifted, IVec);  // truncates, so rounds x / ln 2 to nearest for x <= 0
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

// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) for one counter, or
// for a vector of them.
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

// values.one(i), or the vector values.many(i), rounded into out[i]: each is asked for once. What
// values.keeps(i), or of a run values.keeps_run(i), says to keep stays as it is.
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

void adam_bf16(const float* gradient, int64_t count, const AdamStep& step, const RoundingKey& key,
               int64_t position, float* w, bfloat16* mu, bfloat16* nu) {
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
constexpr ListedKernels<T> listed_table() {
  return {listed_logits<T>, listed_kernel_grad<T>, listed_input_grad<T>};
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
    listed_table<float>(),
    listed_table<bfloat16>(),
    {list<float, uint16_t>},
    {list<float, int32_t>},
    {list<bfloat16, uint16_t>},
    {list<bfloat16, int32_t>},
    layout_table<float>(),
    layout_table<bfloat16>(),
    {negatives<SquaredHinge>, negatives<BinaryCrossEntropy>, row_sums, nonzero, above},
    {adam, adam_bf16, sgd, sgd_stochastic},
    {products},
};

}  // namespace xla_ops
