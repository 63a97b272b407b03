"""In-place training step of a dense layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from xla_ops import _native
from xla_ops._arguments import (
    adam_attributes,
    adam_rates,
    as_array,
    check_dtype,
    check_shape,
    next_step,
    rounding_key,
)


class DenseAdamState(NamedTuple):
    """The state of Adam for a dense kernel.

    Attributes:
      count: int32 scalar, the number of steps taken.
      mu: the first moment [D, O], float32 or bfloat16.
      nu: the second moment [D, O], of the same dtype.
    """

    count: Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu: Array
    nu: Array


def dense_adam_init(kernel: ArrayLike, dtype: DTypeLike = jnp.float32) -> DenseAdamState:
    """Return the state before the first step for a kernel [D, O], with moments in float32 or bfloat16."""
    kernel = as_array("kernel", kernel)
    return DenseAdamState(jnp.zeros((), jnp.int32), *(jnp.zeros_like(kernel, dtype) for _ in range(2)))


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
    depends_on: ArrayLike | None = None,
) -> tuple[Array, DenseAdamState]:
    """Take one Adam step for `y = x @ kernel`, without storing the gradient `x.T @ dy`.

    The result equals that of `optax.adam(learning_rate, b1, b2, eps=epsilon)` up to rounding. For moments in
    bfloat16, the first is rounded to nearest, as with Optax's `mu_dtype`. The second is rounded
    stochastically, which is exact on average, because it changes by less than its precision in a step. Kernel
    and moments are updated in place if the caller's `jit` donates them; otherwise XLA copies them first.
    Within `jax.shard_map`, each device takes a step on its shard of the batch.

    Args:
      x: [B, D], float32, the input of the layer.
      dy: [B, O], float32, the gradient with respect to its output.
      kernel: [D, O], float32.
      state: from `dense_adam_init`, or the last step.
      learning_rate: float32 scalar.
      b1, b2: decay rates of the moments, at least 0 and below 1.
      epsilon: added to the root of the second moment, at least 0.
      seed: uint32 scalar, the seed of stochastic rounding. The random bits depend only on the seed, the
        number of the step and the position of a weight, on any machine; they equal those of
        `round_stochastically`.
      depends_on: an array of any shape, computed from the old kernel, such as the gradient with respect to
        x; or None. The update is scheduled after it; XLA could otherwise copy the kernel to compute it.

    Returns:
      The new kernel and state.

    Raises:
      TypeError, ValueError: an argument has a wrong dtype or shape; the message names it.

    Reference: Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """
    x, dy, kernel = _check(x, dy, kernel)
    count = next_step(state, DenseAdamState)
    mu, nu = as_array("state.mu", state.mu), as_array("state.nu", state.nu)
    check_dtype("state.mu", mu, [jnp.float32, jnp.bfloat16])
    check_dtype("state.nu", nu, [mu.dtype])
    for name, moment in (("mu", mu), ("nu", nu)):
        check_shape(f"state.{name}", moment, kernel.shape, "that of the kernel")
    constants, key = adam_attributes(b1, b2, epsilon), rounding_key(seed, count)
    rates = adam_rates(learning_rate, count, constants["b1"], constants["b2"])
    depends_on = jnp.zeros(0, jnp.float32) if depends_on is None else as_array("depends_on", depends_on)
    operands = _native.match_varying_axes(x, kernel, dy, mu, nu, rates, key, depends_on)
    kernel, mu, nu = _native.call(
        "xla_ops.dense_step.adam",
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (kernel, mu, nu)],
        *operands,
        aliases={1: 0, 3: 1, 4: 2},
        **constants,
    )
    return kernel, DenseAdamState(count, mu, nu)


def _check(x: ArrayLike, dy: ArrayLike, kernel: ArrayLike) -> tuple[Array, Array, Array]:
    """Return the arguments as arrays; raise an error unless they are matrices that fit together."""
    x, dy, kernel = as_array("x", x), as_array("dy", dy), as_array("kernel", kernel)
    for name, array in (("x", x), ("dy", dy), ("kernel", kernel)):
        check_dtype(name, array, [jnp.float32])
        if array.ndim != 2:
            raise ValueError(f"{name} must be a matrix, got shape {list(array.shape)}")
    check_shape("dy", dy, (x.shape[0], kernel.shape[1]), "rows of x by columns of kernel")
    check_shape("kernel", kernel, (x.shape[1], dy.shape[1]), "columns of x by columns of dy")
    _native.register()
    return x, dy, kernel
