"""Training on several devices: a mesh with the axes "data" and "label", and the placement of arrays on it.

Labels are sharded over all devices, the rows of a batch over `data`; everything else is replicated. XLA
partitions the encoder; a head uses its mesh explicitly (`heads/sharded.py`).
"""

import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_xmc.data.batches import BagOfWords, Batch

AXES = ("data", "label")
_HEARTBEAT_SECONDS = 20


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connect this process to the others of a distributed run; call it before any other function of JAX.

    If a process dies or ends with an uncaught exception, the others end with an error within a minute.

    Args:
      coordinator: address:port of process 0; None if JAX finds all arguments in the environment (as under
        Slurm or on Cloud TPUs).
      num_processes: number of processes.
      process_id: number of this process, from 0.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
    )
    report = sys.excepthook

    def report_and_exit(*exception: Any) -> None:
        report(*exception)
        exit_after_error(1)

    sys.excepthook = report_and_exit


def exit_after_error(status: int) -> int:
    """Return the exit status; if this is one of several connected processes, end it at once instead.

    On a normal exit, JAX waits for the other processes for up to 5 minutes, and they wait for this one, in a
    collective operation.

    Args:
      status: the exit status.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def make_mesh(data: int = 1, label: int = 1) -> Mesh:
    """Make a mesh of the first `data * label` devices of all processes.

    Args:
      data: size of the axis "data".
      label: size of the axis "label".

    Raises:
      ValueError: there are fewer devices, or with several processes, not exactly as many.
    """
    size, num_devices = data * label, jax.device_count()
    is_partial = jax.process_count() > 1 and size != num_devices
    if min(data, label) < 1 or size > num_devices or is_partial:
        raise ValueError(
            f"a mesh of data:{data},label:{label} needs {size} devices, got {num_devices}; of a CPU, "
            f"the environment variable JAX_NUM_CPU_DEVICES={size} makes so many"
        )
    return jax.make_mesh((data, label), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """Parse the sizes of a mesh, such as "data:2,label:4", for `make_mesh`; missing axes have size 1.

    Raises:
      ValueError: the text is malformed.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        matched = re.fullmatch(r"(\w+):([1-9]\d*)", part.strip())
        if matched is None or matched[1] not in AXES or matched[1] in sizes:
            raise ValueError(f"mesh must be like data:2,label:4, got {text!r}")
        sizes[matched[1]] = int(matched[2])
    return sizes


def data_size(mesh: Mesh | None) -> int:
    """Return the size of the axis "data", over which the rows of a batch are sharded; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape.get("data", 1)


def own_rows(mesh: Mesh | None) -> Callable[[int], np.ndarray] | None:
    """Return a function from B to bool [B], true for the rows of a batch on this process's devices.

    Returns None if this process needs all rows.
    """
    if mesh is None or jax.process_count() == 1:
        return None

    def own(size: int) -> np.ndarray:
        rows = np.zeros(size, bool)
        for taken in _by_row(mesh).addressable_devices_indices_map((size,)).values():
            assert taken is not None  # None would mean a device without rows.
            rows[taken] = True
        return rows

    return own


def _by_row(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data" if data_size(mesh) > 1 else None))


def place(tree: Any, mesh: Mesh) -> Any:
    """Replicate the arrays of a pytree over a mesh, except for arrays that are on the mesh already.

    All processes must pass equal values.
    """
    return jax.tree.map(lambda array: _place(array, mesh), tree)


def _place(array: Any, mesh: Mesh) -> Any:
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return array
    if isinstance(array.sharding, NamedSharding) and array.sharding.mesh == mesh:
        return array
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _place(jax.random.key_data(array), mesh)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    return _split(array, NamedSharding(mesh, PartitionSpec()))


def _split(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def place_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """Place a batch on a mesh: rows are sharded over `data`, bags of words and positives are replicated.

    Without a mesh, the batch is returned unchanged.

    Raises:
      ValueError: the number of rows is not a multiple of the size of `data`.
    """
    if mesh is None:
        return batch
    size, parts = len(batch.positives), data_size(mesh)
    if size % parts:
        raise ValueError(f"the batch size must be a multiple of the mesh's data axis, {parts}, got {size}")
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_row = _by_row(mesh)

    def put(leaf):
        if isinstance(leaf, BagOfWords):
            return jax.tree.map(lambda array: _split(array, everywhere), leaf)
        rows = np.ndim(leaf) > 0 and np.shape(leaf)[0] == size
        return _split(leaf, by_row if rows else everywhere)

    inputs = jax.tree.map(put, batch.inputs, is_leaf=lambda node: isinstance(node, BagOfWords))
    return Batch(inputs=inputs, positives=_split(batch.positives, everywhere))
