// The vectorized inner loops, compiled once per instruction set (kernels.cc) and selected at run time
// (isa.cc).
//
// They work on *rows*. For one tile of the batch, at most kTile examples, a row holds the values of one
// label, or of one input, for every example of the tile, so that a connection reads or writes contiguous
// memory. `width` is the length of a row: the number of examples of the tile rounded up to kLanes. A mask
// selects some of the rows of a block of labels, at most kBlock: bit n stands for row n.
//
// The packed inputs of a tile are rows: the dense inputs, a row of zeros, and the sparse inputs that have an
// entry in the batch. An index out of range reads the row of zeros: such a connection contributes nothing and
// changes nothing else. If there are sparse inputs, a list of the connections that do not read the row of
// zeros is made beforehand, once for all tiles. Gradients of packed inputs have rows for the dense inputs and
// the row of zeros only.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_H_
#define XLA_OPS_CSRC_CPU_KERNELS_H_

#include <stdint.h>

#include "../rounding.h"
#include "../types.h"

namespace xla_ops {

constexpr int64_t kLanes = 16;
constexpr int64_t kTile = 64;
// Labels worked on at once. Their rows (kBlock * kTile floats) fit in the first-level cache, and at a fan-in
// of 32 the features that they read, and the gradients of those, in the second-level one.
constexpr int64_t kBlock = 64;

// T is float or bfloat16, I is uint16_t or int32_t.
template <typename T, typename I>
struct FanInKernels {
  // rows[n, width] = bias[n] + sum_f kernel[n, f] * packed[indices[n, f], :]. `bias` may be null.
  void (*logits)(const T* packed, int64_t in_features, int64_t width, const T* kernel, const I* indices,
                 const T* bias, int64_t labels, int64_t fan_in, float* rows);
  // d_kernel[n, f] += sum_b rows[n, b] * packed[indices[n, f], b] for the rows n of a mask.
  void (*kernel_grad)(const T* packed, int64_t in_features, int64_t width, const float* rows, uint64_t mask,
                      const I* indices, int64_t fan_in, float* d_kernel);
  // d_packed[indices[n, f], :] += kernel[n, f] * rows[n, :] for the rows n of a mask.
  void (*input_grad)(const float* rows, uint64_t mask, int64_t in_features, int64_t width, const T* kernel,
                     const I* indices, int64_t fan_in, float* d_packed);
};

// The packed rows if there are sparse inputs, in this order: `dense` dense inputs, the row of zeros, and the
// sparse inputs that have an entry in the batch, out of `sparse`. Bit i of present[w] is set if sparse input
// 32 w + i has one; first[w] is the row of the first of these 32 inputs that has one.
struct SparseMap {
  int64_t dense, sparse;
  const uint32_t* present;
  const int32_t* first;

  // Returns the packed row of a sparse input that has an entry in the batch.
  XLA_OPS_INLINE int32_t packed_row(int64_t column) const {
    const uint32_t before = present[column / 32] & ((uint32_t{1} << column % 32) - 1);
    return first[column / 32] + __builtin_popcount(before);
  }
};

// The connections of some labels that read an input of the batch, label after label. Those of label n are
// [first[n], first[n + 1]), of which those before end_of_dense[n] read a dense input. Connection k reads
// row[k] with weight[k], which is kernel[n, slot[k]].
template <typename T>
struct ConnectionLists {
  int64_t *first, *end_of_dense;
  int32_t *row, *slot;
  T* weight;
};

template <typename T, typename I>
struct ListKernels {
  // Lists the connections of `labels` labels, in order, but dense inputs first. `row` and `slot` have room
  // for kLanes more than all connections; `scratch` has twice the room for the connections of a label and
  // kLanes more.
  void (*list_connections)(const SparseMap& map, const T* kernel, const I* indices, int64_t labels,
                           int64_t fan_in, int32_t* scratch, const ConnectionLists<T>& out);
};

// As FanInKernels, for the first `labels` labels of lists, or those of a mask. The kernel's gradient is
// listed too: d_weight[k] is that of weight[k].
template <typename T>
struct ListedKernels {
  void (*logits)(const T* packed, const ConnectionLists<T>& lists, int64_t width, const T* bias,
                 int64_t labels, float* rows);
  void (*kernel_grad)(const T* packed, const ConnectionLists<T>& lists, int64_t width, const float* rows,
                      uint64_t mask, float* d_weight);
  void (*input_grad)(const float* rows, uint64_t mask, const ConnectionLists<T>& lists, int64_t width,
                     float* d_packed);
};

template <typename T>
struct LayoutKernels {
  // out[r, c] = in[c, r] for r < rows and c < cols; out[r, c] = 0 for cols <= c < out_width.
  // `in` has row stride in_stride, `out` has row stride out_stride >= out_width.
  void (*to_packed)(const T* in, int64_t in_stride, int64_t rows, int64_t cols, int64_t out_width, T* out,
                    int64_t out_stride);
  void (*to_rows)(const T* in, int64_t in_stride, int64_t rows, int64_t cols, int64_t out_width, float* out,
                  int64_t out_stride);
  void (*from_rows)(const float* in, int64_t in_stride, int64_t rows, int64_t cols, int64_t out_width, T* out,
                    int64_t out_stride);
  // out[i] = in[i] in T.
  void (*narrow)(const float* in, int64_t count, T* out);
};

struct RowKernels {
  // For `labels` rows of logits of negatives: returns the sum of the losses of the first `size` examples,
  // replaces each logit by the derivative of its loss times `scale`, the padding by 0, and masks the rows
  // that are not zero.
  float (*squared_hinge)(float* rows, int64_t labels, int64_t width, int64_t size, float scale,
                         uint64_t* mask);
  float (*binary_cross_entropy)(float* rows, int64_t labels, int64_t width, int64_t size, float scale,
                                uint64_t* mask);
  // sums[n] += the sum of row n, for the rows of a mask.
  void (*sums)(const float* rows, uint64_t mask, int64_t width, float* sums);
  // The mask of the rows that are not zero.
  uint64_t (*nonzero)(const float* rows, int64_t labels, int64_t width);
  // The mask of the rows with any row[b] > bounds[b].
  uint64_t (*above)(const float* rows, int64_t labels, int64_t width, const float* bounds);
};

struct AdamStep {
  float learning_rate, b1, b2, epsilon;
  float scale1, scale2;  // 1 / (1 - b1^t) and 1 / (1 - b2^t): undo the moments' start at 0
};

struct UpdateKernels {
  void (*adam_f32)(const float* gradient, int64_t count, const AdamStep& step, float* w, float* mu,
                   float* nu);
  // Of moments in bfloat16 the first is rounded to nearest, the second stochastically, as below.
  void (*adam_bf16)(const float* gradient, int64_t count, const AdamStep& step, const RoundingKey& key,
                    int64_t position, float* w, bfloat16* mu, bfloat16* nu);
  // w -= learning_rate * gradient. In bfloat16 it is rounded stochastically: element i takes the random bits
  // of `position` + i. Runs of kPositions from multiples of kPositions are fast.
  void (*sgd_f32)(const float* gradient, int64_t count, float learning_rate, float* w);
  void (*sgd_bf16)(const float* gradient, int64_t count, float learning_rate, const RoundingKey& key,
                   int64_t position, bfloat16* w);
};

// Columns of a dense layer that are worked on at once, and rows.
constexpr int64_t kColumns = 128;
constexpr int64_t kRows = 4;

struct DenseKernels {
  // out[r, c] = sum_b x[b * x_stride + r] * dy[b, c] for r < kRows and c < kColumns; dy is [batch, kColumns].
  void (*products)(const float* x, int64_t x_stride, const float* dy, int64_t batch, float* out);
};

struct Isa {
  const char* name;
  FanInKernels<float, uint16_t> f32_u16;
  FanInKernels<float, int32_t> f32_s32;
  FanInKernels<bfloat16, uint16_t> bf16_u16;
  FanInKernels<bfloat16, int32_t> bf16_s32;
  ListedKernels<float> listed_f32;
  ListedKernels<bfloat16> listed_bf16;
  ListKernels<float, uint16_t> list_f32_u16;
  ListKernels<float, int32_t> list_f32_s32;
  ListKernels<bfloat16, uint16_t> list_bf16_u16;
  ListKernels<bfloat16, int32_t> list_bf16_s32;
  LayoutKernels<float> f32;
  LayoutKernels<bfloat16> bf16;
  RowKernels rows;
  UpdateKernels updates;
  DenseKernels dense;
};

// The instruction set in use: the best that this processor has, unless select_isa chose a lesser one.
const Isa& isa();
// Chooses by name ("avx512", "avx2", "baseline"); false if this build or processor does not have it.
bool select_isa(const char* name);

template <typename T, typename I>
const FanInKernels<T, I>& fan_in_kernels();
template <typename T, typename I>
const ListKernels<T, I>& list_kernels();
template <typename T>
const ListedKernels<T>& listed_kernels();
template <typename T>
const LayoutKernels<T>& layout_kernels();

template <>
inline const FanInKernels<float, uint16_t>& fan_in_kernels() {
  return isa().f32_u16;
}
template <>
inline const FanInKernels<float, int32_t>& fan_in_kernels() {
  return isa().f32_s32;
}
template <>
inline const FanInKernels<bfloat16, uint16_t>& fan_in_kernels() {
  return isa().bf16_u16;
}
template <>
inline const FanInKernels<bfloat16, int32_t>& fan_in_kernels() {
  return isa().bf16_s32;
}
template <>
inline const ListKernels<float, uint16_t>& list_kernels() {
  return isa().list_f32_u16;
}
template <>
inline const ListKernels<float, int32_t>& list_kernels() {
  return isa().list_f32_s32;
}
template <>
inline const ListKernels<bfloat16, uint16_t>& list_kernels() {
  return isa().list_bf16_u16;
}
template <>
inline const ListKernels<bfloat16, int32_t>& list_kernels() {
  return isa().list_bf16_s32;
}
template <>
inline const ListedKernels<float>& listed_kernels() {
  return isa().listed_f32;
}
template <>
inline const ListedKernels<bfloat16>& listed_kernels() {
  return isa().listed_bf16;
}
template <>
inline const LayoutKernels<float>& layout_kernels() {
  return isa().f32;
}
template <>
inline const LayoutKernels<bfloat16>& layout_kernels() {
  return isa().bf16;
}

inline const RowKernels& row_kernels() { return isa().rows; }
inline const UpdateKernels& update_kernels() { return isa().updates; }
inline const DenseKernels& dense_kernels() { return isa().dense; }

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_H_
