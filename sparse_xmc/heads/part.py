"""A part of the labels: what a head knows of the others where each device of a mesh has some."""

import dataclasses
import math
from typing import TypeVar

import jax
from jax import Array

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
