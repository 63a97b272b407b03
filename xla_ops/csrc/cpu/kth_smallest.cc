// The k-th smallest magnitude of an array, from counts of the values of its bits: their order is that of
// magnitudes.

#include "../kth_smallest.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "handler.h"
#include "memory.h"
#include "parallel.h"

namespace xla_ops {
namespace {

constexpr int kCountedBits = 16;

// The magnitude's bits, 31 of them.
uint32_t magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7fffffff;
}
uint32_t magnitude(bfloat16 x) { return static_cast<uint32_t>(x.bits & 0x7fff) << 16; }

// Counts the elements of x by the value of their bits [shift, shift + kCountedBits), among the elements whose
// bits above these are `above`.
template <typename T>
std::vector<int64_t> count_bits(ffi::ThreadPool& pool, const T* x, int64_t n, int shift, uint32_t above) {
  const int64_t ranges = pool.num_threads(), each = ceil_div(n, ranges);
  std::vector<std::vector<int64_t>> counts(ranges, std::vector<int64_t>(1 << kCountedBits));
  parallel_for(pool, ranges, [&](int64_t range) {
    std::vector<int64_t>& count = counts[range];
    for (int64_t i = range * each; i < std::min(n, (range + 1) * each); ++i) {
      const uint64_t bits = magnitude(x[i]);  // 64 bits, so that it may be shifted by 32
      if (bits >> (shift + kCountedBits) == above) ++count[bits >> shift & ((1 << kCountedBits) - 1)];
    }
  });
  for (int64_t range = 1; range < ranges; ++range) {
    for (size_t value = 0; value < counts[0].size(); ++value) counts[0][value] += counts[range][value];
  }
  return counts[0];
}

template <typename T>
float kth(ffi::ThreadPool& pool, const T* x, int64_t n, int64_t k) {
  uint32_t bits = 0;
  for (int shift = 16; shift >= 0; shift -= kCountedBits) {
    const std::vector<int64_t> counts = count_bits(pool, x, n, shift, bits);
    uint32_t value = 0;
    while (k > counts[value]) k -= counts[value++];
    bits = bits << kCountedBits | value;
  }
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

void run_kth(ffi::ThreadPool& pool, const KthSmallest& call) {
  *data<float>(call.smallest) = dispatch_values(call.x, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return kth(pool, data<T>(call.x), call.x.element_count(), call.k);
  });
}

}  // namespace

XLA_OPS_DEFINE_HANDLER(kth_smallest, run_kth);

}  // namespace xla_ops
