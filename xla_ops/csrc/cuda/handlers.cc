// The FFI handlers: they check what XLA passes, and call the launchers of kernels.h.
//
// Temporaries come from XLA's allocator while a handler runs, so the handlers are not kCmdBufferCompatible (a
// captured graph would replay them on memory that has been given to others since). To have them as extra results
// would take the same results on every platform. A launch is short next to these kernels.

#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>

#include "../fan_in_loss.h"
#include "../fan_in_matmul.h"
#include "../fan_in_top_k.h"
#include "../handler.h"
#include "kernels.h"

namespace xla_ops {
namespace {

class XlaScratch : public cuda::Scratch {
 public:
  explicit XlaScratch(ffi::ScratchAllocator allocator) : allocator_(std::move(allocator)) {}
  void* allocate(size_t bytes) override { return allocator_.Allocate(bytes, 256).value_or(nullptr); }

 private:
  ffi::ScratchAllocator allocator_;
};

// Calls fn(T*) with a null pointer of the type that `values` holds, and turns the CUDA error that it returns into
// one of XLA's.
template <typename Fn>
ffi::Error launch(const ffi::AnyBuffer& values, const ffi::AnyBuffer& indices, Fn&& fn) {
  cudaError_t status = cudaSuccess;
  XLA_OPS_RETURN_IF_ERROR(dispatch(values, indices, [&](auto* t, auto*) { status = fn(t); }));
  if (status == cudaSuccess) return ffi::Error::Success();
  const auto code =
      status == cudaErrorMemoryAllocation ? ffi::ErrorCode::kResourceExhausted : ffi::ErrorCode::kInternal;
  return ffi::Error(code, std::string("CUDA: ") + cudaGetErrorString(status));
}

cuda::Indices indices_of(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), buffer.element_type() == ffi::U16};
}

ffi::Error forward_impl(cudaStream_t stream, ffi::ScratchAllocator allocator, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                        ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y) {
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_matmul_forward(x, kernel, indices, bias, *y, &s));
  XlaScratch scratch(std::move(allocator));
  return launch(x, indices, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_matmul_forward(stream, scratch, s, data<const T>(x), data<const T>(kernel),
                                       indices_of(indices), optional_data<const T>(bias), data<T>(*y));
  });
}

ffi::Error gradients_impl(cudaStream_t stream, ffi::ScratchAllocator allocator, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                          ffi::AnyBuffer kernel, ffi::AnyBuffer indices, ffi::Result<ffi::AnyBuffer> d_x,
                          ffi::Result<ffi::AnyBuffer> d_kernel, ffi::Result<ffi::AnyBuffer> d_bias) {
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_matmul_gradients(x, dy, kernel, indices, *d_x, *d_kernel, *d_bias, &s));
  XlaScratch scratch(std::move(allocator));
  return launch(x, indices, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_matmul_gradients(stream, scratch, s, data<const T>(x), data<const T>(dy),
                                         data<const T>(kernel), indices_of(indices), data<T>(*d_x),
                                         data<T>(*d_kernel), optional_data<T>(*d_bias));
  });
}

ffi::Error value_impl(cudaStream_t stream, ffi::ScratchAllocator allocator, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                      ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::AnyBuffer positives, int64_t loss,
                      ffi::Result<ffi::AnyBuffer> value) {
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_loss_value(x, kernel, indices, bias, positives, loss, *value, &s));
  XlaScratch scratch(std::move(allocator));
  return launch(x, indices, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_loss_value(stream, scratch, s, static_cast<Loss>(loss), data<const T>(x),
                                   data<const T>(kernel), indices_of(indices), optional_data<const T>(bias),
                                   data<const int32_t>(positives), positives.dimensions()[1], data<float>(*value));
  });
}

ffi::Error loss_gradients_impl(cudaStream_t stream, ffi::ScratchAllocator allocator, ffi::AnyBuffer x,
                               ffi::AnyBuffer kernel, ffi::AnyBuffer indices, ffi::AnyBuffer bias,
                               ffi::AnyBuffer positives, int64_t loss, ffi::Result<ffi::AnyBuffer> value,
                               ffi::Result<ffi::AnyBuffer> d_x, ffi::Result<ffi::AnyBuffer> d_kernel,
                               ffi::Result<ffi::AnyBuffer> d_bias) {
  Shape s{};
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_loss_value(x, kernel, indices, bias, positives, loss, *value, &s));
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_loss_gradients(s, bias, *d_x, *d_kernel, *d_bias));
  XlaScratch scratch(std::move(allocator));
  return launch(x, indices, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_loss_gradients(stream, scratch, s, static_cast<Loss>(loss), data<const T>(x),
                                       data<const T>(kernel), indices_of(indices), optional_data<const T>(bias),
                                       data<const int32_t>(positives), positives.dimensions()[1], data<float>(*value),
                                       data<T>(*d_x), data<T>(*d_kernel), optional_data<T>(*d_bias));
  });
}

// Logits that exist at once: 16 MiB of them, but of so many labels at least, for the sake of very large batches.
constexpr int64_t kLogitsAtOnce = 1 << 22, kLabelsAtOnce = 1024;

ffi::Error top_k_impl(cudaStream_t stream, ffi::ScratchAllocator allocator, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                      ffi::AnyBuffer indices, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> scores,
                      ffi::Result<ffi::AnyBuffer> labels) {
  Shape s{};
  int64_t k = 0;
  XLA_OPS_RETURN_IF_ERROR(check_fan_in_top_k(x, kernel, indices, bias, *scores, *labels, &s, &k));
  XlaScratch scratch(std::move(allocator));
  const int64_t labels_at_once = std::max(kLabelsAtOnce, kLogitsAtOnce / std::max<int64_t>(1, s.batch));
  return launch(x, indices, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return cuda::fan_in_top_k(stream, scratch, s, k, labels_at_once, data<const T>(x), data<const T>(kernel),
                              indices_of(indices), optional_data<const T>(bias), data<float>(*scores),
                              data<int32_t>(*labels));
  });
}

auto context() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::ScratchAllocator>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_matmul_forward, forward_impl, bind_fan_in_matmul_forward(context()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_matmul_gradients, gradients_impl, bind_fan_in_matmul_gradients(context()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_loss_value, value_impl, bind_fan_in_loss_value(context()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_loss_gradients, loss_gradients_impl, bind_fan_in_loss_gradients(context()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(fan_in_top_k, top_k_impl, bind_fan_in_top_k(context()));

}  // namespace xla_ops
