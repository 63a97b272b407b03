// A whole training step of a fixed fan-in output layer in one pass over the labels (fan_in_loss.cuh): a block
// of threads updates the weights of its labels in place, after it has computed their gradients. No other
// block reads these weights.

#include "fan_in_loss.cuh"
#include "updates.cuh"

namespace xla_ops::cuda {
namespace {

// w -= learning_rate * gradient. A weight without a gradient is not touched.
template <typename T>
struct SgdUpdate {
  T* weights;
  T* biases;                   // or null
  int64_t fan_in, num_labels;  // of the whole layer, of which this may be a shard
  const float* learning_rate;
  const uint32_t* key;

  __device__ void kernel(int64_t i, float d) const { update(weights + i, first_label() * fan_in + i, d); }
  __device__ void kernel(int64_t i, const float4& d) const {
    if (d.x == 0 && d.y == 0 && d.z == 0 && d.w == 0) return;
    if constexpr (std::is_same_v<T, float>) {
      const float rate = load_here(learning_rate);
      const float4 w = load4(weights + i);
      set4(weights + i, make_float4(d.x != 0 ? w.x - rate * d.x : w.x, d.y != 0 ? w.y - rate * d.y : w.y,
                                    d.z != 0 ? w.z - rate * d.z : w.z, d.w != 0 ? w.w - rate * d.w : w.w));
    } else {
      // One at a time: computing the random bits of all four at once takes too many registers.
#pragma unroll 1
      for (int v = 0; v < 4; ++v) kernel(i + v, v < 2 ? (v == 0 ? d.x : d.y) : (v == 2 ? d.z : d.w));
    }
  }
  __device__ void bias(int64_t label, float d) const {
    update(biases + label, num_labels * fan_in + first_label() + label, d);  // after those of the kernel
  }
  __device__ bool has_bias() const { return biases != nullptr; }
  __device__ int64_t first_label() const { return load_here(key + 3); }

  __device__ void update(T* w, int64_t position, float d) const {
    if (d == 0) return;
    const RoundingKey rounding{{load_here(key), load_here(key + 1)}, load_here(key + 2)};
    set(w, to_float(*w) - load_here(learning_rate) * d, rounding_bits(rounding, position));
  }
  // Loads a value where it is used. `volatile` stops the compiler from loading it before the pass: held in a
  // register for the whole pass, it would cause spills.
  template <typename Value>
  __device__ static Value load_here(const Value* p) {
    return *static_cast<const volatile Value*>(p);
  }
};

struct AdamUpdate {
  AdamWeights weights, biases;
  AdamRates rates;

  __device__ void kernel(int64_t i, float d) const { update(weights, i, d); }
  __device__ void kernel(int64_t i, const float4& d) const {
    const AdamStep step(rates);
    // All loads are issued before the first value is used.
    const float4 w = load4(weights.w + i), mu = load4_once(weights.mu + i), nu = load4_once(weights.nu + i);
    const AdamValues a = step({w.x, mu.x, nu.x}, d.x), b = step({w.y, mu.y, nu.y}, d.y),
                     c = step({w.z, mu.z, nu.z}, d.z), e = step({w.w, mu.w, nu.w}, d.w);
    set4(weights.w + i, make_float4(a.w, b.w, c.w, e.w));
    set4(weights.mu + i, make_float4(a.mu, b.mu, c.mu, e.mu));
    set4(weights.nu + i, make_float4(a.nu, b.nu, c.nu, e.nu));
  }
  __device__ void bias(int64_t label, float d) const { update(biases, label, d); }
  __device__ bool has_bias() const { return biases.w != nullptr; }

  __device__ void update(const AdamWeights& at, int64_t i, float d) const {
    const AdamValues next = AdamStep(rates)({at.w[i], load_once(at.mu + i), load_once(at.nu + i)}, d);
    at.w[i] = next.w;
    at.mu[i] = next.mu;
    at.nu[i] = next.nu;
  }
};

}  // namespace

template <typename T>
cudaError_t fan_in_sgd_step(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                            const Inputs<T>& inputs, T* kernel, Indices indices, T* bias,
                            const int32_t* positives, int64_t width, const float* learning_rate,
                            const uint32_t* key, float* value, T* d_x) {
  const SgdUpdate<T> update{kernel, bias, s.fan_in, s.mean_labels, learning_rate, key};
  return run_loss<T>(stream, workspace, s, loss, inputs, kernel, indices, bias, {positives, width}, update,
                     value, d_x);
}

cudaError_t fan_in_adam_step(cudaStream_t stream, Workspace& workspace, const Shape& s, Loss loss,
                             const Inputs<float>& inputs, const AdamWeights& kernel, Indices indices,
                             const AdamWeights& bias, const int32_t* positives, int64_t width,
                             const AdamRates& rates, float* value, float* d_x) {
  return run_loss<float>(stream, workspace, s, loss, inputs, kernel.w, indices, bias.w, {positives, width},
                         AdamUpdate{kernel, bias, rates}, value, d_x);
}

#define XLA_OPS_INSTANTIATE(T)                                                                            \
  template cudaError_t fan_in_sgd_step<T>(cudaStream_t, Workspace&, const Shape&, Loss, const Inputs<T>&, \
                                          T*, Indices, T*, const int32_t*, int64_t, const float*,         \
                                          const uint32_t*, float*, T*);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
