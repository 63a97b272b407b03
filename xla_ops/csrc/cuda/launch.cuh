// Launching kernels: as many blocks as the device runs at once, and each takes its share of the items in a loop.

#ifndef XLA_OPS_CSRC_CUDA_LAUNCH_CUH_
#define XLA_OPS_CSRC_CUDA_LAUNCH_CUH_

#include <algorithm>
#include <cstdint>

#include "kernels.h"

#define XLA_OPS_RETURN_IF_CUDA_ERROR(expression) \
  if (const cudaError_t error = (expression); error != cudaSuccess) return error

namespace xla_ops::cuda {

// Calls fn(item) for this block's share of [0, items). Neighbouring items run at the same time.
template <typename Fn>
__device__ void for_each_item(int64_t items, Fn&& fn) {
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) fn(item);
}

// How a kernel is to be launched: `blocks` is as many as there are items, or as fit on the device at once. Never
// more than the hardware's limit on a grid, therefore, however many items there are.
template <typename Kernel>
struct Launch {
  Kernel kernel;
  int threads;
  size_t shared_bytes;
  int64_t blocks;

  template <typename... Args>
  cudaError_t operator()(cudaStream_t stream, Args... args) const {
    if (blocks == 0) return cudaSuccess;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    XLA_OPS_RETURN_IF_CUDA_ERROR(cudaLaunchKernelEx(&config, kernel, args...));
    return cudaGetLastError();
  }
};

template <typename Kernel>
cudaError_t plan(Kernel kernel, int64_t items, int threads, size_t shared_bytes, Launch<Kernel>* launch) {
  *launch = {kernel, threads, shared_bytes, 0};
  if (items == 0) return cudaSuccess;
  if (shared_bytes > 0) {
    XLA_OPS_RETURN_IF_CUDA_ERROR(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      static_cast<int>(shared_bytes)));
  }
  int device, processors, blocks_per_processor;
  XLA_OPS_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  XLA_OPS_RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  XLA_OPS_RETURN_IF_CUDA_ERROR(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel, threads, shared_bytes));
  launch->blocks = std::min<int64_t>(items, static_cast<int64_t>(processors) * std::max(1, blocks_per_processor));
  return cudaSuccess;
}

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, int64_t items, int threads, size_t shared_bytes, cudaStream_t stream, Args... args) {
  Launch<Kernel> planned;
  XLA_OPS_RETURN_IF_CUDA_ERROR(plan(kernel, items, threads, shared_bytes, &planned));
  return planned(stream, args...);
}

template <typename T>
cudaError_t allocate(Scratch& scratch, int64_t count, T** out) {
  *out = static_cast<T*>(scratch.allocate(std::max<int64_t>(1, count) * sizeof(T)));
  return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}

}  // namespace xla_ops::cuda

#endif  // XLA_OPS_CSRC_CUDA_LAUNCH_CUH_
