// Scratch memory of the handlers.

#ifndef XLA_OPS_CSRC_CPU_MEMORY_H_
#define XLA_OPS_CSRC_CPU_MEMORY_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../types.h"

namespace xla_ops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr uintptr_t kHugePage = 2 << 20;

// Asks for huge pages under a large buffer that is about to be written. XLA takes results fresh from the
// system on every call, and faulting them in 4 KiB at a time costs about as much as computing them.
inline void expect_writes(void* data, size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The bytes of scratch memory that all calls together hold now, and the most they ever held.
struct Scratch {
  std::atomic<int64_t> now{0}, peak{0};

  void add(int64_t bytes) {
    const int64_t total = now += bytes;
    int64_t most = peak;
    while (total > most && !peak.compare_exchange_weak(most, total)) {
    }
  }
};
inline Scratch& scratch() {
  static Scratch total;
  return total;
}

struct Free {
  int64_t bytes = 0;
  void operator()(void* p) const {
    std::free(p);
    scratch().add(-bytes);
  }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Returns uninitialized memory, aligned to a cache line. Large buffers are in huge pages: features are read
// in random order, which would miss the address cache as well. Throws std::bad_alloc.
template <typename T>
Buffer<T> allocate(int64_t count) {
  const int64_t wanted = std::max<int64_t>(1, count) * sizeof(T);
  const int64_t alignment = wanted < static_cast<int64_t>(kHugePage) ? 64 : kHugePage;
  const size_t bytes = ceil_div(wanted, alignment) * alignment;
  void* p = std::aligned_alloc(alignment, bytes);
  if (!p) throw std::bad_alloc();
  if (alignment == kHugePage) expect_writes(p, bytes);
  scratch().add(bytes);
  return Buffer<T>(static_cast<T*>(p), Free{static_cast<int64_t>(bytes)});
}

// Returns the memory for float32 sums that end up in `out`: `out` itself, or `*buffer` if `out` is narrower,
// which is allocated by the first call. Later counts must not be larger.
inline float* accumulator(float* out, int64_t, Buffer<float>*) { return out; }
inline float* accumulator(bfloat16*, int64_t count, Buffer<float>* buffer) {
  if (!*buffer) *buffer = allocate<float>(count);
  return buffer->get();
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_MEMORY_H_
