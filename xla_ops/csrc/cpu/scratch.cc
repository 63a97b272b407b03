#include "scratch.h"

#include <map>
#include <stdexcept>

#include "tiles.h"

namespace xla_ops {

int64_t scratch_bytes(const std::string& handler, bool is_bfloat16, int64_t batch, int64_t in_features,
                      int64_t num_entries, int64_t num_threads) {
  static const std::map<std::string, bool> computes_gradients = {
      {"xla_ops.fan_in_matmul.forward", false}, {"xla_ops.fan_in_matmul.gradients", true},
      {"xla_ops.fan_in_loss.value", false},     {"xla_ops.fan_in_loss.gradients", true},
      {"xla_ops.fan_in_step.adam", true},       {"xla_ops.fan_in_step.sgd", true},
      {"xla_ops.fan_in_top_k", false},
  };
  const auto found = computes_gradients.find(handler);
  if (found == computes_gradients.end()) throw std::invalid_argument("no such handler: " + handler);
  const Tiles tiles(batch, in_features);
  const int64_t packed = (in_features + 1 + num_entries) * tiles.padded_batch;
  const int64_t sums = found->second ? num_threads * tiles.elements : 0;
  return packed * static_cast<int64_t>(is_bfloat16 ? sizeof(bfloat16) : sizeof(float)) +
         sums * static_cast<int64_t>(sizeof(float));
}

}  // namespace xla_ops
