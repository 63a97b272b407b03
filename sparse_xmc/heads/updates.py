"""Adam updates of the parameters of a head: by Optax, and for a dense layer in place."""

from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

import xla_ops
from sparse_xmc.heads.head import StepInputs

# Adam's first and second moments, each a dictionary from parameter name to array.
Moments = tuple[dict[str, Array], dict[str, Array]]

_RUN = 128  # The random bits of each row of a dense kernel start at a multiple of this.


def next_state(state: optax.ScaleByAdamState, *updated: Moments) -> optax.ScaleByAdamState:
    """Return the Adam state after a step, with the updated moments and the next count."""
    mu, nu = dict(state.mu), dict(state.nu)
    for new_mu, new_nu in updated:
        mu |= new_mu
        nu |= new_nu
    return optax.ScaleByAdamState(state.count + 1, mu, nu)


def adam_directions(
    gradients: dict[str, Array], state: optax.ScaleByAdamState, epsilon: float, seed: Any
) -> tuple[dict[str, Array], Moments]:
    """Compute Adam updates with Optax, for float32 or bfloat16 moments.

    Second moments in bfloat16 are rounded stochastically, as in `dense_adam_step`.

    Args:
      gradients: float32 gradients by parameter name.
      state: the Adam state, with moments of all these parameters.
      epsilon: Adam's epsilon.
      seed: integer scalar, the seed of stochastic rounding.

    Returns:
      The directions, which are multiplied by the learning rate and subtracted from the parameters; and the
      new moments.
    """
    dtypes = {name: state.mu[name].dtype for name in gradients}

    def in_float32(moments: dict[str, Array]) -> dict[str, Array]:
        return {name: moments[name].astype(jnp.float32) for name in gradients}

    before = optax.ScaleByAdamState(state.count, in_float32(state.mu), in_float32(state.nu))
    directions, after = optax.scale_by_adam(eps=epsilon).update(gradients, before)
    mu = {name: value.astype(dtypes[name]) for name, value in after.mu.items()}
    nu = {name: _round(value, dtypes[name], seed, after.count) for name, value in after.nu.items()}
    return directions, (mu, nu)


def _round(value: Array, dtype: DTypeLike, seed: Any, count: Array) -> Array:
    if dtype != jnp.bfloat16:
        return value
    row_length = -(-value.shape[-1] // _RUN) * _RUN
    return xla_ops.round_stochastically(value, seed, count, row_length=row_length)


def step_dense(
    layer: nnx.Linear,
    name: str,
    d_y: Array,
    inputs: StepInputs,
    state: optax.ScaleByAdamState,
    *,
    lr_multiplier: float,
    epsilon: float,
) -> tuple[Array, Moments]:
    """Take one Adam step of a dense layer in place, without holding the gradient of its kernel.

    Args:
      layer: the layer to update, whose input is `inputs.x`.
      name: name of the layer in the state.
      d_y: [B, O], the gradient with respect to its output.
      inputs: the inputs of the training step of the head.
      state: the Adam state, with the moments of `name`.kernel and, if the layer has a bias, `name`.bias.
      lr_multiplier: learning-rate multiplier of the layer.
      epsilon: Adam's epsilon.

    Returns:
      The gradient with respect to the input [B, D] (undefined unless `wants_d_x`), and the new moments of the
      layer.
    """

    def step(x: Array, kernel: Array, name: str, **options: Any) -> Array:
        moments = xla_ops.DenseAdamState(state.count, state.mu[name], state.nu[name])
        if kernel.ndim == 1:
            moments = moments._replace(mu=moments.mu[None], nu=moments.nu[None])
        new, moments = xla_ops.dense_adam_step(
            x,
            d_y,
            jnp.atleast_2d(kernel),
            moments,
            lr_multiplier * inputs.learning_rate,
            epsilon=epsilon,
            seed=inputs.seed,
            **options,
        )
        mu[name], nu[name] = (m.reshape(kernel.shape) for m in moments[1:])
        return new.reshape(kernel.shape)

    mu: dict[str, Array] = {}
    nu: dict[str, Array] = {}
    kernel = layer.kernel[...]
    d_x = d_y @ kernel.T if inputs.wants_d_x else jnp.zeros(0, jnp.float32)
    layer.kernel.set_value(step(inputs.x, kernel, f"{name}.kernel", depends_on=d_x))
    if layer.bias is not None:  # A bias is updated as the kernel of an input of ones.
        ones = jnp.ones((len(inputs.x), 1), jnp.float32)
        layer.bias.set_value(step(ones, layer.bias[...], f"{name}.bias"))
    return d_x, (mu, nu)
