"""Shards of the labels, and functions for heads that have some of the labels."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Tree = TypeVar("Tree")

# Logits of padding labels are far below any margin, and their squares are finite in float32.
PADDING_BIAS = -1e18


@dataclasses.dataclass(frozen=True)
class LabelShard:
    """The labels of a head: all of them, or the shard of one device within `jax.shard_map`.

    Shards are contiguous ranges of one size, in the order of the devices. Padding labels behind the last
    label fill up the last shards. They have weights 0 and the bias `PADDING_BIAS`, so that their loss and
    gradients are 0.

    Attributes:
      global_num_labels: L, the number of labels of all devices together.
      size: number of labels of the shard, with padding labels.
      axes: the mesh axes over which the labels are sharded; empty if the shard has all labels.
    """

    global_num_labels: int
    size: int
    axes: tuple[str, ...] = ()

    @classmethod
    def whole(cls, num_labels: int) -> "LabelShard":
        """Return the shard that has all labels."""
        return cls(num_labels, num_labels)

    @property
    def first(self) -> Array | int:
        """The first label of the shard."""
        return jax.lax.axis_index(self.axes) * self.size if self.axes else 0

    @property
    def num_padding(self) -> int:
        """Number of padding labels of all devices together."""
        return self.size * math.prod(map(jax.lax.axis_size, self.axes)) - self.global_num_labels

    def is_label(self) -> Array:
        """Return bool [size], false for padding labels."""
        return self.first + jnp.arange(self.size, dtype=jnp.int32) < self.global_num_labels

    def local_positives(self, positives: Array) -> Array:
        """Renumber positives for the shard; labels of other shards and invalid values are out of range."""
        if not self.axes:
            return positives
        return shift_positives(jnp.where(positives < self.global_num_labels, positives, -1), self.first)

    def sum(self, tree: Tree) -> Tree:
        """Return the sum over all shards of each array of a pytree."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree


def shift_positives(positives: Array, start: ArrayLike) -> Array:
    """Renumber positives for a head whose labels begin at `start`; labels before `start` become -1."""
    return jnp.where(positives >= start, positives - start, -1)


def merge_top_k(rankings: Sequence[tuple[Array, Array]], k: int) -> tuple[Array, Array]:
    """Merge several rankings into one of the k best labels.

    Args:
      rankings: pairs of scores float [B, n] and labels int32 [B, n]; n may differ.
      k: number of labels to return.

    Returns:
      Scores [B, k] and labels [B, k], best first. Of labels with equal scores, the lower one comes first.
    """
    scores, labels = (jnp.concatenate(arrays, axis=1) for arrays in zip(*rankings, strict=True))
    scores, labels = jax.lax.sort((-scores, labels), num_keys=2)
    return -scores[:, :k], labels[:, :k]
