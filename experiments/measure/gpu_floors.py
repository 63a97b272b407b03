"""The least time that an op of a fixed fan-in layer can take on a GPU, for `experiments.measure.gpu_ops`.

Three things are counted: bytes through memory, each operand and result once, at the bandwidth of a copy; the
rows of features that the connections read, out of the second-level cache, or out of shared memory where a
tile of the features fits in there; and the rows of the gradient of the features that they add to, in the
second-level cache. Of rows only those sectors of 32 bytes count in which an example has a gradient. The rows
share one cache, and go beside memory: a floor is the larger of the two times.

L labels, F connections each, B examples, D inputs.
"""

from typing import NamedTuple

import jax.numpy as jnp

from .problems import Shape

TILE = 32  # examples in a tile of the kernels
_SECTOR = 32  # bytes


class Bandwidths(NamedTuple):
    """In bytes per second. `shared_bytes` is the most shared memory that a block of threads can have."""

    memory: float
    l2: float
    shared: float
    shared_bytes: int


class Traffic(NamedTuple):
    """What an op moves at the least, in bytes."""

    memory: float
    gathered: float = 0
    added: float = 0


def traffic(op: str, shape: Shape, dtype, index_dtype) -> Traffic:
    """What one of `OPS` moves; `shape.density` is that of the gradient of the logits."""
    value, index = jnp.dtype(dtype).itemsize, jnp.dtype(index_dtype).itemsize
    weights, features = shape.labels * shape.fan_in, shape.batch * shape.inputs * value
    layer = weights * (value + index) + shape.labels * value + features
    logits = shape.batch * shape.labels * value
    rows = weights * shape.batch * value

    def touched(examples: float) -> float:
        """The part of runs of so many examples in which one has a gradient."""
        return 1 - (1 - shape.density) ** examples

    again = touched(_SECTOR / value) * rows
    added = touched(_SECTOR / 4) * weights * shape.batch * 4
    match op:
        case "forward":
            return Traffic(layer + logits, rows)
        case "gradients":
            return Traffic(layer + logits + weights * value + features, again, added)
        case "loss":
            return Traffic(layer + weights * value + features, rows + again, added)
        case "adam_step":  # weight and moments are written, and moments are read
            return Traffic(layer + weights * 5 * value + features, rows + again, added)
        case "sgd_step":  # what has no gradient is not written
            return Traffic(layer + touched(shape.batch) * weights * value + features, rows + again, added)
        case "top_k":
            return Traffic(layer, rows)
        case "kth_smallest":
            return Traffic(weights * value)
    raise ValueError(f"no such op: {op!r}")


def dense_step_traffic(inputs: int, width: int, moments_dtype) -> Traffic:
    """What a step of Adam moves of a dense kernel [D, O] in float32 and of its two moments."""
    return Traffic(2 * inputs * width * (4 + 2 * jnp.dtype(moments_dtype).itemsize))


def training_step_traffic(inputs: int, shape: Shape, mode: str) -> Traffic:
    """What a training step moves, of `inputs` features and `shape.inputs` units; mode: `workloads.MODES`."""
    op, dtype = ("adam_step", jnp.float32) if mode == "adam" else ("sgd_step", jnp.bfloat16)
    head, dense = traffic(op, shape, dtype, jnp.uint16), dense_step_traffic(inputs, shape.inputs, dtype)
    forward = 4 * inputs * shape.inputs  # reads the dense kernel once more
    return head._replace(memory=head.memory + dense.memory + forward)


def floor_seconds(moved: Traffic, inputs: int, dtype, bandwidths: Bandwidths) -> dict[str, float]:
    """The least seconds for each of the three, and `floor`, for all of it."""
    tile = (inputs + 1) * TILE * jnp.dtype(dtype).itemsize
    rows = bandwidths.shared if tile <= bandwidths.shared_bytes else bandwidths.l2
    memory = moved.memory / bandwidths.memory
    gathered, added = moved.gathered / rows, moved.added / bandwidths.l2
    return {"memory": memory, "gather": gathered, "add": added, "floor": max(memory, gathered + added)}
