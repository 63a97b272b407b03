// Updates of a dense layer's kernel where it is. Its gradient, the product of the layer's input and the gradient of
// its output, is computed a few rows and columns at a time and never stored.

#include "dense_step.h"

#include <algorithm>

#include "../handler.h"
#include "kernels.h"
#include "packed.h"
#include "parallel.h"

namespace xla_ops {
namespace {

struct DenseShape {
  int64_t batch, rows, columns;  // the kernel is [rows, columns]
};

// Output gradients that stay in the second-level cache while a row of the kernel passes by.
constexpr int64_t kGradientsAtOnce = 1 << 16;
constexpr int64_t kRowsPerItem = 128;

// update(row, column, count, gradient) for every run of the kernel's elements; `column` is a multiple of kColumns.
template <typename Update>
void for_each_gradient(ffi::ThreadPool& pool, const DenseShape& s, const float* x, const float* dy,
                       const Update& update) {
  const int64_t tiles = ceil_div(s.columns, kColumns);
  const Buffer<float> packed = allocate<float>(tiles * s.batch * kColumns);  // [tile, batch, kColumns]
  const int64_t tiles_per_group = std::max<int64_t>(1, kGradientsAtOnce / (std::max<int64_t>(1, s.batch) * kColumns));
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
          for (int64_t r = 0; r < kRows; ++r) last_rows[b * kRows + r] = r < rows ? x[b * s.rows + row + r] : 0;
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

// Moments that Adam keeps in float32.
struct Moments {
  float *mu, *nu;

  void update(int64_t first, int64_t, int64_t count, const float* gradient, const AdamStep& step, float* w) const {
    update_kernels().adam_f32(gradient, count, step, w + first, mu + first, nu + first);
  }
};

// Those that it keeps in bfloat16. The second moment changes by less than its precision in a step, so it is rounded
// stochastically; the first is rounded to nearest.
struct NarrowMoments {
  bfloat16 *mu, *nu;
  const RoundingKey& key;

  void update(int64_t first, int64_t position, int64_t count, const float* gradient, const AdamStep& step,
              float* w) const {
    update_kernels().adam_bf16(gradient, count, step, key, position, w + first, mu + first, nu + first);
  }
};

// The positions of random bits: the first column of each row has the next multiple of kColumns.
template <typename M>
void adam(ffi::ThreadPool& pool, const DenseShape& s, const float* x, const float* dy, const AdamStep& step,
          float* kernel, const M& moments) {
  const int64_t padded = ceil_div(s.columns, kColumns) * kColumns;
  for_each_gradient(pool, s, x, dy, [&](int64_t row, int64_t column, int64_t count, const float* gradient) {
    moments.update(row * s.columns + column, row * padded + column, count, gradient, step, kernel);
  });
}

// ---- handlers ----

ffi::Error read_dense(const ffi::AnyBuffer& x, const ffi::AnyBuffer& dy, const ffi::AnyBuffer& kernel,
                      DenseShape* s) {
  const auto a = x.dimensions(), b = dy.dimensions();
  if (a.size() != 2 || b.size() != 2) {
    return ffi::Error::InvalidArgument("x and dy must be matrices, got shapes " + shape_string(a) + " and " +
                                       shape_string(b));
  }
  *s = {a[0], a[1], b[1]};
  XLA_OPS_RETURN_IF_ERROR(check("x", x, ffi::F32, {s->batch, s->rows}));
  XLA_OPS_RETURN_IF_ERROR(check("dy", dy, ffi::F32, {s->batch, s->columns}));
  return check("kernel", kernel, ffi::F32, {s->rows, s->columns});
}

ffi::Error adam_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::AnyBuffer kernel,
                     ffi::AnyBuffer mu, ffi::AnyBuffer nu, ffi::AnyBuffer rates, ffi::AnyBuffer key, ffi::AnyBuffer,
                     float b1, float b2, float epsilon, ffi::Result<ffi::AnyBuffer> new_kernel,
                     ffi::Result<ffi::AnyBuffer> new_mu, ffi::Result<ffi::AnyBuffer> new_nu) {
  DenseShape s;
  XLA_OPS_RETURN_IF_ERROR(read_dense(x, dy, kernel, &s));
  const ffi::DataType type = mu.element_type() == ffi::BF16 ? ffi::BF16 : ffi::F32;
  XLA_OPS_RETURN_IF_ERROR(check("mu", mu, type, {s.rows, s.columns}));
  XLA_OPS_RETURN_IF_ERROR(check("nu", nu, type, {s.rows, s.columns}));
  XLA_OPS_RETURN_IF_ERROR(check("rates", rates, ffi::F32, {3}));
  XLA_OPS_RETURN_IF_ERROR(check("key", key, ffi::U32, {3}));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("kernel", kernel, *new_kernel));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("mu", mu, *new_mu));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("nu", nu, *new_nu));
  const float* r = data<float>(rates);
  const AdamStep step{r[0], b1, b2, epsilon, r[1], r[2]};
  return guarded([&] {
    const auto run = [&](const auto& moments) {
      adam(pool, s, data<float>(x), data<float>(dy), step, data<float>(kernel), moments);
    };
    if (type == ffi::BF16) {
      const uint32_t* k = data<uint32_t>(key);
      const RoundingKey rounding{{k[0], k[1]}, k[2]};
      run(NarrowMoments{data<bfloat16>(mu), data<bfloat16>(nu), rounding});
    } else {
      run(Moments{data<float>(mu), data<float>(nu)});
    }
    return ffi::Error::Success();
  });
}

ffi::Error sgd_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::AnyBuffer kernel,
                    ffi::AnyBuffer learning_rate, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> new_kernel) {
  DenseShape s;
  XLA_OPS_RETURN_IF_ERROR(read_dense(x, dy, kernel, &s));
  XLA_OPS_RETURN_IF_ERROR(check("learning_rate", learning_rate, ffi::F32, {}));
  XLA_OPS_RETURN_IF_ERROR(check_aliased("kernel", kernel, *new_kernel));
  return guarded([&] {
    float* w = data<float>(kernel);
    const float rate = *data<float>(learning_rate);
    const auto update = [&](int64_t row, int64_t column, int64_t n, const float* gradient) {
      update_kernels().sgd_f32(gradient, n, rate, w + row * s.columns + column);
    };
    for_each_gradient(pool, s, data<float>(x), data<float>(dy), update);
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dense_step_adam, adam_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x [B, D]
                                  .Arg<ffi::AnyBuffer>()  // dy [B, O]
                                  .Arg<ffi::AnyBuffer>()  // kernel [D, O]
                                  .Arg<ffi::AnyBuffer>()  // first moment [D, O], float32 or bfloat16
                                  .Arg<ffi::AnyBuffer>()  // second moment [D, O], the same
                                  .Arg<ffi::AnyBuffer>()  // learning rate, 1 / (1 - b1^t), 1 / (1 - b2^t)
                                  .Arg<ffi::AnyBuffer>()  // of the rounding: seed, 0, step, uint32
                                  .Arg<ffi::AnyBuffer>()  // anything to be computed before the update
                                  .Attr<float>("b1")
                                  .Attr<float>("b2")
                                  .Attr<float>("epsilon")
                                  .Ret<ffi::AnyBuffer>()    // kernel, and so on: the arguments, updated in place
                                  .Ret<ffi::AnyBuffer>()    // first moment
                                  .Ret<ffi::AnyBuffer>());  // second moment

XLA_FFI_DEFINE_HANDLER_SYMBOL(dense_step_sgd, sgd_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()    // x [B, D]
                                  .Arg<ffi::AnyBuffer>()    // dy [B, O]
                                  .Arg<ffi::AnyBuffer>()    // kernel [D, O]
                                  .Arg<ffi::AnyBuffer>()    // learning rate [] float32
                                  .Arg<ffi::AnyBuffer>()    // anything to be computed before the update
                                  .Ret<ffi::AnyBuffer>());  // kernel, updated in place

}  // namespace xla_ops
