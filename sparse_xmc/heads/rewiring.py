"""Rules of rewiring: the weakest connections of a sparse layer move to random inputs or to active ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sparse_xmc.connectivity import redraw, update_in_blocks
from sparse_xmc.heads.label_shard import LabelShard
from sparse_xmc.settings import check, setting
from xla_ops import SparseInputs, kth_smallest_magnitude


@dataclasses.dataclass(frozen=True)
class RewireConfig:
    """Configuration of rewiring.

    The defaults are those of this library; `PAPER` has the published settings.

    Attributes:
      fraction: fraction of the connections that a rewiring moves: of the whole layer, or with `active` growth
        of each label in the batch; 0 for no rewiring.
      distinct: whether the inputs of a label stay distinct.
      zero_weights: whether a moved connection starts at weight 0; if false it keeps its weight.
      growth: where connections move: to "random" inputs (`rewire`), or to inputs that are "active" in a point
        of the label (`rewire_active`).
    """

    fraction: float = setting(0.1, at_least=0, at_most=1)
    distinct: bool = True
    zero_weights: bool = True
    growth: str = setting("random", choices=("random", "active"))

    def __post_init__(self) -> None:
        check(self)
        if self.growth == "active" and not (self.distinct and self.zero_weights):
            raise ValueError(
                "growth='active' needs distinct=True and zero_weights=True, got "
                f"distinct={self.distinct} and zero_weights={self.zero_weights}"
            )


PAPER = RewireConfig(fraction=0.1, distinct=False, zero_weights=False)


@functools.partial(jax.jit, static_argnames=("in_features", "config", "shard"), donate_argnums=(1, 2, 5))
def rewire(
    key: Array,
    kernel: Array,
    indices: Array,
    in_features: int,
    config: RewireConfig = RewireConfig(),
    moments: tuple[Array, ...] = (),
    shard: LabelShard | None = None,
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """Move the connections with the smallest weights to new inputs drawn uniformly at random.

    The threshold is the k-th smallest magnitude of the whole layer, k = round(fraction * L * F); the
    connections strictly below it move. With distinct magnitudes k - 1 move. Ties at the threshold stay; so if
    at least k weights are 0, the threshold is 0 and none moves.

    `kernel`, `indices` and `moments` are donated. The only new array of the layer's size is the mask of moved
    connections, one byte each, as inputs are drawn for blocks of labels.

    Args:
      key: random key.
      kernel: [L, F], float.
      indices: [L, F], integer.
      in_features: D, the number of inputs.
      config: which connections move, and their initial weights.
      moments: arrays [L, F] of an optimizer, in which the entries of moved connections are set to 0. For the
        state of an Optax chain, see `reset_moments`.
      shard: the labels of the arrays, if they are the shard of one device; the whole layer is rewired.

    Returns:
      The new kernel [L, F], the new indices [L, F], bool [L, F], true where a connection moved, and the
      new moments.

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 4; Mocanu et al., Nature Communications 9, 2018.
    """
    shard = LabelShard.whole(kernel.shape[0]) if shard is None else shard
    fan_in = kernel.shape[1]
    k = round(config.fraction * shard.global_num_labels * fan_in)
    if k == 0:
        return kernel, indices, jnp.zeros(kernel.shape, bool), moments
    # The weights of padding labels are 0, and therefore among the smallest.
    threshold = kth_smallest_magnitude(kernel, k + shard.num_padding * fan_in, axes=shard.axes)
    moved = jnp.abs(kernel.astype(jnp.float32)) < threshold
    if shard.num_padding:
        moved &= shard.is_label()[:, None]

    def move(
        moved: Array, kernel: Array, indices: Array, moments: tuple[Array, ...]
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        def block(row: Array, fresh: Array, blocks: tuple[Array, ...]) -> tuple[Array, ...]:
            mask = jax.lax.dynamic_slice_in_dim(moved, row, fresh.size) & fresh[:, None]

            def draw(indices: Array) -> Array:
                first = shard.first + row
                return redraw(key, indices, mask, in_features, distinct=config.distinct, first=first)

            return (jax.lax.cond(mask.any(), draw, lambda indices: indices, *blocks),)

        (indices,) = update_in_blocks(block, (indices,))
        if config.zero_weights:
            kernel = jnp.where(moved, 0, kernel).astype(kernel.dtype)
        return kernel, indices, tuple(jnp.where(moved, 0, m).astype(m.dtype) for m in moments)

    # The branches save work. They also make XLA finish reading the arrays before it writes to any of them;
    # otherwise it would copy them.
    kernel, indices, moments = jax.lax.cond(
        threshold > 0, move, lambda moved, *arrays: arrays, moved, kernel, indices, moments
    )
    return kernel, indices, moved, moments


@functools.partial(jax.jit, static_argnames="config", donate_argnums=(0, 1, 5))
def rewire_active(
    kernel: Array,
    indices: Array,
    x: Array,
    positives: Array,
    config: RewireConfig,
    moments: tuple[Array, ...] = (),
    sparse: SparseInputs | None = None,
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """Move the weakest connections of the labels of a batch to inputs that are active in their points.

    For each label in `positives`, round(fraction * F) connections with the smallest weights move, but at
    least one. Take the first point of the batch that has the label. The new inputs are those that the label
    does not read yet and whose value in this point exceeds the batch mean by most; if fewer inputs exceed it,
    fewer connections move. They start at weight 0. Other labels do not change.

    The reason: the gradient of the loss of a positive with respect to a weight is proportional to the input,
    and an input that all points have in common carries no information about the label.

    `kernel`, `indices` and `moments` are donated; only the rows of the labels in the batch are read and
    written.

    Args:
      kernel: [L, F], float.
      indices: [L, F], integer, in 0..D-1.
      x: [B, D], float, the input of the layer, without dropout.
      positives: int32 [B, P], the labels of each point, padded with -1.
      config: only `fraction` is used.
      moments: as for `rewire`.
      sparse: further inputs, numbered D to D + V - 1, each at most once for a point; or None.

    Returns:
      The new kernel [L, F], the new indices [L, F], bool [L, F], true where a connection moved, and the
      new moments.

    Reference: Evci et al., ICML 2020, for growth by the gradient; here only positives contribute to it.
    """
    num_labels, fan_in = kernel.shape
    k = min(fan_in, max(1, round(config.fraction * fan_in)))
    x = x.astype(jnp.float32)
    # A label already reads at most F of a point's best inputs, so F + k candidates suffice.
    excess, candidates = jax.lax.top_k(x - x.mean(axis=0, keepdims=True), min(x.shape[1], fan_in + k))
    if sparse is not None:
        sparse_excess, columns = _best_sparse_inputs(sparse, x.shape[0], fan_in + k)
        excess = jnp.concatenate([excess, sparse_excess], axis=1)
        candidates = jnp.concatenate([candidates, x.shape[1] + columns], axis=1)
        excess, order = jax.lax.top_k(excess, min(excess.shape[1], fan_in + k))
        candidates = jnp.take_along_axis(candidates, order, axis=1)
    pairs = jnp.where((positives >= 0) & (positives < num_labels), positives, num_labels).reshape(-1)
    labels, first = jnp.unique(pairs, return_index=True, size=pairs.size, fill_value=num_labels)
    point = first // positives.shape[1]

    def rows(array: Array) -> Array:
        return array.at[labels].get(mode="clip")

    candidates, connected = candidates[point].astype(indices.dtype), rows(indices)
    fresh = (excess[point] > 0) & ~(candidates[:, :, None] == connected[:, None, :]).any(axis=2)
    order = jnp.argsort(~fresh, axis=1, stable=True)[:, :k]
    _, weakest = jax.lax.top_k(-jnp.abs(rows(kernel).astype(jnp.float32)), order.shape[1])
    # Padding, and connections without a new input to move to, get an index out of range, which is dropped.
    moving = jnp.where(jnp.take_along_axis(fresh, order, axis=1), labels[:, None], num_labels)

    def put(array: Array, values: ArrayLike) -> Array:
        return array.at[moving, weakest].set(values, mode="drop")

    moved = put(jnp.zeros(kernel.shape, bool), True)

    def clear(array: Array) -> Array:
        # On the CPU, XLA scatters into a bfloat16 array via a float32 copy of the whole array.
        return jnp.where(moved, 0, array).astype(array.dtype) if array.itemsize == 2 else put(array, 0)

    indices = put(indices, jnp.take_along_axis(candidates, order, axis=1))
    return clear(kernel), indices, moved, tuple(clear(m) for m in moments)


def _best_sparse_inputs(sparse: SparseInputs, batch: int, count: int) -> tuple[Array, Array]:
    """Find the sparse inputs of each point that exceed their means over the batch by most.

    Args:
      sparse: the sparse inputs of the batch.
      batch: B, the number of points.
      count: number of inputs to find for each point.

    Returns:
      The differences from the means, float32 [B, count], -inf where a point has no more inputs; and the
      columns of the inputs, [B, count].
    """
    rows, columns = jnp.asarray(sparse.rows), jnp.asarray(sparse.columns)
    values = jnp.asarray(sparse.values).astype(jnp.float32)
    inside = (rows >= 0) & (rows < batch)
    means = jnp.zeros(sparse.num_columns, jnp.float32).at[columns].add(jnp.where(inside, values, 0)) / batch
    excess = values - means[columns]
    rows, negative, columns = jax.lax.sort((jnp.where(inside, rows, batch), -excess, columns), num_keys=2)
    points = jnp.arange(batch, dtype=jnp.int32)
    starts = jnp.searchsorted(rows, points)
    at = starts[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    own = rows.at[at].get(mode="fill", fill_value=batch) == points[:, None]
    return jnp.where(own, -negative.at[at].get(mode="clip"), -jnp.inf), columns.at[at].get(mode="clip")
