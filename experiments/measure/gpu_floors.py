"""Lower bounds of the time of fixed fan-in ops on a GPU, for `experiments.measure.gpu_ops`.

A bound counts three kinds of traffic: bytes through memory, each operand and result once, at the bandwidth of
a copy; the rows of features that the connections read from the second-level cache, or from shared memory if a
tile of the features fits into it; and the rows of the gradient of the features that they update in the
second-level cache. In the backward pass, only those 32-byte sectors of the rows count that hold a gradient
of at least one point. Both kinds of rows share one cache, in parallel with memory, so a bound is the larger
of the two times.

L labels, F connections for each, B points, D inputs.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from .problems import Shape

TILE = 32  # points in a tile of the kernels
_SECTOR = 32  # bytes


class Bandwidths(NamedTuple):
    """Bandwidths in bytes per second; `shared_bytes` is the maximum shared memory of a block of threads."""

    memory: float
    l2: float
    shared: float
    shared_bytes: int


class Traffic(NamedTuple):
    """The minimum traffic of an op, in bytes."""

    memory: float
    gathered: float = 0
    added: float = 0


def traffic(op: str, shape: Shape, dtype: DTypeLike, index_dtype: DTypeLike) -> Traffic:
    """Return the traffic of one of `OPS`; `shape.density` is the density of the logits' gradient."""
    value, index = jnp.dtype(dtype).itemsize, jnp.dtype(index_dtype).itemsize
    weights, features = shape.labels * shape.fan_in, shape.batch * shape.inputs * value
    layer = weights * (value + index) + shape.labels * value + features
    logits = shape.batch * shape.labels * value
    rows = weights * shape.batch * value

    def touched(examples: float) -> float:
        """Return the fraction of groups of this many points in which at least one has a gradient."""
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
        case "sgd_step":  # Weights without a gradient are not written.
            return Traffic(layer + touched(shape.batch) * weights * value + features, rows + again, added)
        case "top_k":
            return Traffic(layer, rows)
        case "kth_smallest":
            return Traffic(weights * value)
    raise ValueError(f"no such op: {op!r}")


def dense_step_traffic(inputs: int, width: int, moments_dtype: DTypeLike) -> Traffic:
    """Return the traffic of an Adam step of a dense kernel [D, O] in float32 and its two moments."""
    return Traffic(2 * inputs * width * (4 + 2 * jnp.dtype(moments_dtype).itemsize))


def training_step_traffic(features: int, shape: Shape, mode: str) -> Traffic:
    """Return the traffic of a training step.

    Args:
      features: number of features.
      shape: shape of the output layer; its inputs are the hidden units.
      mode: a key of `workloads.MODES`.
    """
    op, dtype = ("adam_step", jnp.float32) if mode == "adam" else ("sgd_step", jnp.bfloat16)
    head, dense = traffic(op, shape, dtype, jnp.uint16), dense_step_traffic(features, shape.inputs, dtype)
    forward = 4 * features * shape.inputs  # reads the dense kernel once more
    return head._replace(memory=head.memory + dense.memory + forward)


def floor_seconds(moved: Traffic, inputs: int, dtype: DTypeLike, bandwidths: Bandwidths) -> dict[str, float]:
    """Return lower bounds in seconds for each kind of traffic, and `floor`, the bound for all of it."""
    tile = (inputs + 1) * TILE * jnp.dtype(dtype).itemsize
    rows = bandwidths.shared if tile <= bandwidths.shared_bytes else bandwidths.l2
    memory = moved.memory / bandwidths.memory
    gathered, added = moved.gathered / rows, moved.added / bandwidths.l2
    return {"memory": memory, "gather": gathered, "add": added, "floor": max(memory, gathered + added)}
