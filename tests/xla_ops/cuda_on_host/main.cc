// Runs one launcher of xla_ops/csrc/cuda on arrays in files.
//
//   kernels_on_host OP DIRECTORY DTYPE INDEX_DTYPE B D L F C processors blocks_per_processor shared_bytes
//   [...]
//
// The last arguments are (loss, P[, num_labels]) for fan_in_loss and fan_in_step, (k, labels at once) for
// fan_in_top_k, and k for kth_smallest. For dense_step, DTYPE is the dtype of the moments, and [L, F] is the
// shape of the kernel. Each array is a file in DIRECTORY. Every array and every temporary is a separate
// allocation, so that the sanitizer detects accesses out of bounds. Results and temporaries are initialised
// to NaN (integers to 0x7f7f7f7f). Prints the bytes of workspace that the launcher took, and the number of
// atomic additions of floats. If there is a file "no_d_x", d_x is not computed.

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using xla_ops::bfloat16;
using xla_ops::DenseShape;
using xla_ops::Shape;
using xla_ops::cuda::Indices;
using xla_ops::cuda::Inputs;
using xla_ops::cuda::Workspace;

struct HostWorkspace : Workspace {
  explicit HostWorkspace(int64_t bytes) : Workspace(nullptr, bytes) {}
  void* place(int64_t, int64_t bytes) override {
    buffers.emplace_back(new (std::align_val_t(kAlignment)) char[bytes]);
    std::memset(buffers.back().get(), 0xff, bytes);
    return buffers.back().get();
  }
  struct Delete {
    void operator()(char* p) const { operator delete[](p, std::align_val_t(kAlignment)); }
  };
  std::vector<std::unique_ptr<char[], Delete>> buffers;
};

struct Call {
  std::string op, directory;
  Shape shape;
  int64_t columns;  // number of sparse inputs
  bool is_uint16;
  std::vector<int64_t> extra;

  std::string path(const char* name) const { return directory + "/" + name; }
  bool without_d_x() const { return std::ifstream(path("no_d_x")).good(); }
};

// An operand, read from its file. The allocation has exactly the size of the file.
template <typename T>
class Operand {
 public:
  Operand(const Call& call, const char* name) {
    std::ifstream file(call.path(name), std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    data_.reset(new T[bytes.size() / sizeof(T)]);
    std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(data_.get()));
    bytes_ = static_cast<int64_t>(bytes.size());
    empty_ = bytes.empty();
  }
  const T* get() const { return data_.get(); }
  int64_t count() const { return bytes_ / static_cast<int64_t>(sizeof(T)); }
  const T* or_null() const { return empty_ ? nullptr : data_.get(); }

 protected:
  std::unique_ptr<T[]> data_;
  int64_t bytes_;
  bool empty_;
};

// An operand that is updated in place. The destructor writes its values to another file.
template <typename T>
class Updated : public Operand<T> {
 public:
  Updated(const Call& call, const char* name) : Operand<T>(call, name), path_(call.path(name) + ".new") {}
  ~Updated() {
    std::ofstream(path_, std::ios::binary).write(reinterpret_cast<char*>(this->data_.get()), this->bytes_);
  }
  T* get() const { return this->empty_ ? nullptr : this->data_.get(); }

 private:
  std::string path_;
};

// A result. The destructor writes it to its file.
template <typename T>
class Result {
 public:
  Result(const Call& call, const char* name, int64_t count)
      : path_(call.path(name)), count_(count), data_(new T[count]) {
    std::memset(static_cast<void*>(data_.get()), std::is_same_v<T, int32_t> ? 0x7f : 0xff, count * sizeof(T));
  }
  ~Result() {
    std::ofstream(path_, std::ios::binary).write(reinterpret_cast<char*>(data_.get()), count_ * sizeof(T));
  }
  T* get() const { return data_.get(); }
  T* null_if(bool condition) const { return condition ? nullptr : data_.get(); }

 private:
  std::string path_;
  int64_t count_;
  std::unique_ptr<T[]> data_;
};

template <typename M>
cudaError_t run_dense_adam(const Call& call) {
  const DenseShape s{call.shape.batch, call.shape.in_features, call.shape.fan_in};
  const Operand<float> x(call, "x"), dy(call, "dy"), rates(call, "rates"), decays(call, "decays");
  const Operand<uint32_t> key(call, "key");
  const Updated<float> kernel(call, "kernel");
  const Updated<M> mu(call, "mu"), nu(call, "nu");
  const float* d = decays.get();
  return xla_ops::cuda::dense_adam_step(nullptr, s, x.get(), dy.get(), kernel.get(), mu.get(), nu.get(),
                                        {rates.get(), d[0], d[1], 1e-7f}, key.get());
}

template <typename T>
cudaError_t run(const Call& call, Workspace& workspace) {
  Shape s = call.shape;
  if (call.extra.size() > 2) s.mean_labels = call.extra[2];
  const Operand<T> x(call, "x"), kernel(call, "kernel"), bias(call, "bias");
  const Operand<int32_t> rows(call, "rows"), columns(call, "columns");
  const Operand<T> values(call, "values");
  const Inputs<T> inputs{x.get(), rows.get(), columns.get(), values.get(), rows.count(), call.columns};
  const Operand<char> index_bytes(call, "indices");
  const Indices indices{index_bytes.get(), call.is_uint16};
  if (call.op == "fan_in_matmul.forward") {
    const Result<T> y(call, "y", s.batch * s.labels);
    return fan_in_matmul_forward(nullptr, workspace, s, inputs, kernel.get(), indices, bias.or_null(),
                                 y.get());
  }
  if (call.op == "fan_in_matmul.gradients") {
    const Operand<T> dy(call, "dy");
    const Result<T> d_x(call, "d_x", s.batch * s.in_features),
        d_kernel(call, "d_kernel", s.labels * s.fan_in),
        d_bias(call, "d_bias", bias.or_null() ? s.labels : 0);
    return fan_in_matmul_gradients(nullptr, workspace, s, inputs, kernel.get(), indices, dy.get(),
                                   d_x.null_if(call.without_d_x()), d_kernel.get(),
                                   bias.or_null() ? d_bias.get() : nullptr);
  }
  if (call.op == "fan_in_loss.value" || call.op == "fan_in_loss.gradients") {
    const Operand<int32_t> positives(call, "positives");
    const auto loss = static_cast<xla_ops::Loss>(call.extra.at(0));
    const int64_t width = call.extra.at(1);
    const Result<float> value(call, "value", 1);
    if (call.op == "fan_in_loss.value") {
      return fan_in_loss_value(nullptr, workspace, s, loss, inputs, kernel.get(), indices, bias.or_null(),
                               positives.get(), width, value.get());
    }
    const Result<T> d_x(call, "d_x", s.batch * s.in_features),
        d_kernel(call, "d_kernel", s.labels * s.fan_in),
        d_bias(call, "d_bias", bias.or_null() ? s.labels : 0);
    return fan_in_loss_gradients(nullptr, workspace, s, loss, inputs, kernel.get(), indices, bias.or_null(),
                                 positives.get(), width, value.get(), d_x.null_if(call.without_d_x()),
                                 d_kernel.get(), bias.or_null() ? d_bias.get() : nullptr);
  }
  if (call.op == "fan_in_step.sgd" || call.op == "fan_in_step.adam") {
    const Operand<int32_t> positives(call, "positives");
    const auto loss = static_cast<xla_ops::Loss>(call.extra.at(0));
    const int64_t width = call.extra.at(1);
    const Result<float> value(call, "value", 1);
    const Result<T> d_x(call, "d_x", s.batch * s.in_features);
    const Operand<float> rates(call, "rates");
    const Updated<T> w(call, "kernel"), b(call, "bias");
    if (call.op == "fan_in_step.sgd") {
      const Operand<uint32_t> key(call, "key");
      return fan_in_sgd_step(nullptr, workspace, s, loss, inputs, w.get(), indices, b.get(), positives.get(),
                             width, rates.get(), key.get(), value.get(), d_x.null_if(call.without_d_x()));
    }
    if constexpr (std::is_same_v<T, float>) {
      const Updated<float> mu_kernel(call, "mu_kernel"), nu_kernel(call, "nu_kernel"),
          mu_bias(call, "mu_bias"), nu_bias(call, "nu_bias");
      return fan_in_adam_step(
          nullptr, workspace, s, loss, inputs, {w.get(), mu_kernel.get(), nu_kernel.get()}, indices,
          {b.get(), mu_bias.get(), nu_bias.get()}, positives.get(), width, {rates.get(), 0.8f, 0.99f, 1e-7f},
          value.get(), d_x.null_if(call.without_d_x()));
    }
  }
  if (call.op == "kth_smallest") {
    const Result<float> result(call, "result", 1);
    return kth_smallest(nullptr, workspace, x.get(), x.count(), call.extra.at(0), result.get());
  }
  if (call.op == "fan_in_top_k") {
    const int64_t k = call.extra.at(0), labels_at_once = call.extra.at(1);
    const Result<float> scores(call, "scores", s.batch * k);
    const Result<int32_t> labels(call, "labels", s.batch * k);
    return fan_in_top_k(nullptr, workspace, s, k, labels_at_once, inputs, kernel.get(), indices,
                        bias.or_null(), scores.get(), labels.get());
  }
  std::fprintf(stderr, "no such op: %s\n", call.op.c_str());
  return cudaErrorInvalidValue;
}

}  // namespace

int main(int, char** argv) {
  Call call{argv[1], argv[2], {}, 0, std::string(argv[4]) == "uint16", {}};
  std::vector<int64_t> numbers;
  for (char** a = argv + 5; *a; ++a) numbers.push_back(std::strtoll(*a, nullptr, 10));
  call.shape = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[2]};
  call.columns = numbers[4];
  cuda_on_host::device = {static_cast<int>(numbers[5]), static_cast<int>(numbers[6]),
                          static_cast<int>(numbers[7])};
  call.extra.assign(numbers.begin() + 8, numbers.end());
  const bool is_float32 = std::string(argv[3]) == "float32";
  if (call.op == "dense_step.adam") {
    std::printf("0 0\n");
    return is_float32 ? run_dense_adam<float>(call) : run_dense_adam<bfloat16>(call);
  }
  const auto run_with = [&](Workspace& workspace) {
    return is_float32 ? run<float>(call, workspace) : run<bfloat16>(call, workspace);
  };
  Workspace none;
  run_with(none);
  HostWorkspace workspace(none.taken());
  const cudaError_t status = run_with(workspace);
  std::printf("%lld %lld\n", static_cast<long long>(workspace.taken()),
              static_cast<long long>(cuda_on_host::additions));
  return status;
}
