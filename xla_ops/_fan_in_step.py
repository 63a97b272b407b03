"""In-place training steps of a fixed fan-in output layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xla_ops import _native
from xla_ops._arguments import (
    adam_attributes,
    adam_rates,
    as_array,
    as_learning_rate,
    check_dtype,
    check_shape,
    next_step,
    rounding_key,
)
from xla_ops._fan_in_loss import loss_operands
from xla_ops._inputs import SparseInputs, d_x_shape


class AdamState(NamedTuple):
    """The state of Adam for a layer.

    Attributes:
      count: int32 scalar, the number of steps taken.
      mu_kernel, nu_kernel: first and second moment of the kernel, float32 [L, F].
      mu_bias, nu_bias: first and second moment of the bias, float32 [L], or None without a bias.
    """

    count: Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu_kernel: Array
    nu_kernel: Array
    mu_bias: Array | None
    nu_bias: Array | None


def adam_init(kernel: ArrayLike, bias: ArrayLike | None) -> AdamState:
    """Return the state before the first step, for kernel [L, F] and bias ([L] or None)."""
    kernel = as_array("kernel", kernel)
    bias = None if bias is None else as_array("bias", bias)
    return AdamState(
        jnp.zeros((), jnp.int32),
        *(jnp.zeros_like(kernel) for _ in range(2)),
        *(None if bias is None else jnp.zeros_like(bias) for _ in range(2)),
    )


def fan_in_adam_step(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    positives: ArrayLike,
    state: AdamState,
    learning_rate: ArrayLike,
    *,
    loss: str = "squared_hinge",
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-7,
    num_labels: int | None = None,
    sparse: SparseInputs | None = None,
    wants_d_x: bool = True,
) -> tuple[Array, Array | None, Array, Array | None, AdamState]:
    """Take one Adam step on `fan_in_loss` in one pass over the labels.

    The gradient of the kernel is never stored. The result equals that of `fan_in_loss`, `jax.grad` and
    `optax.adam(learning_rate, b1, b2, eps=epsilon)` up to rounding. Kernel, bias and moments are updated in
    place if the caller's `jit` donates them; otherwise XLA copies them first. Not differentiable: pass the
    returned gradient to the layers before this one (`jax.vjp`). Within `jax.shard_map`, each device
    takes a step on its shard of the batch.

    Args:
      x: [B, D], float32.
      kernel, indices, bias, positives, loss, num_labels, sparse: as for `fan_in_loss`; kernel and bias
        float32.
      state: from `adam_init`, or the last step.
      learning_rate: float32 scalar.
      b1, b2: decay rates of the moments, at least 0 and below 1.
      epsilon: added to the root of the second moment, at least 0; the default is that of the paper's
        framework.
      wants_d_x: whether to compute the gradient with respect to x.

    Returns:
      The loss (of the weights before the step), its gradient with respect to x [B, D], or None unless
      `wants_d_x`, and the new kernel, bias and state.

    Raises:
      TypeError, ValueError: an argument has a wrong dtype or shape; the message names it.

    Reference: Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """
    kernel = as_array("kernel", kernel)
    check_dtype("kernel", kernel, [jnp.float32])
    inputs, attributes = loss_operands(x, kernel, indices, bias, positives, loss, num_labels, sparse)
    x, _, _, _, kernel, _, bias, _ = inputs
    shapes = {"kernel": kernel.shape, "bias": bias.shape}
    count, moments = next_step(state, AdamState), []
    has_bias = state.mu_bias is not None
    for name in ("mu_kernel", "nu_kernel", "mu_bias", "nu_bias"):
        moment = getattr(state, name)
        if moment is None and name.endswith("bias"):
            moment = jnp.zeros(0, jnp.float32)
        moment = as_array(f"state.{name}", moment)
        layer_array = name.split("_")[1]
        check_dtype(f"state.{name}", moment, [jnp.float32])
        check_shape(f"state.{name}", moment, shapes[layer_array], f"that of the {layer_array}")
        moments.append(moment)
    constants = adam_attributes(b1, b2, epsilon)
    rates = adam_rates(learning_rate, count, constants["b1"], constants["b2"])
    operands = _native.match_varying_axes(*inputs, *moments, rates)
    layer_shapes = (_shape_of(a) for a in (kernel, bias, *moments))
    results = [jax.ShapeDtypeStruct((), jnp.float32), d_x_shape(x, wants_d_x), *layer_shapes]
    value, d_x, kernel, bias, mu_kernel, nu_kernel, mu_bias, nu_bias = _native.call(
        "xla_ops.fan_in_step.adam",
        results,
        *operands,
        aliases={4: 2, 6: 3, 8: 4, 9: 5, 10: 6, 11: 7},
        **attributes,
        **constants,
    )
    state = AdamState(
        count, mu_kernel, nu_kernel, mu_bias if has_bias else None, nu_bias if has_bias else None
    )
    return value, d_x if wants_d_x else None, kernel, bias if has_bias else None, state


def fan_in_sgd_step(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    positives: ArrayLike,
    learning_rate: ArrayLike,
    *,
    seed: ArrayLike = 0,
    step: ArrayLike = 0,
    loss: str = "squared_hinge",
    first_label: ArrayLike = 0,
    num_labels: int | None = None,
    sparse: SparseInputs | None = None,
    wants_d_x: bool = True,
) -> tuple[Array, Array | None, Array, Array | None]:
    """Take one step of SGD without momentum on `fan_in_loss` in one pass over the labels.

    The update is `kernel -= learning_rate * gradient`, and likewise for the bias. There are no moments, and
    the gradient of the kernel is never stored. Sums are float32; bfloat16 weights are then rounded
    stochastically, which is exact on average, so that updates far below their precision are not lost. Kernel
    and bias are updated in place if the caller's `jit` donates them. Not differentiable: pass the returned
    gradient to the layers before this one (`jax.vjp`).

    The loss is a mean over B and L: for an update that is independent of both, multiply the rate by B * L.

    Args:
      x: [B, D], float32 or bfloat16.
      kernel, indices, bias, positives, loss, num_labels, sparse: as for `fan_in_loss`.
      learning_rate: float32 scalar.
      seed: uint32 scalar, the seed of stochastic rounding. The random bits depend only on the seed, `step`
        and the position of a weight, on any machine (Philox4x32-10; the details are in `csrc/rounding.h`).
      step: uint32 or int32 scalar, the number of the step; every step must have a different number.
      first_label: integer scalar, the number of the first label if the labels are a shard of `num_labels`
        labels, so that their weights are rounded as in the whole layer.
      wants_d_x: as for `fan_in_adam_step`.

    Returns:
      The loss (of the weights before the step), its gradient with respect to x [B, D], or None unless
      `wants_d_x`, the new kernel and bias.

    Raises:
      TypeError, ValueError: an argument has a wrong dtype or shape; the message names it.

    Reference: Zhang et al., "ELMO: Efficiency via Low-precision and Peak Memory Optimization in Large Output
    Spaces", ICML 2025, for momentum-free SGD with stochastic rounding in an extreme classifier.
    """
    has_bias = bias is not None
    inputs, attributes = loss_operands(x, kernel, indices, bias, positives, loss, num_labels, sparse)
    x, _, _, _, kernel, _, bias, _ = inputs
    rate, key = as_learning_rate(learning_rate), rounding_key(seed, step, first_label=first_label)
    operands = _native.match_varying_axes(*inputs, rate, key)
    results = [
        jax.ShapeDtypeStruct((), jnp.float32),
        d_x_shape(x, wants_d_x),
        _shape_of(kernel),
        _shape_of(bias),
    ]
    value, d_x, kernel, bias = _native.call(
        "xla_ops.fan_in_step.sgd",
        results,
        *operands,
        aliases={4: 2, 6: 3},
        **attributes,
    )
    return value, d_x if wants_d_x else None, kernel, bias if has_bias else None


def _shape_of(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
