// The table of kernels of one instruction set. setup.py compiles this file once per instruction set, with
// XLA_OPS_ISA naming it.
//
// Nothing but the table has external linkage: the headers in kernels/ are in an unnamed namespace, all
// functions of shared headers are XLA_OPS_INLINE, and no header of the standard library with functions is
// included. Otherwise an inline function compiled here with AVX-512 could be the copy that the linker keeps
// for the whole program, and crash processors without it.

#include "kernels.h"

#include <stdint.h>

#include "kernels/connections.h"
#include "kernels/dense.h"
#include "kernels/fan_in.h"
#include "kernels/layout.h"
#include "kernels/loss.h"
#include "kernels/rows.h"
#include "kernels/updates.h"

namespace xla_ops {
namespace {

template <typename T, typename I>
constexpr FanInKernels<T, I> fan_in_table() {
  return {logits<T, I>, kernel_grad<T, I>, input_grad<T, I>};
}

template <typename T>
constexpr ListedKernels<T> listed_table() {
  return {listed_logits<T>, listed_kernel_grad<T>, listed_input_grad<T>};
}

template <typename T>
constexpr LayoutKernels<T> layout_table() {
  return {transpose<T, T>, transpose<T, float>, transpose<float, T>, narrow<T>};
}

}  // namespace

#define XLA_OPS_STRING_(x) #x
#define XLA_OPS_STRING(x) XLA_OPS_STRING_(x)
#define XLA_OPS_TABLE_(isa) isa_##isa
#define XLA_OPS_TABLE(isa) XLA_OPS_TABLE_(isa)

extern const Isa XLA_OPS_TABLE(XLA_OPS_ISA);
const Isa XLA_OPS_TABLE(XLA_OPS_ISA) = {
    XLA_OPS_STRING(XLA_OPS_ISA),
    fan_in_table<float, uint16_t>(),
    fan_in_table<float, int32_t>(),
    fan_in_table<bfloat16, uint16_t>(),
    fan_in_table<bfloat16, int32_t>(),
    listed_table<float>(),
    listed_table<bfloat16>(),
    {list_connections<float, uint16_t>},
    {list_connections<float, int32_t>},
    {list_connections<bfloat16, uint16_t>},
    {list_connections<bfloat16, int32_t>},
    layout_table<float>(),
    layout_table<bfloat16>(),
    {negatives<SquaredHinge>, negatives<BinaryCrossEntropy>, row_sums, nonzero, above},
    {adam, adam_bf16, sgd, sgd_stochastic},
    {products},
};

}  // namespace xla_ops
