"""Random connections of sparse layers, F distinct inputs for each label."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from xla_ops import index_dtype

_AT_ONCE = 1 << 17


def row_keys(key: Array, first: ArrayLike, rows: int) -> Array:
    """Return a random key for each of `rows` rows from the row `first` on.

    The key of a row depends only on `key` and the number of the row, not on `first` or the device.
    """
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
    """Draw new inputs uniformly at random for the connections marked by `mask`.

    The inputs of a label depend only on the key and the number of the label.

    Args:
      key: random key.
      indices: [L, F], integer, the current inputs.
      mask: bool [L, F], true for connections that get new inputs.
      in_features: D, the number of inputs; new inputs are in 0..D-1.
      distinct: whether to draw until no label reads an input twice (except by connections that are kept),
        which requires F <= D. If false, inputs may repeat, as in the paper's code.
      first: number of the first label, if these are a part of the labels.

    Returns:
      [L, F], the new inputs, of the dtype of `indices`.

    Raises:
      ValueError: `distinct` is true and F > D.
    """
    if distinct and indices.shape[1] > in_features:
        raise ValueError(f"{indices.shape[1]} distinct inputs do not exist among {in_features}")

    rows, fan_in = indices.shape

    def draw(keys: Array) -> Array:
        drawn = jax.vmap(lambda key: jax.random.randint(key, (fan_in,), 0, in_features, jnp.int32))(keys)
        return drawn.astype(indices.dtype)

    def conflicts(indices: Array) -> Array:
        # A kept entry to the right of a new one counts as well, so both triangles are compared.
        same = indices[:, :, None] == indices[:, None, :]
        earlier_or_kept = jnp.tril(jnp.ones(same.shape[1:], bool), k=-1)[None] | ~mask[:, None, :]
        return mask & jnp.any(same & earlier_or_kept, axis=2)

    keys = row_keys(key, first, rows)

    def draw_again(state: tuple[int, Array, Array]) -> tuple[int, Array, Array]:
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
    """Draw F of D inputs uniformly at random for each of L labels.

    Args:
      key: random key.
      labels: L, the number of labels.
      fan_in: F, the number of inputs of each label, at most D if `distinct` is true.
      in_features: D, the number of inputs.
      distinct, first: as for `redraw`.

    Returns:
      [L, F], uint16 for D <= 65,536, else int32.
    """
    return _drawing(labels, fan_in, in_features, distinct)(key, first)


@functools.lru_cache(maxsize=8)  # A jit of its own would keep the programs for all sizes.
def _drawing(labels: int, fan_in: int, in_features: int, distinct: bool) -> Callable[..., Array]:
    """Return `draw_connections` compiled for these sizes, as a function of `key` and `first`."""

    def draw_connections(key: Array, first: ArrayLike) -> Array:
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


def blank(shape: tuple[int, ...], dtype: DTypeLike, first: ArrayLike) -> Array:
    """Return zeros; within `jax.shard_map` they vary over the same mesh axes as `first`."""
    return jnp.full(shape, (0 * jnp.asarray(first)).astype(dtype))


def update_in_blocks(
    function: Callable[[Array, Array, tuple[Array, ...]], tuple[Array, ...]], arrays: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Update arrays in blocks of rows, so that temporaries stay small.

    Args:
      function: function from (first, fresh, blocks) to the new blocks: `first` is the first row of the block,
        `fresh` is bool [rows], false for rows that the previous block has already updated (the last block
        overlaps it), and `blocks` are the rows of the arrays.
      arrays: arrays with equal numbers of rows.

    Returns:
      The new arrays.
    """
    # On the CPU, XLA slices a bfloat16 array via a float32 copy of the whole array.
    dtypes = [a.dtype for a in arrays]
    arrays = tuple(_as_integers(a) for a in arrays)
    total = arrays[0].shape[0]
    rows = max(1, min(total, _AT_ONCE * total // max(1, arrays[0].size)))

    def update(i: Array, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        first = jnp.minimum(i * rows, total - rows)
        slices = [jax.lax.dynamic_slice_in_dim(a, first, rows) for a in arrays]
        blocks = tuple(jax.lax.bitcast_convert_type(s, d) for s, d in zip(slices, dtypes, strict=True))
        blocks = function(first, first + jnp.arange(rows, dtype=jnp.int32) >= i * rows, blocks)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(a, _as_integers(block), first, axis=0)
            for a, block in zip(arrays, blocks, strict=True)
        )

    if total:
        arrays = jax.lax.fori_loop(0, -(-total // rows), update, arrays)
    return tuple(jax.lax.bitcast_convert_type(a, d) for a, d in zip(arrays, dtypes, strict=True))


def _as_integers(array: Array) -> Array:
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array
