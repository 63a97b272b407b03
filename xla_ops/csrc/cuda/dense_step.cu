// A step of Adam for the kernel of a dense layer, in place. The gradient, the product of the layer's input
// and the gradient of its output, is summed in registers, one tile of the kernel at a time, and never stored.
//
// Memory traffic of the kernel and moments dominates: each is read and written once. Sums are moved to shared
// memory before the update, which frees registers for many outstanding loads. While one block of threads
// sums, the other blocks of its processor wait for memory.

#include <type_traits>

#include "launch.cuh"
#include "layout.h"
#include "updates.cuh"
#include "values.cuh"

namespace xla_ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;                 // per processor, with 80 registers per thread: four would spill
constexpr int kRows = 64, kColumns = 128;  // of a tile
constexpr int kExamples = 16;              // in shared memory at once

// To compute the sums, each warp has some of the rows, and each lane every 32nd column, so that a value read
// from shared memory is used in four or eight products.
constexpr int kWarpRows = kRows / (kThreads / kWarp);
constexpr int kLaneColumns = kColumns / kWarp;

// For the update, each half of a warp has a row, and each lane every 16th column: the columns whose random
// bits come from one counter.
constexpr int kWeights = kColumns / kCounters;
static_assert(kColumns == kPositions && kWarp == 2 * kCounters,
              "a row of a tile is a run of positions, for half a warp");

union Shared {
  struct {
    alignas(16) float x[kExamples][kRows];
    float dy[kExamples][kColumns];
  } operands;
  float sums[kRows][kColumns];
};

// The tile at (row, column) of the kernel.
struct Tile {
  int64_t row, column;
};

// Brings rows [example, example + kExamples) and columns [column, column + kWidth) of a matrix [batch, width]
// into shared memory. Elements outside of the matrix are 0.
template <int kWidth>
__device__ void stage(const float* matrix, int64_t batch, int64_t width, int64_t example, int64_t column,
                      float (&staged)[kExamples][kWidth]) {
  constexpr int kAtOnce = kThreads / kWidth;
  const int first = threadIdx.x / kWidth, c = threadIdx.x % kWidth;
  const int examples = static_cast<int>(min(int64_t{kExamples}, batch - example));
  const bool inside = column + c < width;
  const float* from = matrix + (example + first) * width + column + c;
#pragma unroll
  for (int b = 0; b < kExamples; b += kAtOnce, from += kAtOnce * width) {
    staged[first + b][c] = inside && first + b < examples ? __ldg(from) : 0;
  }
}

// shared.sums = the gradients of the tile's weights, each summed in the order of the batch. To be called by
// all threads of a block.
__device__ inline void sum_gradients(const DenseShape& s, const float* x, const float* dy, const Tile& tile,
                                     Shared& shared) {
  const int first_row = threadIdx.x / kWarp * kWarpRows, lane = threadIdx.x % kWarp;
  float sums[kWarpRows][kLaneColumns] = {};
  for (int64_t example = 0; example < s.batch; example += kExamples) {
    __syncthreads();  // the last examples, or sums, are in use until here
    stage(x, s.batch, s.rows, example, tile.row, shared.operands.x);
    stage(dy, s.batch, s.columns, example, tile.column, shared.operands.dy);
    __syncthreads();
#pragma unroll 4
    for (int b = 0; b < kExamples; ++b) {
      float left[kWarpRows], right[kLaneColumns];
#pragma unroll
      for (int r = 0; r < kWarpRows; r += 4) {
        const float4 four = *reinterpret_cast<const float4*>(&shared.operands.x[b][first_row + r]);
        left[r] = four.x, left[r + 1] = four.y, left[r + 2] = four.z, left[r + 3] = four.w;
      }
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) right[c] = shared.operands.dy[b][c * kWarp + lane];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) sums[r][c] = fmaf(left[r], right[c], sums[r][c]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) shared.sums[first_row + r][c * kWarp + lane] = sums[r][c];
  }
  __syncthreads();
}

// Kernel and moments [D, O], or the parts of them that begin at some weight.
template <typename M>
struct Weights {
  float* w;
  M *mu, *nu;

  __device__ Weights from(int64_t i) const { return {w + i, mu + i, nu + i}; }
};

// Updates every 16th of `columns` weights of a row. If moments are bfloat16, the first is rounded to nearest
// and the second stochastically.
template <typename M>
__device__ void update_row(const Weights<M>& at, int columns, const float* gradients, const AdamStep& step,
                           const RoundingKey& key, uint64_t counter) {
  AdamValues values[kWeights];
#pragma unroll
  for (int n = 0; n < kWeights; ++n) {  // all loads are issued before the first value is used
    const int i = n * kCounters;
    values[n] = {};
    if (i < columns) values[n] = {load_once(at.w + i), load_once(at.mu + i), load_once(at.nu + i)};
  }
  uint32_t words[4] = {};
  if constexpr (std::is_same_v<M, bfloat16>) philox(key, counter, words);
#pragma unroll
  for (int n = 0; n < kWeights; ++n) {
    const int i = n * kCounters;
    if (i < columns) {
      const AdamValues next = step(values[n], gradients[i]);
      at.w[i] = next.w;
      set(at.mu + i, next.mu);
      set(at.nu + i, next.nu, half_of(words, n));
    }
  }
}

template <typename M>
__global__ void __launch_bounds__(kThreads, kBlocks)
    adam_kernel(DenseShape s, const float* __restrict__ x, const float* __restrict__ dy, Weights<M> weights,
                AdamRates rates, const uint32_t* words_of_key) {
  __shared__ Shared shared;
  const AdamStep step(rates);
  const RoundingKey key = load_key(words_of_key);
  const int first_row = threadIdx.x / kCounters, lane = threadIdx.x % kCounters;
  const int64_t tiles_of_rows = ceil_div(s.rows, kRows), runs = ceil_div(s.columns, kPositions);
  for_each_item(tiles_of_rows * runs, [&](int64_t item) {
    // Consecutive items have the same columns, so that dy, the larger matrix, is read from memory once.
    const int64_t run = item / tiles_of_rows;
    const Tile tile{item % tiles_of_rows * kRows, run * kColumns};
    sum_gradients(s, x, dy, tile, shared);
    const int rows = static_cast<int>(min(int64_t{kRows}, s.rows - tile.row));
    const int columns = static_cast<int>(min(int64_t{kColumns}, s.columns - tile.column));
#pragma unroll 1
    for (int r = first_row; r < rows; r += kThreads / kCounters) {
      const int64_t row = tile.row + r;
      // Rows start at multiples of whole runs of positions (csrc/rounding.h).
      const uint64_t counter = (row * runs + run) * kCounters + lane;
      update_row(weights.from(row * s.columns + tile.column + lane), columns - lane, &shared.sums[r][lane],
                 step, key, counter);
    }
  });
}

}  // namespace

template <typename M>
cudaError_t dense_adam_step(cudaStream_t stream, const DenseShape& s, const float* x, const float* dy,
                            float* kernel, M* mu, M* nu, const AdamRates& rates, const uint32_t* key) {
  const int64_t tiles = ceil_div(s.rows, kRows) * ceil_div(s.columns, kColumns);
  return launch(adam_kernel<M>, tiles, kThreads, 0, stream, s, x, dy, Weights<M>{kernel, mu, nu}, rates, key);
}

#define XLA_OPS_INSTANTIATE(M)                                                                         \
  template cudaError_t dense_adam_step<M>(cudaStream_t, const DenseShape&, const float*, const float*, \
                                          float*, M*, M*, const AdamRates&, const uint32_t*);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
