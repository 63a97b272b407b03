// fan_in_matmul and its two gradients: y[b, l] = bias[l] + sum_f kernel[l, f] * x[b, indices[l, f]].
//
// x is packed feature-major in tiles of the batch (kernels.h), so that a connection reads one contiguous
// run; labels are worked on in blocks whose rows stay in cache between the kernel and the transposition.
// Every sum is taken in an order that depends on the shapes and the number of threads only, so results repeat
// bit for bit.

#include "../fan_in_matmul.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "packed.h"
#include "parallel.h"

namespace xla_ops {
namespace {

// ---- the three passes, for one type of value and one of index ----

template <typename T, typename I>
void forward(ffi::ThreadPool& pool, const Shape& s, const T* x, const T* kernel, const I* indices, const T* bias,
             T* y) {
  const Tiles tiles(s.batch, s.in_features);
  const Buffer<T> packed = pack(pool, tiles, x);
  expect_writes(y, s.batch * s.labels * sizeof(T));
  const int64_t blocks = ceil_div(s.labels, kBlock);
  parallel_for(pool, tiles.count * blocks, [&](int64_t item) {
    const Tile tile = tiles[item / blocks];
    const int64_t label = item % blocks * kBlock, n = std::min(kBlock, s.labels - label);
    alignas(64) float rows[kBlock * kTile];
    fan_in_kernels<T, I>().logits(packed.get() + tile.offset, s.in_features, tile.width, kernel + label * s.fan_in,
                                  indices + label * s.fan_in, bias ? bias + label : nullptr, n, s.fan_in, rows);
    layout_kernels<T>().from_rows(rows, tile.width, tile.size, n, n, y + tile.first * s.labels + label, s.labels);
  });
}

// Accumulates in `out` itself where it is float32, else beside it.
template <typename T, typename I>
void kernel_grad(ffi::ThreadPool& pool, const Shape& s, const T* x, const T* dy, const I* indices, T* d_kernel) {
  const Tiles tiles(s.batch, s.in_features);
  const Buffer<T> packed = pack(pool, tiles, x);
  expect_writes(d_kernel, s.labels * s.fan_in * sizeof(T));
  parallel_for(pool, ceil_div(s.labels, kBlock), [&](int64_t block) {
    const int64_t label = block * kBlock, n = std::min(kBlock, s.labels - label);
    const int64_t first = label * s.fan_in, count = n * s.fan_in;
    Buffer<float> beside;
    float* sums = accumulator(d_kernel + first, count, &beside);
    std::memset(sums, 0, count * sizeof(float));
    alignas(64) float rows[kBlock * kTile];
    for (int64_t t = 0; t < tiles.count; ++t) {
      const Tile tile = tiles[t];
      layout_kernels<T>().to_rows(dy + tile.first * s.labels + label, s.labels, n, tile.size, tile.width, rows,
                                  tile.width);
      fan_in_kernels<T, I>().kernel_grad(packed.get() + tile.offset, s.in_features, tile.width, rows, indices + first,
                                         n, s.fan_in, sums);
    }
    if (beside) layout_kernels<T>().narrow(sums, count, d_kernel + first);
  });
}

template <typename T, typename I>
void input_grad(ffi::ThreadPool& pool, const Shape& s, const T* dy, const T* kernel, const I* indices, T* d_x) {
  const Tiles tiles(s.batch, s.in_features);
  // Tiles do not meet in d_x; threads beyond their number share the labels of a tile out in parts.
  const int64_t threads_per_tile = ceil_div(pool.num_threads(), std::max<int64_t>(1, tiles.count));
  const int64_t parts = std::max<int64_t>(1, std::min(threads_per_tile, worthwhile_copies(s)));
  const int64_t blocks_per_part = ceil_div(ceil_div(s.labels, kBlock), parts);
  const Buffer<float> d_packed = allocate<float>(parts * tiles.elements);
  parallel_for(pool, tiles.count * parts, [&](int64_t item) {
    const Tile tile = tiles[item % tiles.count];
    const int64_t part = item / tiles.count;
    float* d = d_packed.get() + part * tiles.elements + tile.offset;
    std::memset(d, 0, (s.in_features + 1) * tile.width * sizeof(float));
    alignas(64) float rows[kBlock * kTile];
    const int64_t end = std::min(s.labels, (part + 1) * blocks_per_part * kBlock);
    for (int64_t label = part * blocks_per_part * kBlock; label < end; label += kBlock) {
      const int64_t n = std::min(kBlock, end - label);
      layout_kernels<T>().to_rows(dy + tile.first * s.labels + label, s.labels, n, tile.size, tile.width, rows,
                                  tile.width);
      fan_in_kernels<T, I>().input_grad(rows, s.in_features, tile.width, kernel + label * s.fan_in,
                                        indices + label * s.fan_in, n, s.fan_in, d);
    }
  });
  unpack_sum(pool, tiles, d_packed.get(), parts, d_x);
}

// ---- handlers ----

ffi::Error forward_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer indices,
                        ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y) {
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_matmul_forward(x, kernel, indices, bias, *y, &s));
  return dispatch(x, indices, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    forward<T, I>(pool, s, data<T>(x), data<T>(kernel), data<I>(indices), has_bias(bias) ? data<T>(bias) : nullptr,
                  data<T>(*y));
  });
}

ffi::Error gradients_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::AnyBuffer kernel,
                          ffi::AnyBuffer indices, ffi::Result<ffi::AnyBuffer> d_x,
                          ffi::Result<ffi::AnyBuffer> d_kernel) {
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_matmul_gradients(x, dy, kernel, indices, *d_x, *d_kernel, &s));
  return dispatch(x, indices, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    kernel_grad<T, I>(pool, s, data<T>(x), data<T>(dy), data<I>(indices), data<T>(*d_kernel));
    input_grad<T, I>(pool, s, data<T>(dy), data<T>(kernel), data<I>(indices), data<T>(*d_x));
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_matmul_forward, forward_impl,
                              bind_fan_in_matmul_forward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_matmul_gradients, gradients_impl,
                              bind_fan_in_matmul_gradients(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace xla_ops
