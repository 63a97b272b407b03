// The FFI handlers: they check what XLA passes, and call the launchers of kernels.h.
//
// Their last result is the launcher's workspace, of no bytes where that has no temporaries. So memory is
// XLA's to plan, and the handlers are compatible with command buffers: XLA may capture the call into a graph
// and replay it, on the same memory.

#include "handlers.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../dense_step.h"
#include "../fan_in_loss.h"
#include "../fan_in_matmul.h"
#include "../fan_in_step.h"
#include "../fan_in_top_k.h"
#include "../handler.h"
#include "../kth_smallest.h"
#include "kernels.h"

namespace xla_ops {
namespace {

using WorkspaceResult = ffi::Result<ffi::AnyBuffer>;

std::string version_string(int version) {
  return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

ffi::Error error_of(cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, error_message(status));
}

// Calls fn(T*, workspace) with a null pointer of the type that x holds, and turns the CUDA error that it
// returns into one of XLA's.
template <typename Fn>
ffi::Error launch(const InputBuffers& in, const ffi::AnyBuffer& indices, ffi::AnyBuffer& buffer, Fn&& fn) {
  cudaError_t status = cudaSuccess;
  cuda::Workspace workspace(buffer.untyped_data(), static_cast<int64_t>(buffer.size_bytes()));
  XLA_OPS_RETURN_IF_ERROR(dispatch(in.x, indices, [&](auto* t, auto*) { status = fn(t, workspace); }));
  if (!workspace.enough()) {
    return ffi::Error::InvalidArgument("the workspace must have " + std::to_string(workspace.taken()) +
                                       " bytes, got " + std::to_string(buffer.size_bytes()));
  }
  return error_of(status);
}

cuda::Indices indices_of(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), buffer.element_type() == ffi::U16};
}

template <typename T>
cuda::Inputs<T> inputs_of(const InputBuffers& in) {
  const int64_t entries = in.rows.element_count();
  return {data<const T>(in.x),
          data<const int32_t>(in.rows),
          data<const int32_t>(in.columns),
          data<const T>(in.values),
          entries,
          in.num_columns};
}

ffi::Error forward_impl(cudaStream_t stream, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                        ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                        ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                        WorkspaceResult buffer) {
  const InputBuffers in{x, rows, columns, values, num_columns};
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_matmul_forward(in, kernel, indices, bias, *y, &s));
  return launch(in, indices, *buffer, [&](auto* t, cuda::Workspace& workspace) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_matmul_forward(stream, workspace, s, inputs_of<T>(in), data<const T>(kernel),
                                       indices_of(indices), optional_data<const T>(bias), data<T>(*y));
  });
}

ffi::Error gradients_impl(cudaStream_t stream, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                          ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                          ffi::AnyBuffer indices, ffi::AnyBuffer dy, ffi::Result<ffi::AnyBuffer> d_x,
                          ffi::Result<ffi::AnyBuffer> d_kernel, ffi::Result<ffi::AnyBuffer> d_bias,
                          WorkspaceResult buffer) {
  const InputBuffers in{x, rows, columns, values, num_columns};
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(
      check_fan_in_matmul_gradients(in, kernel, indices, dy, *d_x, *d_kernel, *d_bias, &s));
  return launch(in, indices, *buffer, [&](auto* t, cuda::Workspace& workspace) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_matmul_gradients(stream, workspace, s, inputs_of<T>(in), data<const T>(kernel),
                                         indices_of(indices), data<const T>(dy), optional_data<T>(*d_x),
                                         data<T>(*d_kernel), optional_data<T>(*d_bias));
  });
}

ffi::Error value_impl(cudaStream_t stream, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                      ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                      ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::AnyBuffer positives, int64_t loss,
                      int64_t num_labels, ffi::Result<ffi::AnyBuffer> value, WorkspaceResult buffer) {
  const InputBuffers in{x, rows, columns, values, num_columns};
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(
      check_fan_in_loss_value(in, kernel, indices, bias, positives, loss, num_labels, *value, &s));
  return launch(in, indices, *buffer, [&](auto* t, cuda::Workspace& workspace) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_loss_value(stream, workspace, s, static_cast<Loss>(loss), inputs_of<T>(in),
                                   data<const T>(kernel), indices_of(indices), optional_data<const T>(bias),
                                   data<const int32_t>(positives), positives.dimensions()[1],
                                   data<float>(*value));
  });
}

ffi::Error loss_gradients_impl(cudaStream_t stream, int64_t num_columns, ffi::AnyBuffer x,
                               ffi::AnyBuffer rows, ffi::AnyBuffer columns, ffi::AnyBuffer values,
                               ffi::AnyBuffer kernel, ffi::AnyBuffer indices, ffi::AnyBuffer bias,
                               ffi::AnyBuffer positives, int64_t loss, int64_t num_labels,
                               ffi::Result<ffi::AnyBuffer> value, ffi::Result<ffi::AnyBuffer> d_x,
                               ffi::Result<ffi::AnyBuffer> d_kernel, ffi::Result<ffi::AnyBuffer> d_bias,
                               WorkspaceResult buffer) {
  const InputBuffers in{x, rows, columns, values, num_columns};
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(
      check_fan_in_loss_value(in, kernel, indices, bias, positives, loss, num_labels, *value, &s));
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_loss_gradients(s, bias, *d_x, *d_kernel, *d_bias));
  return launch(in, indices, *buffer, [&](auto* t, cuda::Workspace& workspace) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_loss_gradients(stream, workspace, s, static_cast<Loss>(loss), inputs_of<T>(in),
                                       data<const T>(kernel), indices_of(indices),
                                       optional_data<const T>(bias), data<const int32_t>(positives),
                                       positives.dimensions()[1], data<float>(*value), optional_data<T>(*d_x),
                                       data<T>(*d_kernel), optional_data<T>(*d_bias));
  });
}

ffi::Error sgd_impl(cudaStream_t stream, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                    ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                    ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::AnyBuffer positives,
                    ffi::AnyBuffer learning_rate, ffi::AnyBuffer key, int64_t loss, int64_t num_labels,
                    ffi::Result<ffi::AnyBuffer> mean, ffi::Result<ffi::AnyBuffer> d_x,
                    ffi::Result<ffi::AnyBuffer> new_kernel, ffi::Result<ffi::AnyBuffer> new_bias,
                    WorkspaceResult buffer) {
  const InputBuffers in{x, rows, columns, values, num_columns};
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_step_sgd(
      {in, kernel, indices, bias, positives, loss, num_labels, *mean, *d_x, *new_kernel, *new_bias},
      learning_rate, key, &s));
  return launch(in, indices, *buffer, [&](auto* t, cuda::Workspace& workspace) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_sgd_step(stream, workspace, s, static_cast<Loss>(loss), inputs_of<T>(in),
                                 data<T>(kernel), indices_of(indices), optional_data<T>(bias),
                                 data<const int32_t>(positives), positives.dimensions()[1],
                                 data<const float>(learning_rate), data<const uint32_t>(key),
                                 data<float>(*mean), optional_data<T>(*d_x));
  });
}

ffi::Error adam_impl(cudaStream_t stream, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                     ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                     ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::AnyBuffer positives,
                     ffi::AnyBuffer mu_kernel, ffi::AnyBuffer nu_kernel, ffi::AnyBuffer mu_bias,
                     ffi::AnyBuffer nu_bias, ffi::AnyBuffer rates, int64_t loss, int64_t num_labels, float b1,
                     float b2, float epsilon, ffi::Result<ffi::AnyBuffer> mean,
                     ffi::Result<ffi::AnyBuffer> d_x, ffi::Result<ffi::AnyBuffer> new_kernel,
                     ffi::Result<ffi::AnyBuffer> new_bias, ffi::Result<ffi::AnyBuffer> new_mu_kernel,
                     ffi::Result<ffi::AnyBuffer> new_nu_kernel, ffi::Result<ffi::AnyBuffer> new_mu_bias,
                     ffi::Result<ffi::AnyBuffer> new_nu_bias, WorkspaceResult buffer) {
  const InputBuffers in{x, rows, columns, values, num_columns};
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_step_adam(
      {in, kernel, indices, bias, positives, loss, num_labels, *mean, *d_x, *new_kernel, *new_bias},
      {mu_kernel, nu_kernel, mu_bias, nu_bias, rates, *new_mu_kernel, *new_nu_kernel, *new_mu_bias,
       *new_nu_bias},
      &s));
  return launch(in, indices, *buffer, [&](auto*, cuda::Workspace& workspace) {  // the values are float32
    return cuda::fan_in_adam_step(
        stream, workspace, s, static_cast<Loss>(loss), inputs_of<float>(in),
        {data<float>(kernel), data<float>(mu_kernel), data<float>(nu_kernel)}, indices_of(indices),
        {optional_data<float>(bias), data<float>(mu_bias), data<float>(nu_bias)},
        data<const int32_t>(positives), positives.dimensions()[1],
        {data<const float>(rates), b1, b2, epsilon}, data<float>(*mean), optional_data<float>(*d_x));
  });
}

// Logits that exist at once: 16 MiB of them, but of so many labels at least, for the sake of very large
// batches.
constexpr int64_t kLogitsAtOnce = 1 << 22, kLabelsAtOnce = 1024;

int64_t labels_at_once(const Shape& s) {
  return std::max(kLabelsAtOnce, kLogitsAtOnce / std::max<int64_t>(1, s.batch));
}

ffi::Error top_k_impl(cudaStream_t stream, int64_t num_columns, ffi::AnyBuffer x, ffi::AnyBuffer rows,
                      ffi::AnyBuffer columns, ffi::AnyBuffer values, ffi::AnyBuffer kernel,
                      ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> scores,
                      ffi::Result<ffi::AnyBuffer> labels, WorkspaceResult buffer) {
  const InputBuffers in{x, rows, columns, values, num_columns};
  Shape s{};
  int64_t k = 0;
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_top_k(in, kernel, indices, bias, *scores, *labels, &s, &k));
  return launch(in, indices, *buffer, [&](auto* t, cuda::Workspace& workspace) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_top_k(stream, workspace, s, k, labels_at_once(s), inputs_of<T>(in),
                              data<const T>(kernel), indices_of(indices), optional_data<const T>(bias),
                              data<float>(*scores), data<int32_t>(*labels));
  });
}

ffi::Error dense_adam_impl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer dy,
                           ffi::AnyBuffer mu, ffi::AnyBuffer nu, ffi::AnyBuffer rates, ffi::AnyBuffer key,
                           ffi::AnyBuffer, float b1, float b2, float epsilon,
                           ffi::Result<ffi::AnyBuffer> new_kernel, ffi::Result<ffi::AnyBuffer> new_mu,
                           ffi::Result<ffi::AnyBuffer> new_nu, WorkspaceResult) {
  DenseShape s{};
  XLA_OPS_RETURN_IF_ERROR(
      check_dense_step_adam({x, kernel, dy, mu, nu, rates, key, *new_kernel, *new_mu, *new_nu}, &s));
  return dispatch(mu, [&](auto* m) {
    using M = std::remove_pointer_t<decltype(m)>;
    return error_of(cuda::dense_adam_step(
        stream, s, data<const float>(x), data<const float>(dy), data<float>(kernel), data<M>(mu), data<M>(nu),
        {data<const float>(rates), b1, b2, epsilon}, data<const uint32_t>(key)));
  });
}

ffi::Error kth_impl(cudaStream_t stream, ffi::AnyBuffer x, int64_t k, ffi::Result<ffi::AnyBuffer> result,
                    WorkspaceResult buffer) {
  XLA_OPS_RETURN_IF_ERROR(check_kth_smallest(x, k, *result));
  return dispatch(x, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    cuda::Workspace workspace(buffer->untyped_data(), static_cast<int64_t>(buffer->size_bytes()));
    return error_of(
        cuda::kth_smallest(stream, workspace, data<const T>(x), x.element_count(), k, data<float>(*result)));
  });
}

// What a launcher takes if it has no workspace.
template <typename T>
int64_t taken_by(const std::string& handler, const Shape& s, int64_t k, int64_t entries,
                 int64_t num_columns) {
  const cuda::Inputs<T> inputs{nullptr, nullptr, nullptr, nullptr, entries, num_columns};
  const T* in = nullptr;
  T* out = nullptr;
  float* scores = nullptr;
  int32_t* labels = nullptr;
  const cuda::Indices indices{nullptr, false};
  cuda::Workspace none;
  if (handler == "xla_ops.fan_in_matmul.forward") {
    cuda::fan_in_matmul_forward(nullptr, none, s, inputs, in, indices, in, out);
  } else if (handler == "xla_ops.fan_in_matmul.gradients") {
    cuda::fan_in_matmul_gradients(nullptr, none, s, inputs, in, indices, in, out, out, out);
  } else if (handler == "xla_ops.fan_in_loss.value") {
    cuda::fan_in_loss_value(nullptr, none, s, Loss{}, inputs, in, indices, in, labels, 0, scores);
  } else if (handler == "xla_ops.fan_in_loss.gradients") {
    cuda::fan_in_loss_gradients(nullptr, none, s, Loss{}, inputs, in, indices, in, labels, 0, scores, out,
                                out, out);
  } else if (handler == "xla_ops.fan_in_step.sgd") {
    cuda::fan_in_sgd_step(nullptr, none, s, Loss{}, inputs, out, indices, out, labels, 0, scores, nullptr,
                          scores, out);
  } else if (handler == "xla_ops.fan_in_step.adam") {
    const cuda::Inputs<float> of_floats{nullptr, nullptr, nullptr, nullptr, entries, num_columns};
    cuda::fan_in_adam_step(nullptr, none, s, Loss{}, of_floats, {}, indices, {}, labels, 0, {}, scores,
                           scores);
  } else if (handler == "xla_ops.fan_in_top_k") {
    cuda::fan_in_top_k(nullptr, none, s, k, labels_at_once(s), inputs, in, indices, in, scores, labels);
  } else if (handler == "xla_ops.kth_smallest") {
    cuda::kth_smallest(nullptr, none, in, 0, 0, scores);
  } else if (handler != "xla_ops.dense_step.adam") {  // which has no temporaries
    throw std::invalid_argument("no such handler: " + handler);
  }
  return none.taken();
}

auto stream() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

}  // namespace

std::string error_message(int status) {
  const auto error = static_cast<cudaError_t>(status);
  if (error != cudaErrorInsufficientDriver) return std::string("CUDA: ") + cudaGetErrorString(error);
  int driver = 0;  // where there is none
  cudaDriverGetVersion(&driver);
  const std::string found =
      driver == 0 ? "there is no driver" : "the driver is for " + version_string(driver);
  return "xla_ops was built with " + version_string(CUDART_VERSION) + ", which needs a driver for it, but " +
         found + ". Update the driver, or rebuild with its toolkit: set CUDA_HOME";
}

int64_t workspace_bytes(const std::string& handler, bool is_bfloat16, const Shape& s, int64_t k,
                        int64_t entries, int64_t num_columns) {
  return is_bfloat16 ? taken_by<bfloat16>(handler, s, k, entries, num_columns)
                     : taken_by<float>(handler, s, k, entries, num_columns);
}

#define XLA_OPS_DEFINE_HANDLER(handler, impl)                                                  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(handler, impl, bind_##handler(stream()).Ret<ffi::AnyBuffer>(), \
                                {ffi::Traits::kCmdBufferCompatible})
XLA_OPS_DEFINE_HANDLER(fan_in_matmul_forward, forward_impl);
XLA_OPS_DEFINE_HANDLER(fan_in_matmul_gradients, gradients_impl);
XLA_OPS_DEFINE_HANDLER(fan_in_loss_value, value_impl);
XLA_OPS_DEFINE_HANDLER(fan_in_loss_gradients, loss_gradients_impl);
XLA_OPS_DEFINE_HANDLER(fan_in_step_adam, adam_impl);
XLA_OPS_DEFINE_HANDLER(fan_in_step_sgd, sgd_impl);
XLA_OPS_DEFINE_HANDLER(fan_in_top_k, top_k_impl);
XLA_OPS_DEFINE_HANDLER(dense_step_adam, dense_adam_impl);
XLA_OPS_DEFINE_HANDLER(kth_smallest, kth_impl);

}  // namespace xla_ops
