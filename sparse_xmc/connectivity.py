"""Random connections: for each output (label), F distinct inputs; or anywhere between the two."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from xla_ops import index_dtype

_ROWS_AT_ONCE = 4096


def redraw(key: Array, indices: Array, mask: Array, in_features: int, *, distinct: bool = True) -> Array:
    """Draws new inputs, uniformly, for the connections that `mask` marks.

    Args:
      key: a random key.
      indices: [L, F], integer.
      mask: bool [L, F].
      in_features: D; the new inputs are in 0..D-1.
      distinct: draw until no row lists an input twice (other than among the connections kept), which
        needs F <= D. If false, repeats happen, as in the paper's code.

    Returns:
      [L, F], of the dtype of `indices`.

    Raises:
      ValueError: `distinct`, and F > D.
    """
    if distinct and indices.shape[1] > in_features:
        raise ValueError(f"{indices.shape[1]} distinct inputs do not exist among {in_features}")

    def draw(key):
        return jax.random.randint(key, indices.shape, 0, in_features).astype(indices.dtype)

    def conflicts(indices):
        # An entry kept on the right of a new one counts as well, so both triangles are looked at.
        same = indices[:, :, None] == indices[:, None, :]
        earlier_or_kept = jnp.tril(jnp.ones(same.shape[1:], bool), k=-1)[None] | ~mask[:, None, :]
        return mask & jnp.any(same & earlier_or_kept, axis=2)

    def draw_again(state):
        key, indices, pending = state
        key, subkey = jax.random.split(key)
        indices = jnp.where(pending, draw(subkey), indices)
        return key, indices, conflicts(indices)

    key, subkey = jax.random.split(key)
    indices = jnp.where(mask, draw(subkey), indices)
    if not distinct:
        return indices
    return jax.lax.while_loop(lambda s: s[2].any(), draw_again, (key, indices, conflicts(indices)))[1]


@functools.partial(jax.jit, static_argnums=(1, 2, 3), static_argnames="distinct")
def draw_connections(
    key: Array, labels: int, fan_in: int, in_features: int, *, distinct: bool = True
) -> Array:
    """For each of L labels, F inputs out of D, uniformly.

    Args:
      key: a random key.
      labels: L.
      fan_in: F <= D.
      in_features: D.
      distinct: as for `redraw`.

    Returns:
      [L, F], uint16 for D <= 65,536, else int32.
    """
    dtype = index_dtype(in_features)

    def block(key):
        shape = (min(labels, _ROWS_AT_ONCE), fan_in)
        return redraw(key, jnp.zeros(shape, dtype), jnp.ones(shape, bool), in_features, distinct=distinct)

    blocks = -(-labels // _ROWS_AT_ONCE)
    return jax.lax.map(block, jax.random.split(key, blocks)).reshape(-1, fan_in)[:labels]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw_coordinates(key: Array, connections: int, labels: int, in_features: int) -> Array:
    """Draws connections uniformly from all pairs of a label and an input; a pair may come twice.

    Args:
      key: a random key.
      connections: N.
      labels: L.
      in_features: D.

    Returns:
      int32 [N, 2]: the label and the input of each connection.
    """
    label_key, input_key = jax.random.split(key)
    label = jax.random.randint(label_key, (connections,), 0, labels)
    return jnp.stack([label, jax.random.randint(input_key, (connections,), 0, in_features)], axis=1)
