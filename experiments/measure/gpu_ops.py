"""Times `xla_ops.fan_in_matmul` on a GPU at the size of Amazon-670K, against floors and other formulations.

For each shape: ours forward, and both gradients together at three densities of the gradient of the logits;
then forward alone and forward with gradients, of ours and of the formulations of `measure.problems`
(plain gathers, BCOO and BCSR, which use cuSPARSE), and of a dense layer with as many multiplications.

A floor is the time that moving the bytes takes at the least, whichever takes longer: each operand and
result once through memory, at the bandwidth of a copy measured here; or the rows that the connections
gather, out of the second-level cache or, where a tile of the features fits in there, out of shared memory,
at bandwidths that --l2_tb_per_second and --shared_tb_per_second assume.
"""

import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from xla_ops import fan_in_matmul

from .. import prepare, program
from . import clock, environment, problems
from .ops import PASSES, compile_contenders, speedup
from .problems import Contender, Problem, Shape

BATCHES = (32, 128, 512)
INPUTS = (768, 32_768)
FAN_INS = (32, 64)
DTYPES = ("float32", "bfloat16")
DENSITIES = (1.0, 0.1, 0.01)
_COPY_BYTES = 1 << 30
_CALLS_PER_ROUND = 5
_TILE = 32  # examples in a tile of the kernels


class Bandwidths(NamedTuple):
    """In bytes per second. `shared_bytes` is the most shared memory that a block can have."""

    memory: float
    l2: float
    shared: float
    shared_bytes: int


def memory_bytes(shape: Shape, dtype) -> int:
    """The bytes of the operands and the result of the forward pass, each once."""
    value, index = jnp.dtype(dtype).itemsize, 2 if shape.inputs <= 65_536 else 4
    connections = shape.labels * shape.fan_in
    return (
        connections * (value + index) + (shape.labels + shape.batch * (shape.inputs + shape.labels)) * value
    )


def gathered_bytes(shape: Shape, dtype) -> int:
    """The bytes of features that the connections read: a run of the batch each."""
    return shape.labels * shape.fan_in * shape.batch * jnp.dtype(dtype).itemsize


def floor_seconds(shape: Shape, dtype, bandwidths: Bandwidths) -> float:
    """The least time of the forward pass; that of both gradients is counted as twice as long."""
    tile_bytes = (shape.inputs + 1) * _TILE * jnp.dtype(dtype).itemsize
    cache = bandwidths.shared if tile_bytes <= bandwidths.shared_bytes else bandwidths.l2
    return max(memory_bytes(shape, dtype) / bandwidths.memory, gathered_bytes(shape, dtype) / cache)


def copy_bytes_per_second(rounds: int, size: int = _COPY_BYTES) -> float:
    """Read plus written, by a kernel that adds 1 to each element of a large array."""
    call = functools.partial(jax.jit(lambda a: a + 1), jnp.zeros(size // 4, jnp.float32))
    return 2 * size / clock.median_seconds(call, rounds, calls_per_round=_CALLS_PER_ROUND)


def _gradients(x, kernel, indices, bias, dy):
    _, vjp = jax.vjp(lambda x, kernel: fan_in_matmul(x, kernel, indices, bias), x, kernel)
    return vjp(dy)  # nothing of this needs the result, so that XLA leaves the forward pass out


def _dense(x, kernel, bias):
    return jnp.matmul(x[:, : kernel.shape[1]], kernel.T, preferred_element_type=x.dtype) + bias[None]


def measure(shape: Shape, dtype: str, bandwidths: Bandwidths, rounds: int) -> dict:
    """Times one shape; the returned row is ready for JSON."""
    rng = np.random.default_rng(0)
    problem = problems.fan_in_matmul(shape, jnp.dtype(dtype), rng)
    x, kernel, bias = problem.values
    cotangent = problem.cotangent
    assert cotangent is not None  # only losses have none
    (indices,) = next(iter(problem.contenders.values())).constants
    floor = floor_seconds(shape, dtype, bandwidths)

    def median(function, *arguments):
        call = functools.partial(jax.jit(function), *arguments)
        return clock.median_seconds(call, rounds, calls_per_round=_CALLS_PER_ROUND)

    forward = median(fan_in_matmul, x, kernel, indices, bias)
    gradients = {}
    for density in DENSITIES:
        kept = jax.random.bernoulli(jax.random.key(0), density, cotangent.shape)
        dy = jnp.where(kept, cotangent, jnp.zeros_like(cotangent))
        gradients[str(density)] = median(_gradients, x, kernel, indices, bias, dy)
    contenders = _time_all(problem, rounds)
    dense = _time_all(problem._replace(contenders={"dense": Contender(_dense, ())}), rounds)
    return {
        **shape._asdict(),
        "dtype": dtype,
        "indices": indices.dtype.name,
        "memory_bytes": memory_bytes(shape, dtype),
        "gathered_bytes": gathered_bytes(shape, dtype),
        "floor_seconds": floor,
        "forward_seconds": forward,
        "forward_over_floor": forward / floor,
        "gradients_seconds": gradients,
        "gradients_over_twice_the_floor": {d: s / (2 * floor) for d, s in gradients.items()},
        "contenders": contenders,
        "speedup": speedups(contenders),
        "dense_layer_of_equal_flops": dense["dense"],
    }


def _time_all(problem: Problem, rounds: int) -> dict[str, dict[str, float | str]]:
    """The seconds of each contender's passes, or why there are none."""
    compiled, failures = compile_contenders(problem)
    times = clock.interleaved_times(compiled, rounds, calls_per_round=_CALLS_PER_ROUND, failures=failures)
    outcomes = {key: float(np.median(t)) for key, t in times.items()} | failures
    return {name: {p: outcomes[name, p] for p in PASSES} for name in problem.contenders}


def speedups(contenders: dict[str, dict[str, float | str]]) -> dict:
    """For each pass, the fastest contender other than the first, which is ours, over ours."""
    ours = next(iter(contenders))
    found = {}
    for pass_name in contenders[ours]:
        ran = {name: s for name, of in contenders.items() if isinstance(s := of[pass_name], float)}
        if over := speedup(ours, ran):
            found[pass_name] = over
    return found


def table_row(row: dict) -> str:
    """One row for the terminal."""
    gradients = " ".join(f"{s * 1e3:8.3f}" for s in row["gradients_seconds"].values())
    speedup = "".join(f"  {s['ratio']:.1f}x {s['over']}" for s in row["speedup"].values())
    forward = f"{row['floor_seconds'] * 1e3:8.3f} {row['forward_seconds'] * 1e3:8.3f}"
    return (
        f"{row['batch']:4} {row['inputs']:6} {row['fan_in']:3} {row['dtype']:9}{forward} {gradients}{speedup}"
    )


def _define_flags() -> None:
    flags.DEFINE_integer("labels", prepare.DATASETS["Amazon-670K"].labels, "Number of labels.", lower_bound=1)
    flags.DEFINE_multi_integer("batch", list(BATCHES), "Examples in the batch.")
    flags.DEFINE_multi_integer("inputs", list(INPUTS), "Input features.")
    flags.DEFINE_multi_integer("fan_in", list(FAN_INS), "Connections per label.")
    flags.DEFINE_float("l2_tb_per_second", 5.0, "Assumed: what an H100's second-level cache delivers.")
    flags.DEFINE_float("shared_tb_per_second", 28.0, "Assumed: what an H100's shared memory delivers.")
    flags.DEFINE_integer("shared_kib", 227, "Shared memory that a block can have.")
    flags.DEFINE_integer("copy_bytes", _COPY_BYTES, "The size of the array that is copied.")
    flags.DEFINE_integer("rounds", 7, "Rounds of each measurement.", lower_bound=1)
    flags.DEFINE_string("json", None, "File to write the report to.", required=True)


def main() -> None:
    """Prints a table, and writes --json after each row."""
    values = flags.FLAGS
    bandwidths = Bandwidths(
        memory=copy_bytes_per_second(values.rounds, values.copy_bytes),
        l2=1e12 * values.l2_tb_per_second,
        shared=1e12 * values.shared_tb_per_second,
        shared_bytes=1024 * values.shared_kib,
    )
    rows: list[dict] = []
    report = {"bytes_per_second": bandwidths._asdict(), "rows": rows, "environment": environment.describe()}
    densities = " ".join(f"at {d:5}" for d in DENSITIES)
    print(f"ms: batch inputs fan-in dtype  floor  forward  gradients {densities}")
    for inputs, batch, fan_in, dtype in itertools.product(values.inputs, values.batch, values.fan_in, DTYPES):
        shape = Shape(values.labels, inputs, fan_in, batch)
        try:
            row = measure(shape, dtype, bandwidths, values.rounds)
            print(table_row(row), flush=True)
        except Exception as error:  # such as no memory left: the other shapes still count
            row = {**shape._asdict(), "dtype": dtype, "failed": clock.reason(error)}
            print(row, flush=True)
        rows.append(row)
        Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()
    program.start(main)
