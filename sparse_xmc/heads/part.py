"""Parts of the labels, each with its head, or on its device: positives shifted, the best merged."""

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
    """The labels of one device, within `jax.shard_map`: runs of one size, in the order of the devices.

    Labels beyond the last fill up the last runs: they have weights of 0 and the bias `PADDING_BIAS`, so that
    they have neither a loss nor a gradient.

    Attributes:
      num_labels: L, of all devices together.
      axes: the mesh axes that labels are split over.
    """

    num_labels: int
    axes: tuple[str, ...]

    def first(self, size: int) -> Array:
        """The number of the first label of a device that has so many."""
        return jax.lax.axis_index(self.axes) * size

    def padding(self, size: int) -> int:
        """How many labels are filled up, where each device has so many."""
        return size * math.prod(jax.lax.axis_size(axis) for axis in self.axes) - self.num_labels

    def sum(self, tree: Tree) -> Tree:
        """The sum over the devices of each array."""
        return jax.lax.psum(tree, self.axes)


# Its logits are far below any margin, and its square is no infinity.
PADDING_BIAS = -1e18

# The variables of a fixed fan-in head that have a row for each label, by their names in it.
BY_LABEL = ("output.kernel", "output.indices", "output.bias")


def shift(positives: Array, start: ArrayLike) -> Array:
    """Positives as a head sees them whose labels begin at `start`: what is before becomes padding."""
    return jnp.where(positives >= start, positives - start, -1)


def merge_top_k(best: Sequence[tuple[Array, Array]], k: int) -> tuple[Array, Array]:
    """The k best of several (scores [B, n], labels [B, n]); of equal scores the lower label comes first."""
    scores, labels = (jnp.concatenate(parts, axis=1) for parts in zip(*best, strict=True))
    scores, labels = jax.lax.sort((-scores, labels), num_keys=2)
    return -scores[:, :k], labels[:, :k]
