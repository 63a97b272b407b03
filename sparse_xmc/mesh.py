"""Many devices: a mesh with the axes "data" and "label", and what is where on it.

Labels are split over all devices, the rows of a batch over `data`; everything else is on all of them, alike.
What the encoder does is partitioned by XLA; a head knows its mesh itself (`heads/sharded.py`).
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_xmc.data.batches import BagOfWords, Batch

AXES = ("data", "label")


def make_mesh(data: int = 1, label: int = 1) -> Mesh:
    """A mesh of the first `data * label` devices, of all processes.

    Raises:
      ValueError: there are fewer devices, or, with several processes, more.
    """
    size, there = data * label, jax.device_count()
    if min(data, label) < 1 or size > there or (jax.process_count() > 1 and size != there):
        raise ValueError(f"a mesh of data:{data},label:{label} needs {size} devices, got {there}")
    return jax.make_mesh((data, label), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes in "data:2,label:4", for `make_mesh`; an axis that is left out has the size 1.

    Raises:
      ValueError: it is not of that form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        matched = re.fullmatch(r"(\w+):([1-9]\d*)", part.strip())
        if matched is None or matched[1] not in AXES or matched[1] in sizes:
            raise ValueError(f"mesh must be like data:2,label:4, got {text!r}")
        sizes[matched[1]] = int(matched[2])
    return sizes


def data_size(mesh: Mesh | None) -> int:
    """Over how many groups of devices the rows of a batch are split."""
    return 1 if mesh is None else mesh.shape.get("data", 1)


def place(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays on all devices of a mesh, but for those that are on it already.

    Every process gives the same values.
    """
    return jax.tree.map(lambda array: _place(array, mesh), tree)


def _place(array: Any, mesh: Mesh) -> Any:
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return array
    if isinstance(array.sharding, NamedSharding) and array.sharding.mesh == mesh:
        return array
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(array), mesh))
    return _split(array, NamedSharding(mesh, PartitionSpec()))


def _split(array: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A batch with its rows split over `data`; bags of words and positives are on all devices.

    Raises:
      ValueError: the number of rows is no multiple of the size of that axis.
    """
    size, parts = len(batch.positives), data_size(mesh)
    if size % parts:
        raise ValueError(f"the batch size must be a multiple of the mesh's data axis, {parts}, got {size}")
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec("data" if parts > 1 else None))

    def put(leaf):
        if isinstance(leaf, BagOfWords):
            return jax.tree.map(lambda array: _split(array, everywhere), leaf)
        rows = np.ndim(leaf) > 0 and np.shape(leaf)[0] == size
        return _split(leaf, by_row if rows else everywhere)

    inputs = jax.tree.map(put, batch.inputs, is_leaf=lambda node: isinstance(node, BagOfWords))
    return Batch(inputs=inputs, positives=_split(batch.positives, everywhere))
