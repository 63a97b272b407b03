// The connections of labels to packed rows: all of them, or those that read an input of the batch, listed.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_CONNECTIONS_H_
#define XLA_OPS_CSRC_CPU_KERNELS_CONNECTIONS_H_

#include <stdint.h>

#include "../kernels.h"
#include "vector.h"

#if defined(__AVX512F__)
#include <immintrin.h>                                  // whose functions are never compiled on their own
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 takes its undefined vectors for mistakes
#endif

namespace xla_ops {
namespace {

// The packed row of a dense input; an index out of range has the row of zeros.
template <typename I>
XLA_OPS_INLINE int64_t dense_row(I index, int64_t in_features) {
  const uint64_t i = static_cast<uint64_t>(static_cast<int64_t>(index));
  return static_cast<int64_t>(i < static_cast<uint64_t>(in_features) ? i : in_features);
}

// All connections of labels, label after label. An index out of range reads the row of zeros.
template <typename T, typename I>
struct AllConnections {
  const T* kernel;
  const I* indices;
  int64_t in_features, fan_in;

  XLA_OPS_INLINE int64_t begin(int64_t n) const { return n * fan_in; }
  XLA_OPS_INLINE int64_t end(int64_t n) const { return (n + 1) * fan_in; }
  XLA_OPS_INLINE int64_t end_of_dense(int64_t n) const { return end(n); }
  XLA_OPS_INLINE int64_t row(int64_t k) const { return dense_row(indices[k], in_features); }
  XLA_OPS_INLINE float weight(int64_t k) const { return to_float(kernel[k]); }
};

// The connections of labels that were listed.
template <typename T>
struct ListedConnections {
  ConnectionLists<T> lists;

  XLA_OPS_INLINE int64_t begin(int64_t n) const { return lists.first[n]; }
  XLA_OPS_INLINE int64_t end(int64_t n) const { return lists.first[n + 1]; }
  XLA_OPS_INLINE int64_t end_of_dense(int64_t n) const { return lists.end_of_dense[n]; }
  XLA_OPS_INLINE int64_t row(int64_t k) const { return lists.row[k]; }
  XLA_OPS_INLINE float weight(int64_t k) const { return to_float(lists.weight[k]); }
};

struct Counts {
  int64_t dense, sparse;
};

// Appends the rows and the slots (numbers among the connections of the label) of one label's connections to
// dense inputs to `row` and `slot`, and the columns and slots of those to sparse inputs that the batch has to
// `column` and `sparse_slot`. Returns the number of both. Writes up to kLanes elements beyond. Free of
// branches, which would be hard to predict.
#if defined(__AVX512F__)
XLA_OPS_INLINE __m512i load_indices(const uint16_t* p, __mmask16 lanes) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
}
XLA_OPS_INLINE __m512i load_indices(const int32_t* p, __mmask16 lanes) {
  return _mm512_maskz_loadu_epi32(lanes, p);
}

template <typename I>
XLA_OPS_INLINE Counts split(const SparseMap& map, const I* indices, int64_t fan_in, int32_t* row,
                            int32_t* slot, int32_t* column, int32_t* sparse_slot) {
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
      _mm512_storeu_si512(slot + n.dense, position);
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
    _mm512_storeu_si512(slot + n.dense, _mm512_maskz_compress_epi32(dense, position));
    _mm512_storeu_si512(column + n.sparse, _mm512_maskz_compress_epi32(present, columns));
    _mm512_storeu_si512(sparse_slot + n.sparse, _mm512_maskz_compress_epi32(present, position));
    n.dense += __builtin_popcount(dense);
    n.sparse += __builtin_popcount(present);
  }
  return n;
}
#else
template <typename I>
XLA_OPS_INLINE Counts split(const SparseMap& map, const I* indices, int64_t fan_in, int32_t* row,
                            int32_t* slot, int32_t* column, int32_t* sparse_slot) {
  const uint64_t all_dense = static_cast<uint64_t>(map.dense), all_sparse = static_cast<uint64_t>(map.sparse);
  Counts n{0, 0};
  for (int64_t f = 0; f < fan_in; ++f) {
    const uint64_t index = static_cast<uint64_t>(static_cast<int64_t>(indices[f])), c = index - all_dense;
    row[n.dense] = static_cast<int32_t>(index);
    slot[n.dense] = static_cast<int32_t>(f);
    n.dense += index < all_dense;
    const uint64_t inside = c < all_sparse ? c : 0;
    column[n.sparse] = static_cast<int32_t>(c);
    sparse_slot[n.sparse] = static_cast<int32_t>(f);
    n.sparse += (c < all_sparse) & (map.present[inside / 32] >> inside % 32);
  }
  return n;
}
#endif

// Indices come from memory, and are asked for so many labels ahead.
constexpr int64_t kLabelsAhead = 8;

template <typename T, typename I>
void list_connections(const SparseMap& map, const T* kernel, const I* indices, int64_t labels, int64_t fan_in,
                      int32_t* scratch, const ConnectionLists<T>& out) {
  int32_t *const column = scratch, *const sparse_slot = scratch + fan_in + kLanes;
  int64_t end = 0;
  for (int64_t n = 0; n < labels; ++n) {
    int32_t *row = out.row + end, *slot = out.slot + end;
    T* weight = out.weight + end;
    const int64_t ahead = n + kLabelsAhead < labels ? n + kLabelsAhead : labels - 1;
    const char* later = reinterpret_cast<const char*>(indices + ahead * fan_in);
    for (int64_t byte = 0; byte < fan_in * static_cast<int64_t>(sizeof(I)); byte += 64)
      __builtin_prefetch(later + byte);
    const Counts counts = split(map, indices + n * fan_in, fan_in, row, slot, column, sparse_slot);
    for (int64_t k = 0; k < counts.sparse; ++k) {
      row[counts.dense + k] = map.packed_row(column[k]);
      slot[counts.dense + k] = sparse_slot[k];
    }
    for (int64_t k = 0; k < counts.dense + counts.sparse; ++k) weight[k] = kernel[n * fan_in + slot[k]];
    out.first[n] = end;
    out.end_of_dense[n] = end + counts.dense;
    end += counts.dense + counts.sparse;
  }
  out.first[labels] = end;
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_CONNECTIONS_H_
