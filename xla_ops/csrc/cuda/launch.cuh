// Launching kernels: as many blocks as the device runs at once, and each takes its share of the items in a
// loop.

#ifndef XLA_OPS_CSRC_CUDA_LAUNCH_CUH_
#define XLA_OPS_CSRC_CUDA_LAUNCH_CUH_

#include <algorithm>
#include <cstdint>

#include "kernels.h"

#define XLA_OPS_RETURN_IF_CUDA_ERROR(expression) \
  if (const cudaError_t error = (expression); error != cudaSuccess) return error

namespace xla_ops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// The shared memory that a launch asks for, beside what a kernel declares.
#ifdef __CUDACC__  // the tests' stand-in for CUDA has one of its own
__device__ inline void* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}
#endif

// Calls fn(item) for this block's share of [0, items). Neighbouring items run at the same time.
template <typename Fn>
__device__ void for_each_item(int64_t items, Fn&& fn) {
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) fn(item);
}

// Launches as many blocks as there are items, but no more than fit on the device at once. Therefore the grid
// never exceeds the limit of the hardware.
template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, int64_t items, int threads, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
  if (items == 0) return cudaSuccess;
  int device, processors, blocks_per_processor;
  XLA_OPS_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  if (shared_bytes > 0) {
    // Always set the device's maximum: if each launch set its own size, a concurrent launch of the same
    // kernel could lower the limit before this one starts.
    int most;
    cudaFuncAttributes attributes;
    XLA_OPS_RETURN_IF_CUDA_ERROR(
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    XLA_OPS_RETURN_IF_CUDA_ERROR(cudaFuncGetAttributes(&attributes, kernel));
    XLA_OPS_RETURN_IF_CUDA_ERROR(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      most - static_cast<int>(attributes.sharedSizeBytes)));
  }
  XLA_OPS_RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  XLA_OPS_RETURN_IF_CUDA_ERROR(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel, threads, shared_bytes));
  const int64_t at_once = static_cast<int64_t>(processors) * std::max(1, blocks_per_processor);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(items, at_once)));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  XLA_OPS_RETURN_IF_CUDA_ERROR(cudaLaunchKernelEx(&config, kernel, args...));
  return cudaGetLastError();
}

// Sets `count` values to 0.
template <typename T>
cudaError_t zero(cudaStream_t stream, T* values, int64_t count) {
  return count == 0 ? cudaSuccess : cudaMemsetAsync(values, 0, count * sizeof(T), stream);
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_LAUNCH_CUH_
