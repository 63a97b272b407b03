// Packs sparse inputs (layout.h): marks the sparse inputs of each tile, numbers their rows, and adds the
// entries to the rows.

#include "launch.cuh"
#include "layout.h"
#include "values.cuh"

namespace xla_ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;
constexpr int kWordsAtOnce = 4;  // of a thread

// The tile, the example in the tile and the sparse input of an entry.
struct Entry {
  // A tile of -1 stands for padding.
  template <typename T>
  __device__ Entry(int64_t n, int64_t batch, const Inputs<T>& inputs) : tile(-1), example(0), column(0) {
    if (n >= inputs.num_entries) return;
    const int64_t row = __ldg(inputs.rows + n);
    column = static_cast<uint32_t>(__ldg(inputs.columns + n));
    if (row < 0 || row >= batch || column >= inputs.num_columns)
      return;  // a negative column is above them all
    tile = row / kTile;
    example = static_cast<int>(row % kTile);
  }
  int64_t tile;
  int example;
  uint32_t column;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mark_kernel(int64_t batch, const Inputs<T> inputs, const SparseMap map) {
  for_each_item(ceil_div(inputs.num_entries, kThreads), [&](int64_t item) {
    const Entry entry(item * kThreads + threadIdx.x, batch, inputs);
    if (entry.tile >= 0)
      atomicOr(&map.tile(entry.tile)[entry.column / 32].present, 1u << (entry.column % 32));
  });
}

// The sum of `value` over the threads before this one, and over all. To be called by all threads of a block.
struct Sums {
  uint32_t before, all;
};
__device__ inline Sums sum_of_threads(uint32_t value, uint32_t (&warps)[kScanThreads / kWarp]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t sum = value;
#pragma unroll
  for (int other = 1; other < kWarp; other *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, sum, other);
    if (lane >= other) sum += below;
  }
  __syncthreads();  // the last sums may still be in use
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  Sums sums{sum - value, 0};
  for (int w = 0; w < kScanThreads / kWarp; ++w) {
    if (w < warp) sums.before += warps[w];
    sums.all += warps[w];
  }
  return sums;
}

// Numbers the rows of each tile, and writes the number of rows per tile to `starts`; starts_kernel then
// replaces these by their prefix sums.
__global__ void __launch_bounds__(kScanThreads) number_kernel(int64_t tiles, const SparseMap map) {
  __shared__ uint32_t warps[kScanThreads / kWarp];
  for_each_item(tiles, [&](int64_t tile) {
    Word* const words = map.tile(tile);
    const int64_t count = map.words_of_tile();
    uint32_t rows = 0;
    for (int64_t first = 0; first < count; first += kScanThreads * kWordsAtOnce) {
      const int64_t at = first + threadIdx.x * kWordsAtOnce;
      uint32_t present[kWordsAtOnce], mine = 0;
#pragma unroll
      for (int i = 0; i < kWordsAtOnce; ++i) {
        present[i] = at + i < count ? words[at + i].present : 0;
        mine += __popc(present[i]);
      }
      const Sums sums = sum_of_threads(mine, warps);
      uint32_t next = rows + sums.before;
#pragma unroll
      for (int i = 0; i < kWordsAtOnce; ++i) {
        if (at + i < count) words[at + i].first = next;
        next += __popc(present[i]);
      }
      rows += sums.all;
    }
    if (threadIdx.x == 0) map.starts[tile] = static_cast<int32_t>(rows);
  });
}

// Replaces the number of rows of each tile by the number of rows of all tiles before it. Runs in one block of
// threads.
__global__ void __launch_bounds__(kScanThreads) starts_kernel(int64_t tiles, int32_t* starts) {
  __shared__ uint32_t warps[kScanThreads / kWarp];
  uint32_t before = 0;
  for (int64_t first = 0; first < tiles; first += kScanThreads) {
    const int64_t tile = first + threadIdx.x;
    const Sums sums = sum_of_threads(tile < tiles ? static_cast<uint32_t>(starts[tile]) : 0, warps);
    if (tile < tiles) starts[tile] = static_cast<int32_t>(before + sums.before);
    before += sums.all;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_kernel(int64_t batch, const Inputs<T> inputs, const SparseMap map, float* __restrict__ sums) {
  for_each_item(ceil_div(inputs.num_entries, kThreads), [&](int64_t item) {
    const int64_t n = item * kThreads + threadIdx.x;
    const Entry entry(n, batch, inputs);
    if (entry.tile < 0) return;
    const Word word = load_word(map.tile(entry.tile), entry.column);
    const int64_t row = int64_t{__ldg(map.starts + entry.tile)} + word.row(entry.column);
    atomicAdd(sums + row * kTile + entry.example, load_once(inputs.values + n));
  });
}

__global__ void __launch_bounds__(kThreads)
    round_kernel(const float* __restrict__ sums, int64_t count, bfloat16* __restrict__ rows) {
  for_each_item(ceil_div(count, kThreads), [&](int64_t item) {
    const int64_t i = item * kThreads + threadIdx.x;
    if (i < count) set(rows + i, sums[i]);
  });
}

}  // namespace

int64_t max_sparse_rows(int64_t batch, int64_t num_entries, int64_t num_columns) {
  return std::min(num_entries, ceil_div(batch, kTile) * num_columns);
}

template <typename T>
cudaError_t pack_sparse(cudaStream_t stream, int64_t batch, const Inputs<T>& inputs, const SparseMap& map,
                        float* sums) {
  const int64_t tiles = ceil_div(batch, kTile), blocks = ceil_div(inputs.num_entries, kThreads);
  const int64_t count = max_sparse_rows(batch, inputs.num_entries, inputs.num_columns) * kTile;
  XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, map.words, tiles * map.words_of_tile()));
  XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, sums, count));
  XLA_OPS_RETURN_IF_CUDA_ERROR(launch(mark_kernel<T>, blocks, kThreads, 0, stream, batch, inputs, map));
  XLA_OPS_RETURN_IF_CUDA_ERROR(launch(number_kernel, tiles, kScanThreads, 0, stream, tiles, map));
  XLA_OPS_RETURN_IF_CUDA_ERROR(launch(starts_kernel, 1, kScanThreads, 0, stream, tiles, map.starts));
  return launch(add_kernel<T>, blocks, kThreads, 0, stream, batch, inputs, map, sums);
}

cudaError_t round_sums(cudaStream_t stream, const float* sums, int64_t count, bfloat16* rows) {
  return launch(round_kernel, ceil_div(count, kThreads), kThreads, 0, stream, sums, count, rows);
}

#define XLA_OPS_INSTANTIATE(T) \
  template cudaError_t pack_sparse<T>(cudaStream_t, int64_t, const Inputs<T>&, const SparseMap&, float*);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
