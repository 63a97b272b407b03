"""Adam updates of the parameters of a head: by Optax, and for a dense layer in place."""

from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

import xla_ops
from sparse_xmc.heads.head import StepInputs

# The first and the second moments of some parameters, each a dictionary from parameter name to array. All
# moments of a head and the number of its steps are an `optax.ScaleByAdamState`, called `moments`.
MuNu = tuple[dict[str, Array], dict[str, Array]]

_RUN = 128  # The random bits of each row of a dense kernel start at a multiple of this.


def next_moments(moments: optax.ScaleByAdamState, *updated: MuNu) -> optax.ScaleByAdamState:
    """Return the moments after a step, with the updated ones in place of the old ones, and the next count."""
    mu, nu = dict(moments.mu), dict(moments.nu)
    for new_mu, new_nu in updated:
        mu |= new_mu
        nu |= new_nu
    return optax.ScaleByAdamState(moments.count + 1, mu, nu)


def adam_directions(
    gradients: dict[str, Array], moments: optax.ScaleByAdamState, epsilon: float, seed: Any
) -> tuple[dict[str, Array], MuNu]:
    """Compute Adam updates with Optax, for float32 or bfloat16 moments.

    Second moments in bfloat16 are rounded stochastically, as in `dense_adam_step`.

    Args:
      gradients: float32 gradients by parameter name.
      moments: the moments of a head, with those of these parameters.
      epsilon: Adam's epsilon.
      seed: integer scalar, the seed of stochastic rounding.

    Returns:
      The directions, which are multiplied by the learning rate and subtracted from the parameters; and the
      new moments of these parameters.
    """
    dtypes = {name: moments.mu[name].dtype for name in gradients}

    def in_float32(mu_or_nu: dict[str, Array]) -> dict[str, Array]:
        return {name: mu_or_nu[name].astype(jnp.float32) for name in gradients}

    before = optax.ScaleByAdamState(moments.count, in_float32(moments.mu), in_float32(moments.nu))
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
    moments: optax.ScaleByAdamState,
    *,
    lr_multiplier: float,
    epsilon: float,
) -> tuple[Array, MuNu]:
    """Take one Adam step of a dense layer in place, without holding the gradient of its kernel.

    Args:
      layer: the layer to update, whose input is `inputs.x`.
      name: name of the layer in the head.
      d_y: [B, O], the gradient with respect to its output.
      inputs: the inputs of the training step of the head.
      moments: the moments of the head, with those of `name`.kernel and, if the layer has a bias, `name`.bias.
      lr_multiplier: learning-rate multiplier of the layer.
      epsilon: Adam's epsilon.

    Returns:
      The gradient with respect to the input [B, D] (undefined unless `wants_d_x`), and the new moments of the
      layer.
    """

    def step(x: Array, kernel: Array, name: str, **options: Any) -> Array:
        adam = xla_ops.DenseAdamState(moments.count, moments.mu[name], moments.nu[name])
        if kernel.ndim == 1:
            adam = adam._replace(mu=adam.mu[None], nu=adam.nu[None])
        new, adam = xla_ops.dense_adam_step(
            x,
            d_y,
            jnp.atleast_2d(kernel),
            adam,
            lr_multiplier * inputs.learning_rate,
            epsilon=epsilon,
            seed=inputs.seed,
            **options,
        )
        mu[name], nu[name] = (m.reshape(kernel.shape) for m in adam[1:])
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
