// A replacement of CUDA's <cuda_runtime.h>, with which a C++ compiler builds the kernels for the host, with
// sanitizers. Device memory is host memory. There are no streams: a launch runs the whole grid, then returns.
//
// The blocks of a grid run one after the other. The threads of a block are fibers on one thread of the
// system: each runs until it waits at a barrier or in an exchange within its warp. In every second block the
// threads run in reverse order. So if a thread reads a value without waiting for the thread that writes it,
// the value is read too early in one of two blocks.
//
// This file contains only the part of CUDA that the kernels use.

#ifndef TESTS_XLA_OPS_CUDA_ON_HOST_CUDA_RUNTIME_H_
#define TESTS_XLA_OPS_CUDA_ON_HOST_CUDA_RUNTIME_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // only one block runs at a time

struct dim3 {
  dim3(unsigned x = 1) : x(x) {}
  unsigned x;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- host ----

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorMemoryAllocation,
  cudaErrorInvalidConfiguration
};
using cudaStream_t = void*;

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_on_host {

// The properties of the device, set by main.cc.
struct Device {
  int processors = 2;
  int blocks_per_processor = 2;
  int shared_bytes = 64 << 10;
};
extern Device device;

// The number of atomic additions of floats, one for each instruction of a thread.
extern int64_t additions;

cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

// Waits for all threads of the block. Returns whether any of them passed true.
bool sync_block(bool value);
// Exchanges a word with the other lanes of the warp. Returns the word of lane `from`, or all 32 words.
uint32_t exchange(uint32_t word, int from);
const uint32_t* exchange_all(uint32_t word);
void* dynamic_shared_memory();

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace cuda_on_host

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& device = cuda_on_host::device;
  *value = attribute == cudaDevAttrMultiProcessorCount ? device.processors : device.shared_bytes;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return attributes->sharedSizeBytes = 0, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute,
                                        int bytes) {  // the attribute is shared by all launches of the kernel
  return bytes == cuda_on_host::device.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = cuda_on_host::device.blocks_per_processor, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int byte, size_t bytes, cudaStream_t) {
  return std::memset(data, byte, bytes), cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_on_host::run_grid(*config, [&] { kernel(arguments...); });
}

// ---- device ----

namespace xla_ops::cuda {
inline void* dynamic_shared() { return cuda_on_host::dynamic_shared_memory(); }
}  // namespace xla_ops::cuda

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

inline float __uint_as_float(uint32_t x) { return cuda_on_host::bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return cuda_on_host::bits<uint32_t>(x); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}

inline void __syncthreads() { cuda_on_host::sync_block(false); }
inline int __syncthreads_or(int value) { return cuda_on_host::sync_block(value != 0); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = threadIdx.x % 32;
  return cuda_on_host::bits<T>(cuda_on_host::exchange(cuda_on_host::bits<uint32_t>(value), lane ^ mask));
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {  // lanes below delta get their own value
  const int lane = threadIdx.x % 32, from = lane < delta ? lane : lane - delta;
  return cuda_on_host::bits<T>(cuda_on_host::exchange(cuda_on_host::bits<uint32_t>(value), from));
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const uint32_t* lanes = cuda_on_host::exchange_all(value);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= lanes[i] << i;
  return ballot;
}

template <typename T>
T atomicAdd(T* p, T value) {
  if (std::is_same_v<T, float>) ++cuda_on_host::additions;
  const T before = *p;
  *p += value;
  return before;
}

inline float4 atomicAdd(float4* p, float4 value) {
  ++cuda_on_host::additions;
  const float4 before = *p;
  p->x += value.x, p->y += value.y, p->z += value.z, p->w += value.w;
  return before;
}
template <typename T>
T atomicOr(T* p, T value) {
  const T before = *p;
  *p |= value;
  return before;
}

#endif  // TESTS_XLA_OPS_CUDA_ON_HOST_CUDA_RUNTIME_H_
