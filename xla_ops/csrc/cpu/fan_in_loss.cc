// The loss of a fixed fan-in output layer against sparse positives, and all of its gradients, in one pass over
// the labels.
//
// A block of labels is taken through everything while its rows are in cache: logits, loss, gradient of the
// logits, gradient of the kernel, gradient of the input. The logits of all labels never exist. Where the
// squared hinge has no gradient for a label in a tile, which is nearly everywhere once training is under way,
// the two backward products are skipped.

#include "../fan_in_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#include "packed.h"
#include "parallel.h"

namespace xla_ops {
namespace {

struct Term {
  float value, gradient;
};

// The loss of one logit, and its derivative, where the label is a positive.
Term positive_term(Loss loss, float s) {
  if (loss == Loss::kSquaredHinge) {
    const float slack = 1 - s < 0 ? 0 : 1 - s;  // NaN stays NaN
    return {slack * slack, -2 * slack};
  }
  return {std::max(-s, 0.0f) + std::log1p(std::exp(-std::abs(s))), -1 / (1 + std::exp(s))};
}

float negative_value(Loss loss, float s) { return positive_term(loss, -s).value; }

struct Positive {
  int64_t label;
  int64_t example;
  bool operator<(const Positive& other) const {
    return label != other.label ? label < other.label : example < other.example;
  }
  bool operator==(const Positive& other) const { return label == other.label && example == other.example; }
};

// The distinct positives [batch, width] in order of their labels; padding and labels out of range are left out.
std::vector<Positive> by_label(const int32_t* positives, int64_t batch, int64_t width, int64_t labels) {
  std::vector<Positive> sorted;
  sorted.reserve(batch * width);
  for (int64_t i = 0; i < batch * width; ++i) {
    if (positives[i] >= 0 && positives[i] < labels) sorted.push_back({positives[i], i / width});
  }
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  return sorted;
}

template <typename T>
struct Gradients {
  T* x;       // [B, D]
  T* kernel;  // [L, F]
  T* bias;    // [L], or null
};

// Labels taken through all tiles together have so many connections: their weights stay in the second-level cache.
constexpr int64_t kConnectionsPerRun = 1 << 17;

// One part of the labels, worked on by one thread.
template <typename T, typename I>
class Part {
 public:
  Part(const Shape& s, const Tiles& tiles, Loss loss, const T* packed, const T* kernel, const I* indices, const T* bias,
       const std::vector<Positive>& positives)
      : s_(s),
        tiles_(tiles),
        loss_(loss),
        scale_(1.0f / (static_cast<float>(s.batch) * static_cast<float>(s.labels))),
        packed_(packed),
        kernel_(kernel),
        indices_(indices),
        bias_(bias),
        positives_(positives) {}

  // The sum of the losses of labels [begin, end). With gradients: writes theirs, and adds to d_packed.
  //
  // Tiles are on the inside, so that a run's kernel gradient is summed over the batch before it is narrowed,
  // but a run is long enough to pay for bringing a tile's features into the cache.
  double run(int64_t begin, int64_t end, const Gradients<T>* gradients, float* d_packed) {
    double total = 0;
    const int64_t run_length = std::max(kBlock, kConnectionsPerRun / s_.fan_in / kBlock * kBlock);
    Buffer<float> beside;
    Buffer<float> d_bias = allocate<float>(run_length);
    for (int64_t first = begin; first < end; first += run_length) {
      const int64_t labels = std::min(run_length, end - first), count = labels * s_.fan_in;
      float* d_kernel = nullptr;
      if (gradients) {
        d_kernel = accumulator(gradients->kernel + first * s_.fan_in, count, &beside);
        std::fill_n(d_kernel, count, 0.0f);
        std::fill_n(d_bias.get(), labels, 0.0f);
      }
      for (int64_t t = 0; t < tiles_.count; ++t) {
        for (int64_t label = 0; label < labels; label += kBlock) {
          total += block(tiles_[t], first + label, std::min(kBlock, labels - label),
                         gradients ? d_kernel + label * s_.fan_in : nullptr, d_bias.get() + label, d_packed);
        }
      }
      if (!gradients) continue;
      if (beside) layout_kernels<T>().narrow(d_kernel, count, gradients->kernel + first * s_.fan_in);
      if (gradients->bias) layout_kernels<T>().narrow(d_bias.get(), labels, gradients->bias + first);
    }
    return total;
  }

 private:
  static const FanInKernels<T, I>& ops() { return fan_in_kernels<T, I>(); }

  // One block of labels against one tile. Without gradients d_kernel is null.
  double block(const Tile& tile, int64_t label, int64_t n, float* d_kernel, float* d_bias, float* d_packed) {
    const T* features = packed_ + tile.offset;
    const T* kernel = kernel_ + label * s_.fan_in;
    const I* indices = indices_ + label * s_.fan_in;
    alignas(64) float rows[kBlock * kTile];
    ops().logits(features, s_.in_features, tile.width, kernel, indices, bias_ ? bias_ + label : nullptr, n, s_.fan_in,
                 rows);
    const double total = to_gradients(label, n, tile, rows);
    if (d_kernel) {
      row_kernels().sums(rows, n, tile.width, d_bias);
      ops().kernel_grad(features, s_.in_features, tile.width, rows, indices, n, s_.fan_in, d_kernel);
      ops().input_grad(rows, s_.in_features, tile.width, kernel, indices, n, s_.fan_in, d_packed + tile.offset);
    }
    return total;
  }

  // Turns a block's logits into the gradients of the mean loss, and returns the sum of the losses.
  double to_gradients(int64_t label, int64_t n, const Tile& tile, float* rows) {
    double total = 0;
    corrections_.clear();
    for (auto p = std::lower_bound(positives_.begin(), positives_.end(), Positive{label, 0});
         p != positives_.end() && p->label < label + n; ++p) {
      if (p->example < tile.first || p->example >= tile.first + tile.size) continue;
      const int64_t at = (p->label - label) * tile.width + p->example - tile.first;
      const Term term = positive_term(loss_, rows[at]);
      total += term.value - negative_value(loss_, rows[at]);
      corrections_.push_back({at, term.gradient * scale_});
    }
    const auto negatives =
        loss_ == Loss::kSquaredHinge ? row_kernels().squared_hinge : row_kernels().binary_cross_entropy;
    total += negatives(rows, n, tile.width, tile.size, scale_);
    for (const auto& [at, gradient] : corrections_) rows[at] = gradient;
    return total;
  }

  const Shape& s_;
  const Tiles& tiles_;
  const Loss loss_;
  const float scale_;
  const T* const packed_;
  const T* const kernel_;
  const I* const indices_;
  const T* const bias_;
  const std::vector<Positive>& positives_;
  std::vector<std::pair<int64_t, float>> corrections_;
};

// Returns the mean loss; with `gradients`, its gradients as well.
template <typename T, typename I>
float run(ffi::ThreadPool& pool, const Shape& s, Loss loss, const T* x, const T* kernel, const I* indices,
          const T* bias, const int32_t* positives, int64_t max_positives, const Gradients<T>* gradients) {
  const Tiles tiles(s.batch, s.in_features);
  const Buffer<T> packed = pack(pool, tiles, x);
  const std::vector<Positive> sorted = by_label(positives, s.batch, max_positives, s.labels);
  const int64_t blocks = ceil_div(s.labels, kBlock);
  const int64_t parts = std::max<int64_t>(1, std::min(pool.num_threads(), worthwhile_copies(s)));
  const int64_t labels_per_part = ceil_div(blocks, parts) * kBlock;
  Buffer<float> d_packed;
  if (gradients) {
    d_packed = allocate<float>(parts * tiles.elements);
    expect_writes(gradients->kernel, s.labels * s.fan_in * sizeof(T));
  }
  std::vector<double> totals(parts);
  parallel_for(pool, parts, [&](int64_t p) {
    float* d = gradients ? d_packed.get() + p * tiles.elements : nullptr;
    if (d) std::memset(d, 0, tiles.elements * sizeof(float));
    const int64_t begin = std::min(s.labels, p * labels_per_part), end = std::min(s.labels, begin + labels_per_part);
    totals[p] = Part<T, I>(s, tiles, loss, packed.get(), kernel, indices, bias, sorted).run(begin, end, gradients, d);
  });
  if (gradients) unpack_sum(pool, tiles, d_packed.get(), parts, gradients->x);
  double total = 0;
  for (double t : totals) total += t;
  return static_cast<float>(total / (static_cast<double>(s.batch) * static_cast<double>(s.labels)));
}

// ---- handlers ----

ffi::Error impl(ffi::ThreadPool& pool, ffi::AnyBuffer& x, ffi::AnyBuffer& kernel, ffi::AnyBuffer& indices,
                ffi::AnyBuffer& bias, ffi::AnyBuffer& positives, int64_t loss, ffi::AnyBuffer& value,
                ffi::AnyBuffer* d_x, ffi::AnyBuffer* d_kernel, ffi::AnyBuffer* d_bias) {
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_loss_value(x, kernel, indices, bias, positives, loss, value, &s));
  const bool biased = has_bias(bias);
  if (d_x) {
    XLA_OPS_RETURN_IF_ERROR(check_fan_in_loss_gradients(*d_x, *d_kernel, *d_bias, x.element_type(), biased, s));
  }
  return dispatch(x, indices, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    Gradients<T> gradients{};
    if (d_x) gradients = {data<T>(*d_x), data<T>(*d_kernel), biased ? data<T>(*d_bias) : nullptr};
    *data<float>(value) = run<T, I>(pool, s, static_cast<Loss>(loss), data<T>(x), data<T>(kernel), data<I>(indices),
                                    biased ? data<T>(bias) : nullptr, data<int32_t>(positives),
                                    positives.dimensions()[1], d_x ? &gradients : nullptr);
  });
}

ffi::Error value_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer indices,
                      ffi::AnyBuffer bias, ffi::AnyBuffer positives, int64_t loss,
                      ffi::Result<ffi::AnyBuffer> value) {
  return impl(pool, x, kernel, indices, bias, positives, loss, *value, nullptr, nullptr, nullptr);
}

ffi::Error gradients_impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer indices,
                          ffi::AnyBuffer bias, ffi::AnyBuffer positives, int64_t loss,
                          ffi::Result<ffi::AnyBuffer> value, ffi::Result<ffi::AnyBuffer> d_x,
                          ffi::Result<ffi::AnyBuffer> d_kernel, ffi::Result<ffi::AnyBuffer> d_bias) {
  return impl(pool, x, kernel, indices, bias, positives, loss, *value, &*d_x, &*d_kernel, &*d_bias);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_loss_value, value_impl,
                              bind_fan_in_loss_value(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_loss_gradients, gradients_impl,
                              bind_fan_in_loss_gradients(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace xla_ops
