// See layout.h. Both directions transpose squares of 32 features by 32 examples through shared memory, so
// that reads and writes are of whole runs of memory.

#include "layout.h"

#include <cstdint>
#include <type_traits>

#include "gradients.cuh"
#include "launch.cuh"
#include "staging.cuh"
#include "values.cuh"

namespace xla_ops::cuda {
namespace {

constexpr int kRowsAtOnce = 8;
constexpr int kThreads = kTile * kRowsAtOnce;

// Features [feature, feature + kTile) of tile `tile`.
struct Square {
  __device__ Square(int64_t item, int64_t rows)
      : tile(item / ceil_div(rows, kTile)), feature(item % ceil_div(rows, kTile) * kTile) {}
  int64_t tile, feature;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Shape s, const T* __restrict__ x, T* __restrict__ packed) {
  __shared__ float square[kTile][kTile + 1];
  const int64_t rows = s.in_features + 1;
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile;
  for_each_item(ceil_div(s.batch, kTile) * ceil_div(rows, kTile), [&](int64_t item) {
    const Square at(item, rows);
    for (int i = row; i < kTile; i += kRowsAtOnce) {
      const int64_t example = at.tile * kTile + i, feature = at.feature + column;
      const bool inside = example < s.batch && feature < s.in_features;
      square[i][column] = inside ? to_float(x[example * s.in_features + feature]) : 0;
    }
    __syncthreads();
    for (int i = row; i < kTile && at.feature + i < rows; i += kRowsAtOnce) {
      set(packed + (at.tile * rows + at.feature + i) * kTile + column, square[column][i]);
    }
    __syncthreads();
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Shape s, const float* __restrict__ sums, T* __restrict__ d_x) {
  __shared__ float square[kTile][kTile + 1];
  const int64_t rows = s.in_features;
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile;
  for_each_item(ceil_div(s.batch, kTile) * ceil_div(rows, kTile), [&](int64_t item) {
    const Square at(item, rows);
    for (int i = row; i < kTile && at.feature + i < rows; i += kRowsAtOnce) {
      square[i][column] = sums[(at.tile * rows + at.feature + i) * kTile + sum_position<T>(column)];
    }
    __syncthreads();
    for (int i = row; i < kTile && at.tile * kTile + i < s.batch; i += kRowsAtOnce) {
      if (at.feature + column < rows) {
        set(d_x + (at.tile * kTile + i) * rows + at.feature + column, square[column][i]);
      }
    }
    __syncthreads();
  });
}

}  // namespace

template <typename T>
Packed<T> take_packed(Workspace& workspace, const Shape& s, const Inputs<T>& inputs) {
  const int64_t tiles = ceil_div(s.batch, kTile), dense = tiles * (s.in_features + 1) * kTile;
  if (inputs.num_columns == 0) return {workspace.take<T>(dense), nullptr, {0, nullptr, nullptr}};
  const int64_t sparse = max_sparse_rows(s.batch, inputs.num_entries, inputs.num_columns) * kTile;
  Packed<T> packed{workspace.take<T>(dense + sparse), nullptr, {inputs.num_columns, nullptr, nullptr}};
  packed.map.words = workspace.take<Word>(tiles * packed.map.words_of_tile());
  packed.map.starts = workspace.take<int32_t>(tiles);
  if constexpr (!std::is_same_v<T, float>) packed.sums = workspace.take<float>(sparse);
  return packed;
}

template <typename T>
cudaError_t pack(cudaStream_t stream, const Shape& s, const Inputs<T>& inputs, const Packed<T>& packed) {
  const int64_t tiles = ceil_div(s.batch, kTile), dense = tiles * (s.in_features + 1);
  const int64_t sparse = max_sparse_rows(s.batch, inputs.num_entries, inputs.num_columns);
  if (inputs.num_columns > 0 && std::max(dense + sparse, s.in_features + inputs.num_columns) > INT32_MAX) {
    return cudaErrorInvalidValue;  // a Connection could not tell them apart
  }
  if (s.fan_in > INT32_MAX - kConnections)
    return cudaErrorInvalidValue;  // kernels count connections in 32 bits
  const int64_t items = tiles * ceil_div(s.in_features + 1, kTile);
  XLA_OPS_RETURN_IF_CUDA_ERROR(launch(pack_kernel<T>, items, kThreads, 0, stream, s, inputs.x, packed.rows));
  if (inputs.num_columns == 0) return cudaSuccess;
  T* const rows = packed.rows + dense * kTile;
  if constexpr (std::is_same_v<T, float>) {
    return pack_sparse(stream, s.batch, inputs, packed.map, rows);
  } else {
    XLA_OPS_RETURN_IF_CUDA_ERROR(pack_sparse(stream, s.batch, inputs, packed.map, packed.sums));
    return round_sums(stream, packed.sums, sparse * kTile, rows);
  }
}

int64_t sums_count(const Shape& s) { return ceil_div(s.batch, kTile) * s.in_features * kTile; }

template <typename T>
cudaError_t unpack_sums(cudaStream_t stream, const Shape& s, const float* sums, T* d_x) {
  const int64_t items = ceil_div(s.batch, kTile) * ceil_div(s.in_features, kTile);
  return launch(unpack_kernel<T>, items, kThreads, 0, stream, s, sums, d_x);
}

#define XLA_OPS_INSTANTIATE(T)                                                                  \
  template Packed<T> take_packed<T>(Workspace&, const Shape&, const Inputs<T>&);                \
  template cudaError_t pack<T>(cudaStream_t, const Shape&, const Inputs<T>&, const Packed<T>&); \
  template cudaError_t unpack_sums<T>(cudaStream_t, const Shape&, const float*, T*);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
