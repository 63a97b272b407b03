"""Planning of the memory of training, before anything is allocated."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import psutil
import scipy.sparse
from flax import nnx
from jax.sharding import Mesh

import xla_ops
from sparse_xmc.data.batches import Batches
from sparse_xmc.data.dataset import Dataset
from sparse_xmc.encoders.table import TableParam
from sparse_xmc.evaluation import trace_top_k
from sparse_xmc.heads import FixedFanInConfig
from sparse_xmc.memory_limits import memory_left
from sparse_xmc.model import ClassifierConfig
from sparse_xmc.train import Trainer, TrainingConfig

# Measured memory of a process in addition to its arrays: compiled programs, initialization of the weights,
# and overhead of the allocator. It is 40 to 60 MiB for training steps, and 90 MiB for `fit` and `evaluate`.
RUNTIME_BYTES = 80 * 2**20
_LEAST_BATCH_SIZE = 32  # the smallest that is proposed


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The planned memory of training on each device.

    Attributes:
      parts: the number of bytes of each part, by its name; all parts are in memory at the same time.
      available: bytes available on the device or machine; if several devices share the memory of one machine,
        an equal share of it.
      device: description of the device or machine.
    """

    parts: dict[str, int]
    available: int
    device: str

    @property
    def bytes(self) -> int:
        """Planned peak of the memory, the sum of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the planned memory is available."""
        return self.bytes <= self.available

    def __str__(self) -> str:
        rows = [
            *self.parts.items(),
            ("planned peak", self.bytes),
            (f"available on {self.device}", self.available),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}} {size / 2**20:10,.1f} MiB" for name, size in rows)


def plan_memory(
    config: ClassifierConfig, training: TrainingConfig, train: Dataset, *, mesh: Mesh | None = None
) -> MemoryPlan:
    """Plan the memory of training a classifier, without allocating memory of that size.

    The size of the training state follows from shapes. The temporaries are the largest of a training step, a
    rewiring, and the ranking of a batch: XLA plans them when it compiles these programs for the current
    device, and the scratch memory of the ops is added. The plan does not include the data sets, nor the
    temporary memory of choosing connections and of saving.

    Args:
      config: configuration of the classifier.
      training: the training configuration.
      train: the training points, or some of them; the size of one batch is used.
      mesh: mesh over whose devices the labels are sharded. The plan is for one device with its shard of the
        labels and all rows of a batch, which is an upper bound if batches are sharded too.
    """
    config = dataclasses.replace(
        config, num_labels=-(-config.num_labels // (1 if mesh is None else mesh.size))
    )
    trainer = abstract_trainer(config, training)
    _, batch = next(Batches(train, training.batch_size).in_order())
    programs = [*trainer.trace(batch).values(), trace_top_k(trainer.model, batch.inputs)]
    parts = state_parts(trainer)
    parts |= {"batch": bytes_of(batch), "temporaries": max(_temporaries(program) for program in programs)}
    if jax.default_backend() == "cpu":
        parts["compiled programs"] = RUNTIME_BYTES
    return MemoryPlan(parts, *_available(mesh))


def check_memory(
    config: ClassifierConfig, training: TrainingConfig, train: Dataset, *, mesh: Mesh | None = None
) -> MemoryPlan:
    """Return the plan of `plan_memory` if the memory is available; arguments are the same.

    Raises:
      MemoryError: the memory is not available; the message contains the plan, and settings that fit.
    """
    plan = plan_memory(config, training, train, mesh=mesh)
    if plan.fits:
        return plan
    message = f"training takes more memory than there is:\n{plan}"
    for smaller in _smaller(config, training):
        other = plan_memory(*smaller, train, mesh=mesh)
        if other.bytes <= plan.available:
            settings = ", ".join(_changes((config, training), smaller))
            raise MemoryError(f"{message}\nIt would take {other.bytes / 2**20:,.0f} MiB with {settings}.")
    raise MemoryError(f"{message}\nNo smaller settings that this program knows would fit.")


def placeholder_dataset(
    num_labels: int, labels_per_point: float, num_features: int, batch_size: int
) -> Dataset:
    """Return as many points as a batch, with dense features of zeros, for plans without data.

    Args:
      num_labels: L, the number of labels.
      labels_per_point: mean number of labels of a point, which is rounded up.
      num_features: D, the number of features.
      batch_size: B, the number of points.
    """
    count = min(num_labels, math.ceil(labels_per_point))
    labels = np.tile(np.arange(count), batch_size)
    pointers = np.arange(0, batch_size * count + 1, count)
    values = np.ones(batch_size * count, bool)
    positives = scipy.sparse.csr_array((values, labels, pointers), shape=(batch_size, num_labels))
    return Dataset(np.zeros((batch_size, num_features), np.float32), positives)


def abstract_trainer(config: ClassifierConfig, training: TrainingConfig) -> Trainer:
    """Make a trainer whose state consists of shapes. It cannot take steps; its programs can be traced."""
    return Trainer(nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0))), training)


def state_parts(trainer: Trainer) -> dict[str, int]:
    """Return the number of bytes of each part of a training state, of arrays or of shapes."""
    parts = dict.fromkeys(("encoder", "encoder's moments", "embedding tables", "head", "head's moments"), 0)
    for state in (trainer.state["params"], trainer.state["other"]):
        for path, variable in nnx.to_flat_state(state):
            of_encoder = "embedding tables" if isinstance(variable, TableParam) else "encoder"
            parts["head" if path[0] == "head" else of_encoder] += bytes_of(variable)
    parts["encoder's moments"] = bytes_of(trainer.state["optimizer"])
    parts["embedding tables"] += bytes_of(trainer.state["squares"])
    parts["head's moments"] = bytes_of(trainer.state["moments"])
    return parts


def _temporaries(traced: jax.stages.Traced) -> int:
    """Return the number of bytes that a program needs in addition to its arguments."""
    compiled = traced.lower().compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"XLA does not say what memory a program takes on {jax.default_backend()}")
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + results + xla_ops.scratch_bytes(compiled.as_text() or "")


def _available(mesh: Mesh | None) -> tuple[int, str]:
    """Return the number of bytes available on a device, and a description of the device."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            raise RuntimeError(f"{device} does not say how much memory it has")
        return stats["bytes_limit"] - stats["bytes_in_use"], device.device_kind
    free = psutil.virtual_memory().available
    if (left := memory_left()) is not None:  # A container or a job may have less memory.
        free = min(free, left)
    share = 1 if mesh is None else len(mesh.local_devices)
    return free // share, "this machine" if share == 1 else f"this machine for each of {share} devices"


def _smaller(
    config: ClassifierConfig, training: TrainingConfig
) -> Iterator[tuple[ClassifierConfig, TrainingConfig]]:
    """Yield settings with decreasing memory, in the order of increasing loss of accuracy."""
    in_bfloat16 = config.head.in_bfloat16()
    if in_bfloat16 is None:
        config = dataclasses.replace(config, head=FixedFanInConfig())
        in_bfloat16 = FixedFanInConfig().in_bfloat16()
        yield config, training
    training = dataclasses.replace(training, moment_dtype="bfloat16")
    yield config, training
    config = dataclasses.replace(config, head=in_bfloat16)
    training = dataclasses.replace(training, output_optimizer="sgd")
    yield config, training
    while training.batch_size >= 2 * _LEAST_BATCH_SIZE:
        training = dataclasses.replace(training, batch_size=training.batch_size // 2)
        yield config, training
    for head in config.head.smaller():
        yield dataclasses.replace(config, head=head), training


def _changes(
    before: tuple[ClassifierConfig, TrainingConfig], after: tuple[ClassifierConfig, TrainingConfig]
) -> Iterator[str]:
    """Yield "name=value" for each setting that differs, as for the flags of `sparse-xmc run`."""
    (old_config, old_training), (config, training) = before, after
    if type(old_config.head) is not type(config.head):
        yield f"head={config.head_kind}"
        old_config = dataclasses.replace(old_config, head=type(config.head)())
    yield from _differences(old_config, config)
    yield from _differences(old_training, training)


def _differences(before: Any, after: Any) -> Iterator[str]:
    """Yield "name=value" for each field that differs between two dataclasses, including nested ones."""
    for field in dataclasses.fields(after):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if dataclasses.is_dataclass(new):
            yield from _differences(old, new)
        elif old != new:
            yield f"{field.name}={new}"


def bytes_of(tree: Any) -> int:
    """Return the total number of bytes of all arrays, or shapes of arrays, in a pytree."""
    return sum(int(np.prod(a.shape, dtype=np.int64)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
