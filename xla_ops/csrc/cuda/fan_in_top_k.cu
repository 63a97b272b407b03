// The k best labels of each example, streaming over the labels: logits exist for a number of labels at a
// time.
//
// The labels whose logits exist at a time are cut into ranges, and each example has a list of candidates for
// each range: with few examples there are many ranges, so that all of the device has work. Labels whose
// logits are above the worst of a full list are appended; then the list is cut down to the k best. In the end
// the lists of an example are joined. A candidate is one integer that orders as (score, lower label), and no
// two are the same: the set that is kept, and its order in the end, depend neither on the order of appending
// nor on the ranges.

#include "fan_in_matmul.cuh"
#include "launch.cuh"
#include "layer.cuh"
#include "layout.h"

namespace xla_ops::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kDigits = 256;

// Above the candidates of all lower scores and, of equal ones, of all higher labels. 0, which is below every
// candidate, stands for none, and for scores of NaN and -inf.
__device__ inline uint64_t candidate(float score, int64_t label) {
  if (!(score > -INFINITY)) return 0;
  if (score == 0) score = 0;  // -0 too
  const uint32_t bits = __float_as_uint(score);
  const uint32_t ordered = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffff - static_cast<uint32_t>(label));
}
__device__ inline float score_of(uint64_t candidate) {
  const uint32_t ordered = static_cast<uint32_t>(candidate >> 32);
  return candidate == 0 ? -INFINITY : __uint_as_float(ordered & 0x80000000 ? ordered & 0x7fffffff : ~ordered);
}
__device__ inline int32_t label_of(uint64_t candidate) {
  return candidate == 0 ? -1 : static_cast<int32_t>(0xffffffff - static_cast<uint32_t>(candidate));
}

// The lists of all examples, each with room for k candidates and the labels of its range.
struct CandidateLists {
  int64_t num_ranges, labels_per_range, k;  // the last range can have fewer labels
  int64_t capacity;                         // of all lists of an example
  uint64_t* candidates;                     // [B, capacity]
  uint32_t* counts;                         // [B, num_ranges], at most k between kernels
  uint64_t* bounds;  // [B, num_ranges], no candidate that is not above this can be among the k best

  __device__ uint64_t* candidates_of(int64_t example, int64_t range) const {
    return candidates + example * capacity + range * (k + labels_per_range);
  }
};
constexpr int64_t kLists = 256;  // that a batch has at least, where there are labels enough

// Where one list is worked on.
struct Work {
  uint32_t count;
  uint32_t digit, rank;
  uint32_t histogram[kDigits];
};

// A bound, above 0, that exactly k of `count` candidates reach, for 0 < k < count. To be called by all
// threads of a block.
//
// Digit by digit, from the top: counts the candidates by their next digit, among those whose digits so far
// are those of the k-th best.
__device__ inline uint64_t bound_of_best(const uint64_t* list, uint32_t count, uint32_t k, Work& work) {
  uint64_t found = 0, known = 0;
  uint32_t rank = k;  // of the one looked for, among those that agree with what is known of it
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kDigits; i += kThreads) work.histogram[i] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      if ((list[i] & known) == found) atomicAdd(&work.histogram[list[i] >> shift & (kDigits - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < kDigits) {
      uint32_t above = 0;
      for (int i = kDigits - 1; i > static_cast<int>(threadIdx.x); --i) above += work.histogram[i];
      if (above < rank && rank <= above + work.histogram[threadIdx.x]) {
        work.digit = threadIdx.x;
        work.rank = rank - above;
      }
    }
    __syncthreads();
    found |= static_cast<uint64_t>(work.digit) << shift;
    known |= static_cast<uint64_t>(kDigits - 1) << shift;
    rank = work.rank;
    const bool all_of_them = rank == work.histogram[work.digit];
    __syncthreads();  // before the histogram is used again
    if (all_of_them) break;
  }
  return found;
}

// Keeps the candidates that are not below `bound`, in place. To be called by all threads of a block.
__device__ inline void keep(uint64_t* list, uint32_t count, uint64_t bound, Work& work) {
  if (threadIdx.x == 0) work.count = 0;
  for (uint32_t first = 0; first < count; first += kThreads) {
    const uint32_t i = first + threadIdx.x;
    const uint64_t c = i < count ? list[i] : 0;
    __syncthreads();  // what was read may be written over: no more is kept than was read
    if (c >= bound) list[atomicAdd(&work.count, 1u)] = c;
  }
  __syncthreads();
}

// Takes in the logits [B, stride] of `labels` labels from `first` on.
__global__ void __launch_bounds__(kThreads)
    merge_kernel(int64_t batch, int64_t first, int64_t labels, int64_t stride,
                 const float* __restrict__ logits, uint32_t k, CandidateLists lists) {
  __shared__ Work work;
  for_each_item(batch * lists.num_ranges, [&](int64_t item) {
    const int64_t example = item / lists.num_ranges, range = item % lists.num_ranges;
    uint64_t* const list = lists.candidates_of(example, range);
    const uint64_t bound = lists.bounds[item];
    if (threadIdx.x == 0) work.count = lists.counts[item];
    __syncthreads();
    const int64_t end = min(labels, (range + 1) * lists.labels_per_range);
    for (int64_t i = range * lists.labels_per_range + threadIdx.x; i < end; i += kThreads) {
      const uint64_t c = candidate(logits[example * stride + i], first + i);
      if (c > bound) list[atomicAdd(&work.count, 1u)] = c;
    }
    __syncthreads();
    const uint32_t count = work.count;
    if (count > k) {
      const uint64_t new_bound = bound_of_best(list, count, k, work);
      keep(list, count, new_bound, work);
      if (threadIdx.x == 0) lists.bounds[item] = new_bound;
    }
    if (threadIdx.x == 0) lists.counts[item] = work.count;
    __syncthreads();
  });
}

// Makes one list of all of an example, in the place of the first, and returns how many candidates it has: at
// most k. To be called by all threads of a block.
__device__ inline uint32_t join(const CandidateLists& lists, int64_t example, Work& work) {
  uint64_t* const list = lists.candidates_of(example, 0);
  uint32_t count = lists.counts[example * lists.num_ranges];
  for (int64_t range = 1; range < lists.num_ranges; ++range) {
    const uint64_t* const from = lists.candidates_of(example, range);
    const uint32_t more = lists.counts[example * lists.num_ranges + range];
    for (uint32_t first = 0; first < more; first += kThreads) {
      const uint32_t i = first + threadIdx.x;
      const uint64_t c = i < more ? from[i] : 0;
      __syncthreads();  // what was read may be written over: there are no more than k of each list before
      if (i < more) list[count + i] = c;
    }
    count += more;
  }
  __syncthreads();
  if (count <= lists.k) return count;
  const uint32_t k = static_cast<uint32_t>(lists.k);
  keep(list, count, bound_of_best(list, count, k, work), work);
  return k;
}

// Sorts the lists of each example, of which the first `size`, a power of 2 and at least k, are used (a
// bitonic sort), and writes them.
__global__ void __launch_bounds__(kThreads)
    sort_kernel(int64_t batch, int64_t k, int64_t size, CandidateLists lists, float* __restrict__ scores,
                int32_t* __restrict__ labels) {
  __shared__ Work work;
  for_each_item(batch, [&](int64_t example) {
    uint64_t* const list = lists.candidates_of(example, 0);
    for (int64_t i = join(lists, example, work) + threadIdx.x; i < size; i += kThreads) list[i] = 0;
    __syncthreads();
    for (int64_t run = 2; run <= size; run *= 2) {
      for (int64_t step = run / 2; step > 0; step /= 2) {
        for (int64_t i = threadIdx.x; i < size / 2; i += kThreads) {
          const int64_t at = 2 * i - (i & (step - 1));
          const uint64_t a = list[at], b = list[at + step];
          const bool descending = (at & run) == 0;
          if ((a < b) == descending) list[at] = b, list[at + step] = a;
        }
        __syncthreads();
      }
    }
    for (int64_t i = threadIdx.x; i < k; i += kThreads) {
      scores[example * k + i] = score_of(list[i]);
      labels[example * k + i] = label_of(list[i]);
    }
  });
}

}  // namespace

template <typename T>
cudaError_t fan_in_top_k(cudaStream_t stream, Workspace& workspace, const Shape& s, int64_t k,
                         int64_t labels_at_once, const Inputs<T>& inputs, const T* kernel, Indices indices,
                         const T* bias, float* scores, int32_t* labels) {
  if (k == 0) return cudaSuccess;
  int64_t size = 1;
  while (size < k) size *= 2;
  const int64_t stride = std::min(s.labels, labels_at_once);
  // As many lists as a batch of kLists has at the most: the workspace grows no faster than the batch.
  const int64_t num_ranges =
      std::max<int64_t>(1, std::min(kLists / std::max<int64_t>(1, s.batch), stride / kThreads));
  const int64_t labels_per_range = ceil_div(stride, num_ranges);
  const int64_t capacity = std::max(num_ranges * k + stride, size);
  const Packed<T> packed = take_packed(workspace, s, inputs);
  float* const logits = workspace.take<float>(s.batch * stride);
  const CandidateLists lists{num_ranges,
                             labels_per_range,
                             k,
                             capacity,
                             workspace.take<uint64_t>(s.batch * capacity),
                             workspace.take<uint32_t>(s.batch * num_ranges),
                             workspace.take<uint64_t>(s.batch * num_ranges)};
  if (!workspace.enough()) return cudaErrorMemoryAllocation;
  XLA_OPS_RETURN_IF_CUDA_ERROR(pack(stream, s, inputs, packed));
  XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, lists.counts, s.batch * num_ranges));
  XLA_OPS_RETURN_IF_CUDA_ERROR(zero(stream, lists.bounds, s.batch * num_ranges));
  for (int64_t first = 0; first < s.labels; first += stride) {
    const int64_t count = std::min(stride, s.labels - first);
    const Indices of_these{
        static_cast<const char*>(indices.data) + first * s.fan_in * (indices.is_uint16 ? 2 : 4),
        indices.is_uint16};
    const Shape shape{s.batch, s.in_features, count, s.fan_in};
    const Layer<T> layer{shape, packed.rows, kernel + first * s.fan_in, of_these,
                         bias ? bias + first : nullptr};
    XLA_OPS_RETURN_IF_CUDA_ERROR(write_logits(stream, layer, packed.map, logits, stride));
    XLA_OPS_RETURN_IF_CUDA_ERROR(launch(merge_kernel, s.batch * num_ranges, kThreads, 0, stream, s.batch,
                                        first, count, stride, logits, static_cast<uint32_t>(k), lists));
  }
  return launch(sort_kernel, s.batch, kThreads, 0, stream, s.batch, k, size, lists, scores, labels);
}

#define XLA_OPS_INSTANTIATE(T)                                                                   \
  template cudaError_t fan_in_top_k<T>(cudaStream_t, Workspace&, const Shape&, int64_t, int64_t, \
                                       const Inputs<T>&, const T*, Indices, const T*, float*, int32_t*);
XLA_OPS_INSTANTIATE(float)
XLA_OPS_INSTANTIATE(bfloat16)

}  // namespace xla_ops::cuda
