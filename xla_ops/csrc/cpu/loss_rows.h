// Rows of the gradient of a mean loss of the logits against sparse positives.

#ifndef XLA_OPS_CSRC_CPU_LOSS_ROWS_H_
#define XLA_OPS_CSRC_CPU_LOSS_ROWS_H_

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../fan_in_loss.h"
#include "kernels.h"
#include "layer.h"
#include "packed.h"
#include "tiles.h"

namespace xla_ops {

struct Term {
  float value, gradient;
};

// The loss of one logit, and its derivative, where the label is a positive.
inline Term positive_term(Loss loss, float s) {
  if (loss == Loss::kSquaredHinge) {
    const float slack = 1 - s < 0 ? 0 : 1 - s;  // NaN stays NaN
    return {slack * slack, -2 * slack};
  }
  return {std::max(-s, 0.0f) + std::log1p(std::exp(-std::abs(s))), -1 / (1 + std::exp(s))};
}

struct Positive {
  int64_t label;
  int64_t example;
  bool operator<(const Positive& other) const {
    return label != other.label ? label < other.label : example < other.example;
  }
  bool operator==(const Positive& other) const { return label == other.label && example == other.example; }
};

// The distinct positives [batch, width] in order of their labels; padding and labels out of range are left
// out.
inline std::vector<Positive> by_label(const int32_t* positives, int64_t batch, int64_t width,
                                      int64_t labels) {
  std::vector<Positive> sorted;
  sorted.reserve(batch * width);
  for (int64_t i = 0; i < batch * width; ++i) {
    if (positives[i] >= 0 && positives[i] < labels) sorted.push_back({positives[i], i / width});
  }
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  return sorted;
}

// Computes blocks of logits, and turns them into the gradients of the mean loss over batch and labels.
class LossRows {
 public:
  LossRows(const Shape& s, Loss loss, const std::vector<Positive>& positives)
      : loss_(loss),
        scale_(1.0f / (static_cast<float>(s.batch) * static_cast<float>(s.mean_labels))),
        positives_(positives) {}

  // Returns the mask of the rows that are not zero.
  template <typename T, typename I>
  uint64_t operator()(const LabelChunk<T, I>& chunk, const Tile& tile, int64_t label, int64_t n,
                      float* rows) {
    chunk.logits(tile, label, n, rows);
    corrections_.clear();
    for (auto p = std::lower_bound(positives_.begin(), positives_.end(), Positive{label, 0});
         p != positives_.end() && p->label < label + n; ++p) {
      if (p->example < tile.first || p->example >= tile.first + tile.size) continue;
      const int64_t at = (p->label - label) * tile.width + p->example - tile.first;
      const Term term = positive_term(loss_, rows[at]);
      total_ += term.value;
      corrections_.push_back({at, term.gradient * scale_});
      rows[at] = -std::numeric_limits<float>::infinity();  // a negative without a loss
    }
    const auto negatives =
        loss_ == Loss::kSquaredHinge ? row_kernels().squared_hinge : row_kernels().binary_cross_entropy;
    uint64_t mask;
    total_ += negatives(rows, n, tile.width, tile.size, scale_, &mask);
    for (const auto& [at, gradient] : corrections_) {
      rows[at] = gradient;
      if (gradient != 0) mask |= uint64_t{1} << (at / tile.width);
    }
    return mask;
  }

  // The sum of the losses so far.
  double total() const { return total_; }

 private:
  const Loss loss_;
  const float scale_;
  const std::vector<Positive>& positives_;
  std::vector<std::pair<int64_t, float>> corrections_;
  double total_ = 0;
};

// The layer and the inputs of a call, prepared for the pass over the labels.
template <typename T, typename I>
struct LossPass {
  LossPass(ffi::ThreadPool& pool, const FanInLossValue& call)
      : layer(layer_of<T, I>(call)),
        tiles(call.shape.batch, call.shape.in_features),
        packed(pool, tiles, inputs_of<T>(call)),
        positives(by_label(data<int32_t>(call.positives), call.shape.batch, call.positives_width(),
                           call.shape.labels)),
        rows(call.shape, static_cast<Loss>(call.loss), positives) {}

  const Layer<T, I> layer;
  const Tiles tiles;
  const Packed<T> packed;
  const std::vector<Positive> positives;
  const LossRows rows;  // to be copied for each range of labels
};

// The mean loss from the sums of the ranges of labels.
template <typename Rows>
float mean_loss(const std::vector<Rows>& ranges, const Shape& s) {
  double total = 0;
  for (const Rows& rows : ranges) total += rows.total();
  return static_cast<float>(total / (static_cast<double>(s.batch) * static_cast<double>(s.mean_labels)));
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_LOSS_ROWS_H_
