// The split of the batch into tiles, and of the labels into ranges.

#ifndef XLA_OPS_CSRC_CPU_TILES_H_
#define XLA_OPS_CSRC_CPU_TILES_H_

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "memory.h"

namespace xla_ops {

struct Tile {
  int64_t first, size;      // examples [first, first + size)
  int64_t width;            // size rounded up to kLanes; the padding is zero
  int64_t gradient_offset;  // in elements, of the tile's packed gradient [in_features + 1, width]
};

// The batch, split into tiles. All but the last have kTile examples.
struct Tiles {
  Tiles(int64_t batch, int64_t in_features)
      : batch(batch),
        in_features(in_features),
        count(ceil_div(batch, kTile)),
        padded_batch(ceil_div(batch, kLanes) * kLanes),
        elements((in_features + 1) * padded_batch) {}

  Tile operator[](int64_t t) const {
    const int64_t first = t * kTile, size = std::min(kTile, batch - first);
    return {first, size, ceil_div(size, kLanes) * kLanes, first * (in_features + 1)};
  }

  int64_t batch, in_features, count;
  int64_t padded_batch;  // the sum of the widths
  int64_t elements;      // of the packed gradient of all tiles
};

// The labels, split into `count` ranges of whole blocks.
struct LabelRanges {
  LabelRanges(const Shape& s, int64_t count)
      : count(count), labels(s.labels), each(ceil_div(ceil_div(s.labels, kBlock), count) * kBlock) {}

  int64_t begin(int64_t range) const { return std::min(labels, range * each); }
  int64_t end(int64_t range) const { return begin(range + 1); }

  const int64_t count, labels, each;
};

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_TILES_H_
