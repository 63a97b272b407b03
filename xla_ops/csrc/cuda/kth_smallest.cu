// The k-th smallest magnitude of an array, from counts of the values of its bits: their order is that of
// magnitudes. Some bits at a time, from the top: counts the elements by their next bits, among those whose
// bits so far are those of the one looked for. Counts are whole numbers, so that the order of adding them
// does not matter.

#include <iterator>

#include "launch.cuh"
#include "layout.h"
#include "values.cuh"

namespace xla_ops::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kMostBins = 1 << 11;
constexpr int kRuns = 64;  // of bins
constexpr struct {
  int shift, bits;
} kDigits[] = {{20, 11}, {10, 10}, {0, 10}};  // 31 bits, without the sign
using Count = unsigned long long;             // what atomicAdd takes

// The bits of the result that are known.
struct Found {
  uint32_t bits;  // the top ones
  Count rank;     // among the elements that have these bits
};

__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

// counts[value of the digit] += how many of x have it, among those that agree with what has been found.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const T* __restrict__ x, int64_t n, int shift, int bits, const Found* __restrict__ found,
                 Count* counts) {
  __shared__ uint32_t of_block[kMostBins];
  for (int i = threadIdx.x; i < kMostBins; i += kThreads) of_block[i] = 0;
  __syncthreads();
  const uint32_t above = found->bits >> shift >> bits;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += int64_t{gridDim.x} * kThreads) {
    const uint32_t value = magnitude(load_once(x + i)) >> shift;
    if (value >> bits == above) atomicAdd(&of_block[value & ((1u << bits) - 1)], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kMostBins; i += kThreads) {
    if (of_block[i] > 0) atomicAdd(&counts[i], Count{of_block[i]});
  }
}

// Finds the digit, and writes the result as far as it is known.
__global__ void __launch_bounds__(kRuns)
    find_kernel(const Count* __restrict__ counts, int shift, Found* found, float* __restrict__ result) {
  constexpr int kRun = kMostBins / kRuns;
  __shared__ Count sums[kRuns];
  Count sum = 0;
  for (int i = 0; i < kRun; ++i) sum += counts[threadIdx.x * kRun + i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  Count rank = found->rank;
  int run = 0;
  while (rank > sums[run]) rank -= sums[run++];
  int digit = run * kRun;
  while (rank > counts[digit]) rank -= counts[digit++];
  found->bits |= static_cast<uint32_t>(digit) << shift;
  found->rank = rank;
  *result = __uint_as_float(found->bits);
}

__global__ void start_kernel(Count k, Found* found) { *found = {0, k}; }

}  // namespace

template <typename T>
cudaError_t kth_smallest(cudaStream_t stream, Workspace& workspace, const T* x, int64_t n, int64_t k,
                         float* result) {
  Found* const found = workspace.take<Found>(1);
  Count* const counts = workspace.take<Count>(std::size(kDigits) * kMostBins);
  if (!workspace.enough()) return cudaErrorMemoryAllocation;
  XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, counts, std::size(kDigits) * kMostBins));
  XLA_OPS_RETURN_IF_CUDA_ERROR(launch(start_kernel, 1, 1, 0, stream, static_cast<Count>(k), found));
  Count* of_digit = counts;
  for (const auto& digit : kDigits) {
    XLA_OPS_RETURN_IF_CUDA_ERROR(launch(count_kernel<T>, ceil_div(n, kThreads), kThreads, 0, stream, x, n,
                                        digit.shift, digit.bits, found, of_digit));
    XLA_OPS_RETURN_IF_CUDA_ERROR(
        launch(find_kernel, 1, kRuns, 0, stream, of_digit, digit.shift, found, result));
    of_digit += kMostBins;
  }
  return cudaSuccess;
}

#define XLA_OPS_INSTANTIATE(T) \
  template cudaError_t kth_smallest<T>(cudaStream_t, Workspace&, const T*, int64_t, int64_t, float*);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
