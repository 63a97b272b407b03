// The vectorised inner loops, compiled once per instruction set from kernels.cc and picked at run time.
//
// All of them work on *rows*: for one tile of the batch (at most kTile examples) and a run of labels, a row
// holds one label's values for every example of the tile, so that a connection reads or writes one
// contiguous run of memory. `width` is a tile's row length: its number of examples rounded up to kLanes.
// Of a block's rows, at most kBlock, a mask names some: bit n stands for row n.
//
// Packed inputs are rows of `width` per tile: the dense inputs, a row of zeros, and the sparse inputs that an
// example of the batch has. An index out of range reads the zeros: such a connection contributes nothing and
// touches nothing else. Where there are sparse inputs, the connections that read anything are listed first,
// once for all tiles. Gradients are those of the dense inputs and the zeros.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_H_
#define XLA_OPS_CSRC_CPU_KERNELS_H_

#include <stdint.h>

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

// The packed row of each input where there are sparse ones: `dense` dense inputs are row by row, then come
// `sparse` sparse ones. Of those, bit i of present[w] says whether the batch has input 32 w + i, and first[w]
// is the row of the first one that it has.
struct SparseMap {
  int64_t dense, sparse;
  const uint32_t* present;
  const int32_t* first;

  // The row of a sparse input that the batch has. Inlined always: no instruction set's copy may serve
  // another.
  __attribute__((always_inline)) int32_t row_of(int64_t column) const {
    const uint32_t before = present[column / 32] & ((uint32_t{1} << column % 32) - 1);
    return first[column / 32] + __builtin_popcount(before);
  }
};

// The connections of some labels that read anything, label after label. Those of label n are [first[n],
// first[n + 1]), of which those before dense[n] read a dense input: number k reads row[k] by weight[k], which
// is kernel[n, at[k]].
template <typename T>
struct Lists {
  int64_t *first, *dense;
  int32_t *row, *at;
  T* weight;
};

template <typename T, typename I>
struct ListKernels {
  // Lists the connections of `labels` labels, in order, but dense inputs first. `row` and `at` have room for
  // kLanes more than all connections, `spare` for those of a label, and kLanes more, twice.
  void (*list)(const SparseMap& map, const T* kernel, const I* indices, int64_t labels, int64_t fan_in,
               int32_t* spare, const Lists<T>& out);
};

// As FanInKernels, of `labels` labels of lists that start there, or of a mask. The kernel's gradient is
// listed too: d_weight[k] is that of weight[k].
template <typename T>
struct ListedKernels {
  void (*logits)(const T* packed, const Lists<T>& lists, int64_t width, const T* bias, int64_t labels,
                 float* rows);
  void (*kernel_grad)(const T* packed, const Lists<T>& lists, int64_t width, const float* rows, uint64_t mask,
                      float* d_weight);
  void (*input_grad)(const float* rows, uint64_t mask, const Lists<T>& lists, int64_t width, float* d_packed);
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

// What the random bits of one step's rounding are drawn from.
struct RoundingKey {
  uint32_t seed[2];
  uint32_t step;
};

struct UpdateKernels {
  void (*adam_f32)(const float* gradient, int64_t count, const AdamStep& step, float* w, float* mu,
                   float* nu);
  // Of moments in bfloat16 the first is rounded to nearest, the second stochastically, as below.
  void (*adam_bf16)(const float* gradient, int64_t count, const AdamStep& step, const RoundingKey& key,
                    int64_t position, float* w, bfloat16* mu, bfloat16* nu);
  // w -= learning_rate * gradient. In bfloat16 it is rounded up or down at random, so that it is right on
  // average: the low 16 bits of the float32 result are added to 16 random ones, and the carry decides.
  // Element i takes the bits of position p = position + i, which are those of Philox4x32-10 with key `seed`
  // and counter (c mod 2^32, c / 2^32, step, 0), c = p / 128 * 16 + p % 16: of word p % 128 / 32, the half p
  // / 16 % 2 (0: low). Runs of 128 from multiples of 128 are fast.
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
