// The k best labels of each example, streaming over blocks of labels: the logits of all labels never exist.

#include "../fan_in_top_k.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "handler.h"
#include "kernels.h"
#include "layer.h"
#include "memory.h"
#include "packed.h"
#include "parallel.h"
#include "tiles.h"

namespace xla_ops {
namespace {

// Candidates of `examples` examples, best first; of equal scores the one that was offered first.
struct Ranking {
  Ranking(int64_t examples, int64_t k)
      : k(k), scores(allocate<float>(examples * k)), labels(allocate<int32_t>(examples * k)) {
    std::fill_n(scores.get(), examples * k, -std::numeric_limits<float>::infinity());
    std::fill_n(labels.get(), examples * k, -1);
  }

  float worst(int64_t example) const { return scores[(example + 1) * k - 1]; }

  void offer(int64_t example, float score, int32_t label) {
    float* s = scores.get() + example * k;
    int32_t* l = labels.get() + example * k;
    int64_t at = k;
    for (; at > 0 && s[at - 1] < score; --at) {
      if (at < k) s[at] = s[at - 1], l[at] = l[at - 1];
    }
    if (at < k) s[at] = score, l[at] = label;
  }

  const int64_t k;
  Buffer<float> scores;
  Buffer<int32_t> labels;
};

template <typename T, typename I>
void top_k(ffi::ThreadPool& pool, const Layer<T, I>& layer, int64_t k, const Inputs<T>& inputs, float* scores,
           int32_t* labels) {
  if (k == 0) return;
  const Shape& s = layer.shape;
  const Tiles tiles(s.batch, s.in_features);
  const Packed<T> packed(pool, tiles, inputs);
  // A thread has a range of the labels. If there are fewer ranges than threads, several threads share a
  // range, and have some of its tiles each.
  const int64_t threads = pool.num_threads();
  const LabelRanges ranges(s, std::max<int64_t>(1, std::min(threads, ceil_div(s.labels, kBlock))));
  const int64_t shares = std::max<int64_t>(1, std::min(threads / ranges.count, tiles.count));
  std::vector<Ranking> rankings;
  rankings.reserve(ranges.count);
  for (int64_t r = 0; r < ranges.count; ++r) rankings.emplace_back(s.batch, k);

  parallel_for(pool, ranges.count * shares, [&](int64_t item) {
    const int64_t range = item / shares, end = ranges.end(range), chunk_size = labels_per_chunk(s);
    Ranking& ranking = rankings[range];
    alignas(64) float rows[kBlock * kTile];
    const Buffer<float> worst_of_all = allocate<float>(tiles.count * kTile);
    std::fill_n(worst_of_all.get(), tiles.count * kTile,
                std::numeric_limits<float>::infinity());  // the padding's
    std::fill_n(worst_of_all.get(), s.batch, -std::numeric_limits<float>::infinity());
    LabelChunk<T, I> chunk(layer, packed, std::min(chunk_size, end - ranges.begin(range)));
    for (int64_t first = ranges.begin(range); first < end; first += chunk_size) {
      const int64_t last = std::min(end, first + chunk_size);
      chunk.start(first, last - first);
      for (int64_t t = item % shares; t < tiles.count; t += shares) {
        const Tile tile = tiles[t];
        float* const worst = worst_of_all.get() + tile.first;
        for (int64_t label = first; label < last; label += kBlock) {
          const int64_t n = std::min(kBlock, last - label);
          chunk.logits(tile, label, n, rows);
          for (uint64_t mask = row_kernels().above(rows, n, tile.width, worst); mask; mask &= mask - 1) {
            const int64_t i = __builtin_ctzll(mask);
            const float* row = rows + i * tile.width;
            for (int64_t b = 0; b < tile.size; ++b) {
              if (!(row[b] > worst[b])) continue;
              ranking.offer(tile.first + b, row[b], static_cast<int32_t>(label + i));
              worst[b] = ranking.worst(tile.first + b);
            }
          }
        }
      }
    }
  });

  // Ranges are offered in the order of their labels, so that ties go to the lower one.
  Ranking& best = rankings[0];
  for (int64_t r = 1; r < ranges.count; ++r) {
    for (int64_t i = 0; i < s.batch * k; ++i) {
      if (rankings[r].labels[i] >= 0) best.offer(i / k, rankings[r].scores[i], rankings[r].labels[i]);
    }
  }
  std::copy_n(best.scores.get(), s.batch * k, scores);
  std::copy_n(best.labels.get(), s.batch * k, labels);
}

void run_top_k(ffi::ThreadPool& pool, const FanInTopK& call) {
  dispatch(call, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using I = std::remove_pointer_t<decltype(i)>;
    top_k(pool, layer_of<T, I>(call), call.k(), inputs_of<T>(call), data<float>(call.scores),
          data<int32_t>(call.labels));
  });
}

}  // namespace

XLA_OPS_DEFINE_HANDLER(fan_in_top_k, run_top_k);

}  // namespace xla_ops
