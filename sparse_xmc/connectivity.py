"""Random connections: for each output (label), F distinct inputs; or anywhere between the two."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xla_ops import index_dtype

_AT_ONCE = 1 << 17


def row_keys(key: Array, first: ArrayLike, rows: int) -> Array:
    """A random key for each of so many rows from the row `first`: its own wherever it is drawn for."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(rows, dtype=jnp.int32))


def redraw(
    key: Array,
    indices: Array,
    mask: Array,
    in_features: int,
    *,
    distinct: bool = True,
    first: ArrayLike = 0,
) -> Array:
    """Draws new inputs, uniformly, for the connections that `mask` marks.

    What a label draws depends on the key and its number alone.

    Args:
      key: a random key.
      indices: [L, F], integer.
      mask: bool [L, F].
      in_features: D; the new inputs are in 0..D-1.
      distinct: draw until no row lists an input twice (other than among the connections kept), which
        needs F <= D. If false, repeats happen, as in the paper's code.
      first: the number of the first label.

    Returns:
      [L, F], of the dtype of `indices`.

    Raises:
      ValueError: `distinct`, and F > D.
    """
    if distinct and indices.shape[1] > in_features:
        raise ValueError(f"{indices.shape[1]} distinct inputs do not exist among {in_features}")

    rows, fan_in = indices.shape

    def draw(keys):
        drawn = jax.vmap(lambda key: jax.random.randint(key, (fan_in,), 0, in_features, jnp.int32))(keys)
        return drawn.astype(indices.dtype)

    def conflicts(indices):
        # An entry kept on the right of a new one counts as well, so both triangles are looked at.
        same = indices[:, :, None] == indices[:, None, :]
        earlier_or_kept = jnp.tril(jnp.ones(same.shape[1:], bool), k=-1)[None] | ~mask[:, None, :]
        return mask & jnp.any(same & earlier_or_kept, axis=2)

    keys = row_keys(key, first, rows)

    def draw_again(state):
        attempt, indices, pending = state
        of_attempt = jax.vmap(jax.random.fold_in, (0, None))(keys, attempt)
        indices = jnp.where(pending, draw(of_attempt), indices)
        return attempt + 1, indices, conflicts(indices)

    indices = jnp.where(mask, draw(keys), indices)
    if not distinct:
        return indices
    return jax.lax.while_loop(lambda s: s[2].any(), draw_again, (0, indices, conflicts(indices)))[1]


def draw_connections(
    key: Array, labels: int, fan_in: int, in_features: int, *, distinct: bool = True, first: ArrayLike = 0
) -> Array:
    """For each of L labels, F inputs out of D, uniformly.

    Args:
      key: a random key.
      labels: L.
      fan_in: F <= D.
      in_features: D.
      distinct, first: as for `redraw`.

    Returns:
      [L, F], uint16 for D <= 65,536, else int32.
    """
    return _drawing(labels, fan_in, in_features, distinct)(key, first)


@functools.lru_cache(maxsize=8)  # jit by itself would keep the programs for all sizes
def _drawing(labels: int, fan_in: int, in_features: int, distinct: bool) -> Callable[..., Array]:
    """The compiled `draw_connections` for these sizes: a function of the key and of `first`."""

    def draw_connections(key, first):
        (indices,) = update_in_blocks(
            lambda row, fresh, arrays: (
                redraw(
                    key,
                    arrays[0],
                    jnp.ones(arrays[0].shape, bool),
                    in_features,
                    distinct=distinct,
                    first=first + row,
                ),
            ),
            (blank((labels, fan_in), index_dtype(in_features), first),),
        )
        return indices

    return jax.jit(draw_connections)


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
    label = jax.random.randint(label_key, (connections,), 0, labels, jnp.int32)
    return jnp.stack(
        [label, jax.random.randint(input_key, (connections,), 0, in_features, jnp.int32)], axis=1
    )


def blank(shape: tuple[int, ...], dtype, first: ArrayLike) -> Array:
    """Zeros, which within `jax.shard_map` vary over the devices as `first` does."""
    return jnp.full(shape, (0 * jnp.asarray(first)).astype(dtype))


def update_in_blocks(function, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Updates arrays a block of rows at a time, so that temporaries stay small.

    Args:
      function: from (first, fresh, blocks) to the new blocks: `first` is the block's first row, `fresh` is
        bool [rows], false for rows that the block before it has updated already (the last block is shifted
        back to fit), and `blocks` are the rows of the arrays.
      arrays: each with the same number of rows.

    Returns:
      The new arrays.
    """
    # On CPU, XLA slices a bfloat16 array by way of a float32 copy of all of it.
    dtypes = [a.dtype for a in arrays]
    arrays = tuple(_as_integers(a) for a in arrays)
    total = arrays[0].shape[0]
    rows = max(1, min(total, _AT_ONCE * total // max(1, arrays[0].size)))

    def update(i, arrays):
        first = jnp.minimum(i * rows, total - rows)
        blocks = tuple(jax.lax.dynamic_slice_in_dim(a, first, rows) for a in arrays)
        blocks = [jax.lax.bitcast_convert_type(b, d) for b, d in zip(blocks, dtypes, strict=True)]
        blocks = function(first, first + jnp.arange(rows, dtype=jnp.int32) >= i * rows, tuple(blocks))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(a, _as_integers(block), first, axis=0)
            for a, block in zip(arrays, blocks, strict=True)
        )

    if total:
        arrays = jax.lax.fori_loop(0, -(-total // rows), update, arrays)
    return tuple(jax.lax.bitcast_convert_type(a, d) for a, d in zip(arrays, dtypes, strict=True))


def _as_integers(array: Array) -> Array:
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array
