// The products of a fixed fan-in layer: logits, gradient of the kernel, gradient of the input.

#ifndef XLA_OPS_CSRC_CPU_KERNELS_FAN_IN_H_
#define XLA_OPS_CSRC_CPU_KERNELS_FAN_IN_H_

#include <stdint.h>

#include "connections.h"
#include "lanes.h"
#include "vector.h"

namespace xla_ops {
namespace {

// Calls fn<NV>(...) with NV = the number of vectors in a row of `width`, so that a row stays in registers.
#define XLA_OPS_FOR_WIDTH(fn, width, ...)            \
  switch ((width) / kLanes) {                        \
    case 1: return fn<1 * kLanes / W>(__VA_ARGS__);  \
    case 2: return fn<2 * kLanes / W>(__VA_ARGS__);  \
    case 3: return fn<3 * kLanes / W>(__VA_ARGS__);  \
    default: return fn<4 * kLanes / W>(__VA_ARGS__); \
  }
static_assert(kTile == 4 * kLanes, "XLA_OPS_FOR_WIDTH covers every width");

// The gather's latency is hidden by asking for the rows of later connections while those before are summed.
constexpr int64_t kAhead = 48;
template <int NV, int Write, typename T>
XLA_OPS_INLINE void prefetch(const T* packed, int64_t row) {
  const char* start = reinterpret_cast<const char*>(packed + row * NV * W);
#pragma GCC unroll 16
  for (int64_t byte = 0; byte < static_cast<int64_t>(NV * W * sizeof(T)); byte += 64) {
    __builtin_prefetch(start + byte, Write);
  }
}

template <int NV, typename T, typename Connections>
void logits_of_width(const T* packed, const Connections& connections, const T* bias, int64_t labels,
                     float* rows) {
  const int64_t last = connections.end(labels - 1) - 1;
  int64_t k = connections.begin(0);
  for (int64_t n = 0; n < labels; ++n) {
    Vec sum[NV];
    const Vec start = Vec{} + (bias ? to_float(bias[n]) : 0.0f);
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) sum[i] = start;
    for (const int64_t end = connections.end(n); k < end; ++k) {
      prefetch<NV, 0>(packed, connections.row(k + kAhead < last ? k + kAhead : last));
      const T* x = packed + connections.row(k) * NV * W;
      const float weight = connections.weight(k);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) sum[i] += weight * load(x + i * W);
    }
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) store(rows + (n * NV + i) * W, sum[i]);
  }
}

// The products of two rows, not yet summed over the lanes.
template <int NV, typename T>
XLA_OPS_INLINE Vec products_of_rows(const float* row, const T* x) {
  Vec s = load(row) * load(x);
#pragma GCC unroll 16
  for (int i = 1; i < NV; ++i) s += load(row + i * W) * load(x + i * W);
  return s;
}

// d[k] += the gradient of connection k's weight.
template <int NV, typename T, typename Connections>
void kernel_grad_of_width(const T* packed, const Connections& connections, const float* rows, uint64_t mask,
                          float* d) {
  for (; mask; mask &= mask - 1) {
    const int64_t n = __builtin_ctzll(mask), end = connections.end(n);
    const float* row = rows + n * NV * W;
    int64_t k = connections.begin(n);
    for (; k + W <= end; k += W) {  // W connections at a time, summed over the lanes together
      Vec sum[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j)
        sum[j] = products_of_rows<NV>(row, packed + connections.row(k + j) * NV * W);
      SumLanes<1>::run(sum);
      store(d + k, load(d + k) + sum[0]);
    }
    for (; k < end; ++k) d[k] += sum_lanes(products_of_rows<NV>(row, packed + connections.row(k) * NV * W));
  }
}

template <int NV, typename Connections>
void input_grad_of_width(const float* rows, uint64_t mask, const Connections& connections, float* d_packed) {
  for (; mask; mask &= mask - 1) {
    const int64_t n = __builtin_ctzll(mask), end = connections.end_of_dense(n);
    const uint64_t others = mask & (mask - 1);
    const int64_t next = others ? __builtin_ctzll(others) : n, end_of_next = connections.end_of_dense(next);
    Vec row[NV];
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) row[i] = load(rows + (n * NV + i) * W);
    for (int64_t k = connections.begin(n), ahead = connections.begin(next); k < end; ++k, ++ahead) {
      if (ahead < end_of_next) prefetch<NV, 1>(d_packed, connections.row(ahead));
      float* d = d_packed + connections.row(k) * NV * W;
      const float weight = connections.weight(k);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) store(d + i * W, load(d + i * W) + weight * row[i]);
    }
  }
}

template <typename T, typename I>
void logits(const T* packed, int64_t in_features, int64_t width, const T* kernel, const I* indices,
            const T* bias, int64_t labels, int64_t fan_in, float* rows) {
  const AllConnections<T, I> all{kernel, indices, in_features, fan_in};
  XLA_OPS_FOR_WIDTH(logits_of_width, width, packed, all, bias, labels, rows);
}
template <typename T, typename I>
void kernel_grad(const T* packed, int64_t in_features, int64_t width, const float* rows, uint64_t mask,
                 const I* indices, int64_t fan_in, float* d_kernel) {
  const AllConnections<T, I> all{nullptr, indices, in_features, fan_in};
  XLA_OPS_FOR_WIDTH(kernel_grad_of_width, width, packed, all, rows, mask, d_kernel);
}
template <typename T, typename I>
void input_grad(const float* rows, uint64_t mask, int64_t in_features, int64_t width, const T* kernel,
                const I* indices, int64_t fan_in, float* d_packed) {
  const AllConnections<T, I> all{kernel, indices, in_features, fan_in};
  XLA_OPS_FOR_WIDTH(input_grad_of_width, width, rows, mask, all, d_packed);
}

template <typename T>
void listed_logits(const T* packed, const ConnectionLists<T>& lists, int64_t width, const T* bias,
                   int64_t labels, float* rows) {
  const ListedConnections<T> listed{lists};
  XLA_OPS_FOR_WIDTH(logits_of_width, width, packed, listed, bias, labels, rows);
}
template <typename T>
void listed_kernel_grad(const T* packed, const ConnectionLists<T>& lists, int64_t width, const float* rows,
                        uint64_t mask, float* d_weight) {
  const ListedConnections<T> listed{lists};
  XLA_OPS_FOR_WIDTH(kernel_grad_of_width, width, packed, listed, rows, mask, d_weight);
}
template <typename T>
void listed_input_grad(const float* rows, uint64_t mask, const ConnectionLists<T>& lists, int64_t width,
                       float* d_packed) {
  const ListedConnections<T> listed{lists};
  XLA_OPS_FOR_WIDTH(input_grad_of_width, width, rows, mask, listed, d_packed);
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_KERNELS_FAN_IN_H_
