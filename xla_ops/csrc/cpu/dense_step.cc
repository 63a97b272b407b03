// A step of Adam for a dense layer's kernel where it is. Its gradient, the product of the layer's input and
// the gradient of its output, is computed a few rows and columns at a time and never stored.

#include "../dense_step.h"

#include <algorithm>
#include <type_traits>

#include "handler.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace xla_ops {
namespace {

// Output gradients that stay in the second-level cache while a row of the kernel passes by.
constexpr int64_t kGradientsAtOnce = 1 << 16;
constexpr int64_t kRowsPerItem = 128;

// update(row, column, count, gradient) for every run of the kernel's elements; `column` is a multiple of
// kColumns.
template <typename Update>
void for_each_gradient(ffi::ThreadPool& pool, const DenseShape& s, const float* x, const float* dy,
                       const Update& update) {
  const int64_t tiles = ceil_div(s.columns, kColumns);
  const Buffer<float> packed = allocate<float>(tiles * s.batch * kColumns);  // [tile, batch, kColumns]
  const int64_t tiles_per_group =
      std::max<int64_t>(1, kGradientsAtOnce / (std::max<int64_t>(1, s.batch) * kColumns));
  const int64_t groups = ceil_div(tiles, tiles_per_group);
  parallel_for(pool, groups, [&](int64_t group) {
    const int64_t end = std::min(tiles, (group + 1) * tiles_per_group);
    for (int64_t tile = group * tiles_per_group; tile < end; ++tile) {
      const int64_t n = std::min(kColumns, s.columns - tile * kColumns);
      for (int64_t b = 0; b < s.batch; ++b) {
        float* row = packed.get() + (tile * s.batch + b) * kColumns;
        std::copy_n(dy + b * s.columns + tile * kColumns, n, row);
        std::fill_n(row + n, kColumns - n, 0.0f);
      }
    }
  });

  const int64_t strips = ceil_div(s.rows, kRowsPerItem);
  parallel_for(pool, groups * strips, [&](int64_t item) {
    const int64_t group = item / strips, end = std::min(tiles, (group + 1) * tiles_per_group);
    const int64_t row_end = std::min(s.rows, (item % strips + 1) * kRowsPerItem);
    alignas(64) float gradient[kRows * kColumns];
    const Buffer<float> last_rows = allocate<float>(s.batch * kRows);
    for (int64_t row = item % strips * kRowsPerItem; row < row_end; row += kRows) {
      const int64_t rows = std::min(kRows, row_end - row);
      const float* values = x + row;
      int64_t stride = s.rows;
      if (rows < kRows) {  // the kernel reads kRows values: pad the last ones
        for (int64_t b = 0; b < s.batch; ++b) {
          for (int64_t r = 0; r < kRows; ++r)
            last_rows[b * kRows + r] = r < rows ? x[b * s.rows + row + r] : 0;
        }
        values = last_rows.get();
        stride = kRows;
      }
      for (int64_t tile = group * tiles_per_group; tile < end; ++tile) {
        dense_kernels().products(values, stride, packed.get() + tile * s.batch * kColumns, s.batch, gradient);
        const int64_t column = tile * kColumns, n = std::min(kColumns, s.columns - column);
        for (int64_t r = 0; r < rows; ++r) update(row + r, column, n, gradient + r * kColumns);
      }
    }
  });
}

// Adam's moments. Of those in bfloat16 the second changes by less than its precision in a step, so it is
// rounded stochastically; the first is rounded to nearest.
template <typename M>
struct Moments {
  M *mu, *nu;
  const RoundingKey& key;

  void update(int64_t first, int64_t position, int64_t count, const float* gradient, const AdamStep& step,
              float* w) const {
    if constexpr (std::is_same_v<M, float>) {
      update_kernels().adam_f32(gradient, count, step, w + first, mu + first, nu + first);
    } else {
      update_kernels().adam_bf16(gradient, count, step, key, position, w + first, mu + first, nu + first);
    }
  }
};

// The positions of random bits: the first column of each row has the next multiple of kColumns.
template <typename M>
void adam(ffi::ThreadPool& pool, const DenseShape& s, const float* x, const float* dy, const AdamStep& step,
          float* kernel, const Moments<M>& moments) {
  const int64_t padded = ceil_div(s.columns, kColumns) * kColumns;
  for_each_gradient(pool, s, x, dy, [&](int64_t row, int64_t column, int64_t count, const float* gradient) {
    moments.update(row * s.columns + column, row * padded + column, count, gradient, step, kernel);
  });
}

void run_adam(ffi::ThreadPool& pool, const DenseStepAdam& call) {
  const float* rates = data<float>(call.rates);
  const AdamStep step{rates[0], call.b1, call.b2, call.epsilon, rates[1], rates[2]};
  const uint32_t* key = data<uint32_t>(call.key);
  const RoundingKey rounding{{key[0], key[1]}, key[2]};
  dispatch_values(call.mu, [&](auto* m) {
    using M = std::remove_pointer_t<decltype(m)>;
    adam(pool, call.shape, data<float>(call.x), data<float>(call.dy), step, data<float>(call.kernel),
         Moments<M>{data<M>(call.mu), data<M>(call.nu), rounding});
  });
}

}  // namespace

XLA_OPS_DEFINE_HANDLER(dense_step_adam, run_adam);

}  // namespace xla_ops
