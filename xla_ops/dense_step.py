"""Training steps of dense layers that update the kernel where it is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xla_ops import _native
from xla_ops._arguments import adam_rates, check_dtype, check_shape, rounding_key


class DenseAdamState(NamedTuple):
    """What Adam remembers of a dense kernel.

    Attributes:
      count: int32 scalar, the number of steps taken.
      mu: the first moment [D, O], float32 or bfloat16.
      nu: the second moment [D, O], of the same dtype.
    """

    count: Array
    mu: Array
    nu: Array


class FactoredState(NamedTuple):
    """What a factored second moment remembers of a dense kernel.

    Attributes:
      count: int32 scalar, the number of steps taken.
      v_row: the means of the squared gradient over each row, float32 [D].
      v_col: those over each column, float32 [O].
    """

    count: Array
    v_row: Array
    v_col: Array


def dense_adam_init(kernel: Array, dtype=jnp.float32) -> DenseAdamState:
    """The state before the first step for a kernel [D, O], with moments in float32 or bfloat16."""
    return DenseAdamState(jnp.zeros((), jnp.int32), *(jnp.zeros_like(kernel, dtype) for _ in range(2)))


def dense_factored_init(kernel: Array) -> FactoredState:
    """The state before the first step for a kernel [D, O]."""
    return FactoredState(jnp.zeros((), jnp.int32), *(jnp.zeros(n, jnp.float32) for n in kernel.shape))


def dense_adam_step(
    x: ArrayLike,
    dy: ArrayLike,
    kernel: ArrayLike,
    state: DenseAdamState,
    learning_rate: ArrayLike,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-7,
    seed: ArrayLike = 0,
    before: ArrayLike | None = None,
) -> tuple[Array, DenseAdamState]:
    """One step of Adam for `y = x @ kernel`, whose gradient `x.T @ dy` is never held.

    Gives what `optax.adam(learning_rate, b1, b2, eps=epsilon)` gives, to within rounding. Of moments in
    bfloat16 the first is rounded to nearest, as by Optax's `mu_dtype`. The second changes by less than its
    precision in a step, so it is rounded stochastically: up or down with the probability that makes it right
    on average. Kernel and moments are updated in place if the caller's `jit` donates them.

    Args:
      x: the layer's input [B, D], float32.
      dy: the gradient of its output [B, O], float32.
      kernel: [D, O], float32.
      state: from `dense_adam_init`, or the last step.
      learning_rate: float32 scalar.
      b1, b2: the decay rates of the moments.
      epsilon: added to the root of the second moment.
      seed: uint32 scalar, of the rounding. With the number of the step and a weight's position it fixes the
        random bits, on any machine (Philox4x32-10; how exactly stands in `csrc/cpu/kernels.h` and
        `dense_step.cc`).
      before: an array that is computed from the kernel as it was, such as the gradient of x: naming it here
        puts it before the update; XLA might else copy the kernel for it.

    Returns:
      The new kernel and state.

    Raises:
      TypeError, ValueError: for an argument of the wrong dtype or shape, naming it.
    """
    x, dy, kernel = _check(x, dy, kernel)
    check_dtype("state.mu", state.mu, [jnp.float32, jnp.bfloat16])
    check_dtype("state.nu", state.nu, [state.mu.dtype])
    for name in ("mu", "nu"):
        check_shape(f"state.{name}", getattr(state, name), kernel.shape, "that of the kernel")
    count = state.count + 1
    rates = adam_rates(learning_rate, count, b1, b2)
    updated = (kernel, state.mu, state.nu)
    call = jax.ffi.ffi_call(
        "xla_ops.dense_step.adam",
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in updated],
        input_output_aliases={2: 0, 3: 1, 4: 2},
        vmap_method="sequential",
    )
    attributes = {"b1": np.float32(b1), "b2": np.float32(b2), "epsilon": np.float32(epsilon)}
    kernel, mu, nu = call(x, dy, *updated, rates, rounding_key(seed, count), _operand(before), **attributes)
    return kernel, DenseAdamState(count, mu, nu)


def dense_factored_step(
    x: ArrayLike,
    dy: ArrayLike,
    kernel: ArrayLike,
    state: FactoredState,
    learning_rate: ArrayLike,
    *,
    decay_rate: float = 0.8,
    epsilon: float = 1e-30,
    before: ArrayLike | None = None,
) -> tuple[Array, FactoredState]:
    """One step of Adafactor's kind for `y = x @ kernel`, whose gradient `x.T @ dy` is never held.

    Gives what `optax.scale_by_factored_rms(decay_rate=decay_rate, epsilon=epsilon)` times the learning rate
    gives, to within rounding. No first moment, and of the second the means of rows and columns, from which
    the scaled gradient follows as a product again.

    Args:
      x, dy, kernel, learning_rate, before: as for `dense_adam_step`.
      state: from `dense_factored_init`, or the last step.
      decay_rate: step t forgets at the rate `1 - t ** -decay_rate`.
      epsilon: added to the squared gradient.

    Returns:
      The new kernel and state.

    Raises:
      TypeError, ValueError: for an argument of the wrong dtype or shape, naming it.

    Reference: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018.
    """
    x, dy, kernel = _check(x, dy, kernel)
    for name, size, what in (("v_row", kernel.shape[0], "rows"), ("v_col", kernel.shape[1], "columns")):
        check_dtype(f"state.{name}", getattr(state, name), [jnp.float32])
        check_shape(f"state.{name}", getattr(state, name), (size,), f"one per kernel's {what}")
    count = state.count + 1
    decay = 1 - count.astype(jnp.float32) ** -decay_rate

    rows, columns = _squared_sums(x, dy)
    v_row = decay * state.v_row + (1 - decay) * (rows / kernel.shape[1] + epsilon)
    v_col = decay * state.v_col + (1 - decay) * (columns / kernel.shape[0] + epsilon)
    row_factor, col_factor = jax.lax.rsqrt(v_row / jnp.mean(v_row)), jax.lax.rsqrt(v_col)
    (kernel,) = jax.ffi.ffi_call(
        "xla_ops.dense_step.sgd",
        [jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)],
        input_output_aliases={2: 0},
        vmap_method="sequential",
    )(
        *(x * row_factor[None], dy * col_factor[None], kernel),
        jnp.asarray(learning_rate, jnp.float32),
        _operand(before),
    )
    return kernel, FactoredState(count, v_row, v_col)


def _squared_sums(x: Array, dy: Array) -> tuple[Array, Array]:
    """The sums over each row and over each column of the squares of `x.T @ dy`."""
    (batch, rows), columns = x.shape, dy.shape[1]
    if 2 * batch * (rows + columns) > rows * columns:  # a large batch, or a small kernel
        squares = jnp.square(x.T @ dy)
        return squares.sum(axis=1), squares.sum(axis=0)
    # A product's squares, summed, are quadratic forms of a Gram matrix [B, B]: the product is never made.
    row_sums = jnp.sum(((dy @ dy.T) @ x) * x, axis=0)
    column_sums = jnp.sum(((x @ x.T) @ dy) * dy, axis=0)
    return jnp.maximum(row_sums, 0), jnp.maximum(column_sums, 0)  # rounding may take them below 0


def _check(x, dy, kernel) -> tuple[Array, Array, Array]:
    x, dy, kernel = jnp.asarray(x), jnp.asarray(dy), jnp.asarray(kernel)
    for name, array in (("x", x), ("dy", dy), ("kernel", kernel)):
        check_dtype(name, array, [jnp.float32])
        if array.ndim != 2:
            raise ValueError(f"{name} must be a matrix, got shape {list(array.shape)}")
    check_shape("dy", dy, (x.shape[0], kernel.shape[1]), "rows of x by columns of kernel")
    check_shape("kernel", kernel, (x.shape[1], dy.shape[1]), "columns of x by columns of dy")
    _native.register()
    return x, dy, kernel


def _operand(before: ArrayLike | None) -> Array:
    return jnp.zeros(0) if before is None else jnp.asarray(before)
