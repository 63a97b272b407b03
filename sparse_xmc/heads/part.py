"""Tools for heads of a part of the labels: shards, shifted positives, merged rankings."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class LabelPart:
    """The shard of the labels of one device, within `jax.shard_map`.

    Shards are contiguous ranges of one size, in the order of the devices. Padding labels behind the last
    label fill up the last shards. They have weights 0 and the bias `PADDING_BIAS`, so that their loss and
    gradients are 0.

    Attributes:
      num_labels: L, the number of labels of all devices together.
      axes: the mesh axes over which the labels are sharded.
    """

    num_labels: int
    axes: tuple[str, ...]

    def first(self, size: int) -> Array:
        """Return the first label of this device's shard; `size` is the size of a shard."""
        return jax.lax.axis_index(self.axes) * size

    def padding(self, size: int) -> int:
        """Return the number of padding labels of all devices; `size` is the size of a shard."""
        return size * math.prod(jax.lax.axis_size(axis) for axis in self.axes) - self.num_labels

    def sum(self, tree: Tree) -> Tree:
        """Return the sum over all devices of each array of a pytree."""
        return jax.lax.psum(tree, self.axes)


# Logits of padding labels are far below any margin, and their squares are finite in float32.
PADDING_BIAS = -1e18

# Names of the variables of a fixed fan-in head that have a row for each label.
BY_LABEL = ("output.kernel", "output.indices", "output.bias")


def shift(positives: Array, start: ArrayLike) -> Array:
    """Renumber positives for a head whose labels begin at `start`; labels before `start` become -1."""
    return jnp.where(positives >= start, positives - start, -1)


def merge_top_k(best: Sequence[tuple[Array, Array]], k: int) -> tuple[Array, Array]:
    """Merge several rankings into one of the k best labels.

    Args:
      best: rankings, each a pair of scores float [B, n] and labels int32 [B, n]; n may differ.
      k: number of labels to return.

    Returns:
      Scores [B, k] and labels [B, k], best first. Of labels with equal scores, the lower one comes first.
    """
    scores, labels = (jnp.concatenate(parts, axis=1) for parts in zip(*best, strict=True))
    scores, labels = jax.lax.sort((-scores, labels), num_keys=2)
    return -scores[:, :k], labels[:, :k]
