// fan_in_matmul and its gradients: y[b, l] = bias[l] + sum_f kernel[l, f] * x[b, indices[l, f]].
//
// x is packed feature-major in tiles of the batch (kernels.h), so that a connection reads contiguous memory;
// labels are worked on in blocks whose rows stay in cache between the kernel and the transposition. Every sum
// is taken in an order that depends on the shapes and the number of threads only, so results repeat bit for
// bit.

#include "../fan_in_matmul.h"

#include <algorithm>

#include "backward.h"
#include "handler.h"
#include "kernels.h"
#include "layer.h"
#include "packed.h"
#include "parallel.h"
#include "tiles.h"

namespace xla_ops {
namespace {

template <typename T, typename I>
void forward(ffi::ThreadPool& pool, const Layer<T, I>& layer, const Inputs<T>& inputs, T* y) {
  const Shape& s = layer.shape;
  const Tiles tiles(s.batch, s.in_features);
  const Packed<T> packed(pool, tiles, inputs);
  expect_writes(y, s.batch * s.labels * sizeof(T));
  const int64_t blocks = ceil_div(s.labels, kBlock);
  parallel_for(pool, tiles.count * blocks, [&](int64_t item) {
    const Tile tile = tiles[item / blocks];
    const int64_t label = item % blocks * kBlock, n = std::min(kBlock, s.labels - label);
    alignas(64) float rows[kBlock * kTile];
    LabelChunk<T, I> chunk(layer, packed, kBlock);
    chunk.start(label, n);
    chunk.logits(tile, label, n, rows);
    layout_kernels<T>().from_rows(rows, tile.width, tile.size, n, n, y + tile.first * s.labels + label,
                                  s.labels);
  });
}

// Rows from a given gradient of the logits, dy [batch, labels].
template <typename T>
struct GivenRows {
  const T* dy;
  int64_t labels;

  template <typename Chunk>
  uint64_t operator()(const Chunk&, const Tile& tile, int64_t label, int64_t n, float* rows) const {
    layout_kernels<T>().to_rows(dy + tile.first * labels + label, labels, n, tile.size, tile.width, rows,
                                tile.width);
    return row_kernels().nonzero(rows, n, tile.width);
  }
};

template <typename T, typename I>
void gradients(ffi::ThreadPool& pool, const Layer<T, I>& layer, const Inputs<T>& inputs, const T* dy, T* d_x,
               T* d_kernel, T* d_bias) {
  const Shape& s = layer.shape;
  const Tiles tiles(s.batch, s.in_features);
  const Packed<T> packed(pool, tiles, inputs);
  expect_writes(d_kernel, s.labels * s.fan_in * sizeof(T));
  backward(
      pool, layer, tiles, packed, [&] { return GivenRows<T>{dy, s.labels}; },
      [&] { return Gradients<T>(s, d_kernel, d_bias); }, d_x);
}

void run_forward(ffi::ThreadPool& pool, const FanInMatmulForward& call) {
  dispatch(call, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    forward(pool, layer_of<T, I>(call), inputs_of<T>(call), data<T>(call.y));
  });
}

void run_gradients(ffi::ThreadPool& pool, const FanInMatmulGradients& call) {
  dispatch(call, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    gradients(pool, layer_of<T, I>(call), inputs_of<T>(call), data<T>(call.dy), optional_data<T>(call.d_x),
              data<T>(call.d_kernel), optional_data<T>(call.d_bias));
  });
}

}  // namespace

XLA_OPS_DEFINE_HANDLER(fan_in_matmul_forward, run_forward);
XLA_OPS_DEFINE_HANDLER(fan_in_matmul_gradients, run_gradients);

}  // namespace xla_ops
