"""How parameters of a head are updated: by Optax, and a dense layer in place."""

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import xla_ops
from sparse_xmc.heads.head import StepInputs

# What Adam remembers of some parameters, first and second moments by the parameters' names.
Moments = tuple[dict[str, Array], dict[str, Array]]

_RUN = 128  # a row of a dense kernel has its random bits at the next multiple of this


def next_state(state: optax.ScaleByAdamState, *updated: Moments) -> optax.ScaleByAdamState:
    """The state after a step that has updated these moments."""
    mu, nu = dict(state.mu), dict(state.nu)
    for new_mu, new_nu in updated:
        mu |= new_mu
        nu |= new_nu
    return optax.ScaleByAdamState(state.count + 1, mu, nu)


def adam_directions(
    gradients: dict[str, Array], state: optax.ScaleByAdamState, epsilon: float, seed
) -> tuple[dict[str, Array], Moments]:
    """Optax's Adam, with moments of either dtype; what is bfloat16 is rounded as `dense_adam_step` does it.

    Args:
      gradients: by name, float32.
      state: has moments for all of these names.
      epsilon: Adam's.
      seed: integer scalar, of the rounding.

    Returns:
      What to subtract from the parameters, times the learning rate; and the new moments.
    """
    dtypes = {name: state.mu[name].dtype for name in gradients}

    def wide(moments):
        return {name: moments[name].astype(jnp.float32) for name in gradients}

    before = optax.ScaleByAdamState(state.count, wide(state.mu), wide(state.nu))
    directions, after = optax.scale_by_adam(eps=epsilon).update(gradients, before)
    mu = {name: value.astype(dtypes[name]) for name, value in after.mu.items()}
    nu = {name: _round(value, dtypes[name], seed, after.count) for name, value in after.nu.items()}
    return directions, (mu, nu)


def _round(value: Array, dtype, seed, count: Array) -> Array:
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
    rate: float,
    epsilon: float,
) -> tuple[Array, Moments]:
    """One step of Adam of a dense layer, in place: the gradient of its kernel is never held.

    Args:
      layer: updated; its input is `inputs.x`.
      name: its name in the state.
      d_y: the gradient of its output [B, O].
      inputs: of the head's step.
      state: has the moments of `name`.kernel and, where there is one, `name`.bias.
      rate: the layer learns at this times the learning rate.
      epsilon: Adam's.

    Returns:
      The gradient of the input [B, D] (anything unless `wants_d_x`), and the layer's new moments.
    """

    def step(x, kernel, name, **options):
        moments = xla_ops.DenseAdamState(state.count, state.mu[name], state.nu[name])
        if kernel.ndim == 1:
            moments = moments._replace(mu=moments.mu[None], nu=moments.nu[None])
        new, moments = xla_ops.dense_adam_step(
            x,
            d_y,
            jnp.atleast_2d(kernel),
            moments,
            rate * inputs.learning_rate,
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
    layer.kernel.set_value(step(inputs.x, kernel, f"{name}.kernel", before=d_x))
    if layer.bias is not None:  # a bias is the kernel of an input of ones
        ones = jnp.ones((len(inputs.x), 1), jnp.float32)
        layer.bias.set_value(step(ones, layer.bias[...], f"{name}.bias"))
    return d_x, (mu, nu)
