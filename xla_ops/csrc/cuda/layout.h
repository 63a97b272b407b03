// Between matrices of XLA's, [batch, D], and the packed form of the kernels, [tiles, rows, kTile]
// (layer.cuh).
//
// A sparse input that no example of a tile has gets no row there. Rows are numbered in the order of columns:
// a bit for each column says whether the tile has it, and each 32 of them have the number of their first row.

#ifndef XLA_OPS_CSRC_CUDA_LAYOUT_H_
#define XLA_OPS_CSRC_CUDA_LAYOUT_H_

#include "kernels.h"

namespace xla_ops::cuda {

constexpr int kTile = 32;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 32 sparse inputs.
struct alignas(8) Word {
  uint32_t present;  // a bit for each that the tile has
  uint32_t first;    // the number of the first one's row

  __device__ bool has(uint32_t column) const { return present >> (column % 32) & 1; }
  // The number of its row, if the tile has it.
  __device__ int32_t row(uint32_t column) const {
    return static_cast<int32_t>(first + __popc(present & ((1u << (column % 32)) - 1)));
  }
};
__device__ inline Word load_word(const Word* words, uint32_t column) {
  const uint2 word = __ldg(reinterpret_cast<const uint2*>(words + column / 32));
  return {word.x, word.y};
}

// Where the rows of sparse inputs are: behind those of x, tile after tile. `num_columns` is 0 if there are
// none.
struct SparseMap {
  int64_t num_columns;
  Word* words;      // [tiles, ceil(num_columns / 32)]
  int32_t* starts;  // [tiles], how many rows come before the tile's

  __host__ __device__ int64_t words_of_tile() const { return ceil_div(num_columns, 32); }
  __host__ __device__ Word* tile(int64_t t) const { return words + t * words_of_tile(); }
};

// The packed form of inputs, in a workspace: x has a row of zeros after the last feature of each tile.
template <typename T>
struct Packed {
  T* rows;      // [tiles, D + 1, kTile], and [sparse rows, kTile]
  float* sums;  // [sparse rows, kTile], if T is too narrow to add up in
  SparseMap map;
};
template <typename T>
Packed<T> take_packed(Workspace& workspace, const Shape& s, const Inputs<T>& inputs);

// packed = that form of the inputs.
template <typename T>
cudaError_t pack(cudaStream_t stream, const Shape& s, const Inputs<T>& inputs, const Packed<T>& packed);

// Returns the most sparse rows that all tiles together can have.
int64_t max_sparse_rows(int64_t batch, int64_t num_entries, int64_t num_columns);

// map = which sparse inputs each tile has; sums = their rows, added up. Entries that are given more than once
// are added atomically: of three or more the order, and so the last bits, may differ from run to run.
template <typename T>
cudaError_t pack_sparse(cudaStream_t stream, int64_t batch, const Inputs<T>& inputs, const SparseMap& map,
                        float* sums);

// rows = sums, rounded.
cudaError_t round_sums(cudaStream_t stream, const float* sums, int64_t count, bfloat16* rows);

// Returns the number of the packed sums for d_x, which have no row of zeros.
int64_t sums_count(const Shape& s);

// d_x [B, D] = packed sums, whose order within a row is that of sum_position (gradients.cuh).
template <typename T>
cudaError_t unpack_sums(cudaStream_t stream, const Shape& s, const float* sums, T* d_x);

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_LAYOUT_H_
