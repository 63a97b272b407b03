// The FFI handlers: they check the operands that XLA passes, and call the launchers of kernels.h.
//
// Their last result is the launcher's workspace, which has no bytes if the launcher has no temporaries. So
// XLA plans all memory, and the handlers are compatible with command buffers: XLA may capture the call into a
// graph and replay it, on the same memory.

#include "handlers.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../call.h"
#include "../dense_step.h"
#include "../fan_in_loss.h"
#include "../fan_in_matmul.h"
#include "../fan_in_step.h"
#include "../fan_in_top_k.h"
#include "../kth_smallest.h"
#include "kernels.h"

namespace xla_ops {
namespace {

std::string version_string(int version) {
  return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

ffi::Error error_of(cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, error_message(status));
}

// Reads and checks a call whose last result is the workspace, and runs it.
template <typename CallType>
ffi::Error handle(cudaError_t (*run)(cudaStream_t, cuda::Workspace&, const CallType&), cudaStream_t stream,
                  ffi::RemainingArgs arguments, ffi::RemainingRets results, ffi::Dictionary attributes) {
  return guarded([&] {
    CallType call(arguments, results, attributes);
    const ffi::AnyBuffer buffer = call.result();
    call.check_all_are_read();
    call.check();
    cuda::Workspace workspace(buffer.untyped_data(), static_cast<int64_t>(buffer.size_bytes()));
    const cudaError_t status = run(stream, workspace, call);
    if (!workspace.enough()) {
      throw InvalidCall("the workspace must have " + std::to_string(workspace.taken()) + " bytes, got " +
                        std::to_string(buffer.size_bytes()));
    }
    return error_of(status);
  });
}

template <typename T>
cuda::Inputs<T> inputs_of(const LayerCall& call) {
  return {data<const T>(call.x),
          data<const int32_t>(call.rows),
          data<const int32_t>(call.columns),
          data<const T>(call.values),
          call.num_entries(),
          call.num_columns};
}

cuda::Indices indices_of(const LayerCall& call) {
  return {call.indices.untyped_data(), call.indices.element_type() == ffi::U16};
}

// Returns fn(T*), given a null pointer of the type that the kernel holds, after a check of the indices' type.
template <typename Fn>
cudaError_t dispatch_kernel(const LayerCall& call, Fn&& fn) {
  return dispatch(call, [&](auto* t, auto*) { return fn(t); });
}

cudaError_t run_forward(cudaStream_t stream, cuda::Workspace& workspace, const FanInMatmulForward& call) {
  return dispatch_kernel(call, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_matmul_forward(stream, workspace, call.shape, inputs_of<T>(call),
                                       data<const T>(call.kernel), indices_of(call),
                                       optional_data<const T>(call.bias), data<T>(call.y));
  });
}

cudaError_t run_gradients(cudaStream_t stream, cuda::Workspace& workspace, const FanInMatmulGradients& call) {
  return dispatch_kernel(call, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_matmul_gradients(stream, workspace, call.shape, inputs_of<T>(call),
                                         data<const T>(call.kernel), indices_of(call), data<const T>(call.dy),
                                         optional_data<T>(call.d_x), data<T>(call.d_kernel),
                                         optional_data<T>(call.d_bias));
  });
}

cudaError_t run_loss(cudaStream_t stream, cuda::Workspace& workspace, const FanInLossValue& call) {
  return dispatch_kernel(call, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_loss_value(stream, workspace, call.shape, static_cast<Loss>(call.loss),
                                   inputs_of<T>(call), data<const T>(call.kernel), indices_of(call),
                                   optional_data<const T>(call.bias), data<const int32_t>(call.positives),
                                   call.positives_width(), data<float>(call.mean));
  });
}

cudaError_t run_loss_gradients(cudaStream_t stream, cuda::Workspace& workspace,
                               const FanInLossGradients& call) {
  return dispatch_kernel(call, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_loss_gradients(
        stream, workspace, call.shape, static_cast<Loss>(call.loss), inputs_of<T>(call),
        data<const T>(call.kernel), indices_of(call), optional_data<const T>(call.bias),
        data<const int32_t>(call.positives), call.positives_width(), data<float>(call.mean),
        optional_data<T>(call.d_x), data<T>(call.d_kernel), optional_data<T>(call.d_bias));
  });
}

cudaError_t run_sgd(cudaStream_t stream, cuda::Workspace& workspace, const FanInStepSgd& call) {
  return dispatch_kernel(call, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_sgd_step(
        stream, workspace, call.shape, static_cast<Loss>(call.loss), inputs_of<T>(call), data<T>(call.kernel),
        indices_of(call), optional_data<T>(call.bias), data<const int32_t>(call.positives),
        call.positives_width(), data<const float>(call.learning_rate), data<const uint32_t>(call.key),
        data<float>(call.mean), optional_data<T>(call.d_x));
  });
}

cudaError_t run_adam(cudaStream_t stream, cuda::Workspace& workspace, const FanInStepAdam& call) {
  return dispatch_indices(call.indices, [&](auto*) {
    return cuda::fan_in_adam_step(
        stream, workspace, call.shape, static_cast<Loss>(call.loss), inputs_of<float>(call),
        {data<float>(call.kernel), data<float>(call.mu_kernel), data<float>(call.nu_kernel)},
        indices_of(call),
        {optional_data<float>(call.bias), data<float>(call.mu_bias), data<float>(call.nu_bias)},
        data<const int32_t>(call.positives), call.positives_width(),
        {data<const float>(call.rates), call.b1, call.b2, call.epsilon}, data<float>(call.mean),
        optional_data<float>(call.d_x));
  });
}

// Logits that exist at once: 16 MiB of them, but of so many labels at least, for the sake of very large
// batches.
constexpr int64_t kLogitsAtOnce = 1 << 22, kLabelsAtOnce = 1024;

int64_t labels_at_once(const Shape& s) {
  return std::max(kLabelsAtOnce, kLogitsAtOnce / std::max<int64_t>(1, s.batch));
}

cudaError_t run_top_k(cudaStream_t stream, cuda::Workspace& workspace, const FanInTopK& call) {
  return dispatch_kernel(call, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_top_k(stream, workspace, call.shape, call.k(), labels_at_once(call.shape),
                              inputs_of<T>(call), data<const T>(call.kernel), indices_of(call),
                              optional_data<const T>(call.bias), data<float>(call.scores),
                              data<int32_t>(call.labels));
  });
}

cudaError_t run_dense_adam(cudaStream_t stream, cuda::Workspace&, const DenseStepAdam& call) {
  return dispatch_values(call.mu, [&](auto* m) {
    using M = std::remove_pointer_t<decltype(m)>;
    return cuda::dense_adam_step(stream, call.shape, data<const float>(call.x), data<const float>(call.dy),
                                 data<float>(call.kernel), data<M>(call.mu), data<M>(call.nu),
                                 {data<const float>(call.rates), call.b1, call.b2, call.epsilon},
                                 data<const uint32_t>(call.key));
  });
}

cudaError_t run_kth(cudaStream_t stream, cuda::Workspace& workspace, const KthSmallest& call) {
  return dispatch_values(call.x, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::kth_smallest(stream, workspace, data<const T>(call.x), call.x.element_count(), call.k,
                              data<float>(call.smallest));
  });
}

// Returns the workspace that a launcher needs, which it computes if it is called without one.
template <typename T>
int64_t workspace_needed(const std::string& handler, const Shape& s, int64_t k, int64_t num_entries,
                         int64_t num_columns) {
  const cuda::Inputs<T> inputs{nullptr, nullptr, nullptr, nullptr, num_entries, num_columns};
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
    const cuda::Inputs<float> of_floats{nullptr, nullptr, nullptr, nullptr, num_entries, num_columns};
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
                        int64_t num_entries, int64_t num_columns) {
  return is_bfloat16 ? workspace_needed<bfloat16>(handler, s, k, num_entries, num_columns)
                     : workspace_needed<float>(handler, s, k, num_entries, num_columns);
}

#define XLA_OPS_DEFINE_HANDLER(handler, run)                                                             \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                         \
      handler,                                                                                           \
      [](cudaStream_t stream, ffi::RemainingArgs arguments, ffi::RemainingRets results,                  \
         ffi::Dictionary attributes) { return handle(run, stream, arguments, results, attributes); },    \
      ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets().Attrs(), \
      {ffi::Traits::kCmdBufferCompatible})
XLA_OPS_DEFINE_HANDLER(fan_in_matmul_forward, run_forward);
XLA_OPS_DEFINE_HANDLER(fan_in_matmul_gradients, run_gradients);
XLA_OPS_DEFINE_HANDLER(fan_in_loss_value, run_loss);
XLA_OPS_DEFINE_HANDLER(fan_in_loss_gradients, run_loss_gradients);
XLA_OPS_DEFINE_HANDLER(fan_in_step_adam, run_adam);
XLA_OPS_DEFINE_HANDLER(fan_in_step_sgd, run_sgd);
XLA_OPS_DEFINE_HANDLER(fan_in_top_k, run_top_k);
XLA_OPS_DEFINE_HANDLER(dense_step_adam, run_dense_adam);
XLA_OPS_DEFINE_HANDLER(kth_smallest, run_kth);

}  // namespace xla_ops
