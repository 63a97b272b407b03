// The batch cut into tiles, and matrices [batch, in_features] packed feature-major within each tile.

#ifndef XLA_OPS_CSRC_CPU_PACKED_H_
#define XLA_OPS_CSRC_CPU_PACKED_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "parallel.h"

namespace xla_ops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr uintptr_t kHugePage = 2 << 20;

// Asks for huge pages under a large buffer that is about to be written. XLA takes results fresh from the system
// on every call, and faulting them in 4 KiB at a time costs about as much as computing them.
inline void expect_writes(void* data, size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The bytes of temporaries that all calls together hold now, and the most they ever held.
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

// Uninitialised and aligned to a cache line. Large ones are in huge pages: features are read all over the place,
// and would miss the address cache as well. Throws std::bad_alloc.
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

// Where float32 sums that end up in `out` are kept: there, or in `*beside` if `out` is narrower. The same `beside`
// serves again for a count that is no larger.
inline float* accumulator(float* out, int64_t, Buffer<float>*) { return out; }
inline float* accumulator(bfloat16*, int64_t count, Buffer<float>* beside) {
  if (!*beside) *beside = allocate<float>(count);
  return beside->get();
}

// Threads that scatter into the same features each use a copy of their own. A copy costs as much as in_features
// connections, so there are never more copies than the work pays for.
inline int64_t worthwhile_copies(const Shape& s) { return s.labels * s.fan_in / (s.in_features + 1); }

struct Tile {
  int64_t first, size;  // examples [first, first + size)
  int64_t width;        // size rounded up to kLanes; the padding is zero
  int64_t offset;       // of the tile's packed [in_features + 1, width] matrix, in elements
};

// All tiles but the last are kTile wide.
struct Tiles {
  Tiles(int64_t batch, int64_t in_features)
      : batch(batch),
        in_features(in_features),
        count(ceil_div(batch, kTile)),
        elements((in_features + 1) * ceil_div(batch, kLanes) * kLanes) {}

  Tile operator[](int64_t t) const {
    const int64_t first = t * kTile, size = std::min(kTile, batch - first);
    return {first, size, ceil_div(size, kLanes) * kLanes, first * (in_features + 1)};
  }

  int64_t batch, in_features, count, elements;
};

// A fixed fan-in layer: kernel and indices [labels, fan_in], bias [labels] or null.
template <typename T, typename I>
struct Layer {
  // rows[n, tile.width] = the logits of labels [label, label + n) for one tile of the packed input.
  void logits(const T* packed, const Tile& tile, int64_t label, int64_t n, float* rows) const {
    fan_in_kernels<T, I>().logits(packed + tile.offset, shape.in_features, tile.width, kernel + label * shape.fan_in,
                                  indices + label * shape.fan_in, bias ? bias + label : nullptr, n, shape.fan_in,
                                  rows);
  }

  Shape shape;
  const T* kernel;
  const I* indices;
  const T* bias;
};

constexpr int64_t kFeaturesAtOnce = 1024;

// The packed form of x [batch, in_features].
template <typename T>
Buffer<T> pack(xla::ffi::ThreadPool& pool, const Tiles& tiles, const T* x) {
  Buffer<T> packed = allocate<T>(tiles.elements);
  const int64_t in_features = tiles.in_features, chunks = ceil_div(in_features + 1, kFeaturesAtOnce);
  parallel_for(pool, tiles.count * chunks, [&](int64_t item) {
    const Tile tile = tiles[item / chunks];
    const int64_t first = item % chunks * kFeaturesAtOnce;
    const int64_t n = std::min(kFeaturesAtOnce, in_features - first);
    T* out = packed.get() + tile.offset + first * tile.width;
    layout_kernels<T>().to_packed(x + tile.first * in_features + first, in_features, n, tile.size, tile.width, out,
                                  tile.width);
    if (first + kFeaturesAtOnce > in_features) std::fill_n(out + n * tile.width, tile.width, T{});  // the zero row
  });
  return packed;
}

// out [batch, in_features] = the sum of `parts` packed matrices; the first of them is overwritten.
template <typename T>
void unpack_sum(xla::ffi::ThreadPool& pool, const Tiles& tiles, float* packed, int64_t parts, T* out) {
  const int64_t in_features = tiles.in_features, chunks = ceil_div(in_features, kFeaturesAtOnce);
  parallel_for(pool, tiles.count * chunks, [&](int64_t item) {
    const Tile tile = tiles[item / chunks];
    const int64_t first = item % chunks * kFeaturesAtOnce;
    const int64_t n = std::min(kFeaturesAtOnce, in_features - first);
    float* sum = packed + tile.offset + first * tile.width;
    for (int64_t part = 1; part < parts; ++part) {
      const float* other = sum + part * tiles.elements;
      for (int64_t i = 0; i < n * tile.width; ++i) sum[i] += other[i];
    }
    layout_kernels<T>().from_rows(sum, tile.width, tile.size, n, n, out + tile.first * in_features + first,
                                  in_features);
  });
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_PACKED_H_
