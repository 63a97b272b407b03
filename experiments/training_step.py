"""The memory and the time of a training step at the sizes of large data sets, for `experiments.benchmark`.

Data are synthetic and can be learnt: points are noisy copies of a few centres, each with labels of its own.

Every cell of the memory table is a process of its own. Its peak resident size is taken beside the sum of what
is known to be there: the arrays of the training state, XLA's temporaries, and the scratch memory of the ops.
Before it counts, the process trains a tiny classifier of the same kind, so that libraries and compiler are
loaded.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

import xla_ops
from experiments import environment
from sparse_xmc.data.batches import Batch
from sparse_xmc.models import Classifier, ClassifierConfig
from sparse_xmc.training import Trainer, TrainingConfig
from xla_ops import _native

BATCH, FEATURES, POSITIVES = 32, 768, 32
GIB = 2**30


class Shape(NamedTuple):
    """The sizes of a classifier of 768 features, and the GB that the paper reports for them, if any."""

    data: str
    labels: int
    fan_in: int
    penultimate: int
    paper_gb: float | None


SHAPES = [
    Shape("Amazon-670K", 670_091, 32, 32_768, 1.45),
    Shape("Amazon-670K", 670_091, 64, 100_000, 2.91),
    Shape("Amazon-3M", 2_812_281, 64, 131_072, 8.67),
    Shape("Paper2Keywords", 8_623_847, 32, 65_536, None),
]

# "lean" keeps bfloat16 weights in the output layer, without moments, and bfloat16 moments in front of it.
MODES = {
    "adam": ({}, {}),
    "lean": (
        {"output_dtype": "bfloat16"},
        {"output_optimizer": "sgd", "output_rate": 4.0, "moments": "bfloat16"},
    ),
}


def make_trainer(labels: int, fan_in: int, penultimate: int, mode: str, output_bias: float) -> Trainer:
    """A trainer of a classifier of the given sizes; `mode` is one of MODES."""
    model_options, training_options = MODES[mode]
    config = ClassifierConfig(
        num_features=FEATURES,
        num_labels=labels,
        penultimate=penultimate,
        fan_in=fan_in,
        output_bias=output_bias,
        **model_options,
    )
    training = TrainingConfig(batch_size=BATCH, epsilon=1e-12, **training_options)
    return Trainer(Classifier(config, rngs=nnx.Rngs(0)), training, seed=0)


def batches(labels: int, seed: int = 0, centres: int = 64) -> Iterator[Batch]:
    """Endless batches of 32 points with up to 32 labels each."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((centres, FEATURES), np.float32)
    of_centre = rng.integers(0, labels, (centres, POSITIVES), np.int32)
    while True:
        centre = rng.integers(0, centres, BATCH)
        positives = of_centre[centre]
        positives[np.arange(POSITIVES) >= rng.integers(1, POSITIVES + 1, BATCH)[:, None]] = -1
        yield Batch(features[centre] + rng.standard_normal((BATCH, FEATURES), np.float32), positives)


def measure(repeats: int) -> dict:
    """Prints the time and memory tables, and returns them as a report for JSON."""
    times = {mode: measure_time(SHAPES[0], mode, repeats) for mode in MODES}
    for mode, report in times.items():
        print("\n".join(time_lines(SHAPES[0], mode, report)), flush=True)
    memory = measure_memory(steps=10)
    return {"time": times, "memory": memory, "environment": environment.describe()}


def memory_cell(shape: Shape, mode: str, steps: int) -> dict:
    """Trains for some steps, of which the first is followed by a rewiring, and reports memory and losses."""
    tiny, data = make_trainer(100, shape.fan_in, 128, mode, -1.0), batches(100)
    for _ in range(3):
        tiny.train_step(next(data), 1e-3).block_until_ready()
    peak = environment.PeakMemory()
    trainer, data, losses = make_trainer(*shape[1:4], mode, -1.0), batches(shape.labels), []
    live = sum(a.nbytes for a in jax.tree.leaves(trainer.state) if isinstance(a, jax.Array))
    for _ in range(steps):
        losses.append(float(trainer.train_step(next(data), 1e-3)))
    resident = peak.bytes()
    compiled = trainer.lower_step(next(data)).compile().memory_analysis()
    parts = {
        "state_bytes": live,
        "temporary_bytes": compiled.temp_size_in_bytes,
        "scratch_bytes": _native.cpu().peak_scratch_bytes(),
    }
    tail = max(1, steps // 10)
    return {
        "bytes": sum(parts.values()),
        **parts,
        "peak_resident_bytes": resident,
        "steps": steps,
        "first_loss": float(np.mean(losses[:tail])),
        "last_loss": float(np.mean(losses[-tail:])),
    }


def measure_memory(steps: int) -> list[dict]:
    """The memory table: a record for each shape and mode."""
    records = []
    for index, shape in enumerate(SHAPES):
        for mode in MODES:
            command = [
                sys.executable,
                "-m",
                "experiments.training_step",
                f"--shape={index}",
                f"--mode={mode}",
            ]
            command.append(f"--steps={steps}")
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            record = {**shape._asdict(), "mode": mode}
            if process.returncode == 0:
                record |= json.loads(process.stdout.splitlines()[-1])
                del record["environment"]  # that of the whole report
            else:
                record["failed"] = (process.stderr.strip().splitlines() or ["killed"])[-1]
            print(memory_line(record), flush=True)
            records.append(record)
    return records


def memory_line(record: dict) -> str:
    """A row of the memory table, for the terminal."""
    name = "{data:15} {labels:9,} {fan_in:3} {penultimate:8,} {mode:5}".format(**record)
    if "failed" in record:
        return f"{name} failed: {record['failed']}"
    paper = f"{record['paper_gb']:.2f} GB" if record["paper_gb"] else "-"
    losses = "loss {first_loss:.3e} -> {last_loss:.3e} in {steps} steps".format(**record)
    size, resident = record["bytes"] / GIB, record["peak_resident_bytes"] / GIB
    return f"{name} {size:6.3f} GiB, resident {resident:6.3f} GiB, paper {paper}; {losses}"


def measure_time(shape: Shape, mode: str, repeats: int) -> dict:
    """The seconds of a step and of its parts, each beside its floor, at gradient densities 1 and near 0."""
    copy, gemm = environment.copy_gb_per_second() * 1e9, _gemm_flops_per_second()
    _, labels, fan_in, penultimate, _ = shape
    products = 2 * BATCH * FEATURES * penultimate / gemm
    weights, dense = labels * fan_in, FEATURES * penultimate
    value_bytes = 4 if mode == "adam" else 2
    report = {}
    for name, bias, gathers in (("density 1", 0.0, 3), ("density near 0", -2.0, 1)):
        trainer, data = make_trainer(labels, fan_in, penultimate, mode, bias), batches(labels)
        calls = _parts(trainer, next(data), mode)
        for _ in range(2):  # the first step rewires
            trainer.train_step(next(data), 1e-6).block_until_ready()
        calls["step"] = lambda trainer=trainer, data=data: _stepped(trainer, next(data))
        times = environment.interleaved_times(calls, repeats)
        seconds = {part: float(np.median(t)) for part, t in times.items()}
        # What an update reads and writes: weights and moments. Without a gradient SGD writes nothing.
        updated = {"adam": 6 * 4, "lean": 2 * value_bytes if gathers == 3 else value_bytes}[mode]
        index_bytes = jnp.dtype(xla_ops.index_dtype(penultimate)).itemsize
        floors = {
            "penultimate forward": products + 4 * dense / copy,
            "output layer": gathers * seconds["gather"] + weights * (updated + index_bytes) / copy,
            "penultimate update": products + dense * {"adam": 6 * 4, "lean": 2 * 4 + 4 * 2}[mode] / copy,
        }
        report[name] = {
            "seconds": seconds,
            "floor_seconds": floors,
            "step_over_floors": seconds["step"] / sum(floors.values()),
        }
    return {"copy_gb_per_second": copy / 1e9, "gemm_gflops": gemm / 1e9, **report}


def time_lines(shape: Shape, mode: str, report: dict) -> list[str]:
    """The time table of one mode, for the terminal."""
    lines = [f"{shape.data}, fan-in {shape.fan_in}, {shape.penultimate:,} penultimate, {mode}; ms (floor)"]
    for density in ("density 1", "density near 0"):
        seconds, floors = report[density]["seconds"], report[density]["floor_seconds"]
        parts = [f"{part} {1e3 * seconds[part]:.1f} ({1e3 * floor:.1f})" for part, floor in floors.items()]
        whole = f"step {1e3 * seconds['step']:.1f} ({1e3 * sum(floors.values()):.1f})"
        rest = seconds["step"] - sum(seconds[part] for part in floors)
        lines.append(
            f"  {density}: {whole} = {report[density]['step_over_floors']:.2f} floors: "
            + ", ".join(parts)
            + f", the rest {1e3 * rest:.1f}; gather {1e3 * seconds['gather']:.1f}"
        )
    return lines


def _stepped(trainer: Trainer, batch: Batch):
    trainer.train_step(batch, 1e-6)
    return trainer.state


def _parts(trainer: Trainer, batch: Batch, mode: str) -> dict:
    """The parts of a step as functions of no arguments, on copies of a trainer's arrays."""
    params, other = trainer.state["params"], trainer.state["other"]
    rng = np.random.default_rng(0)
    penultimate, output = params["penultimate"], params["output"]
    dense, bias = penultimate["kernel"][...], penultimate["bias"][...]
    indices, positives = other["output"]["indices"][...] + 0, jnp.asarray(batch.positives)
    kernel, output_bias = output["kernel"][...], output["bias"][...]
    x = jnp.asarray(batch.inputs)
    hidden = jnp.maximum(x @ dense + bias[None], 0).astype(kernel.dtype)
    dy = jnp.asarray(rng.standard_normal((BATCH, dense.shape[1]), np.float32))

    def updating(function, *arrays):
        """A function that replaces `arrays` by the results of `function`, which donates them."""
        step = jax.jit(function, donate_argnums=tuple(range(len(arrays))))
        held = [jax.tree.map(jnp.copy, array) for array in arrays]

        def run():
            held[:] = step(*held)
            return held

        return run

    if mode == "adam":
        adam = functools.partial(xla_ops.fan_in_adam_step, hidden)
        output_step = updating(
            lambda kernel, bias, state: adam(kernel, indices, bias, positives, state, 1e-6)[2:],
            *(kernel, output_bias, xla_ops.adam_init(kernel, output_bias)),
        )
    else:
        sgd = functools.partial(xla_ops.fan_in_sgd_step, hidden)
        output_step = updating(
            lambda kernel, bias: sgd(kernel, indices, bias, positives, 1e-6)[2:], kernel, output_bias
        )
    state = xla_ops.dense_adam_init(dense, jnp.float32 if mode == "adam" else jnp.bfloat16)
    forward = jax.jit(lambda x, kernel, bias: jnp.maximum(x @ kernel + bias[None], 0))
    dense, kernel, output_bias, bias = (jnp.copy(a) for a in (dense, kernel, output_bias, bias))
    gather = jax.jit(xla_ops.fan_in_loss)
    return {
        "gather": lambda: gather(hidden, kernel, indices, output_bias, positives),
        "penultimate forward": lambda: forward(x, dense, bias),
        "output layer": output_step,
        "penultimate update": updating(
            lambda kernel, state: xla_ops.dense_adam_step(x, dy, kernel, state, 1e-6), dense, state
        ),
    }


def _gemm_flops_per_second(size: int = 2048) -> float:
    a = jnp.ones((size, size))
    times = environment.interleaved_times({"gemm": functools.partial(jax.jit(jnp.matmul), a, a)}, 5)
    return 2 * size**3 / min(times["gemm"])


def _define_flags() -> None:
    flags.DEFINE_integer("shape", 0, "Which of SHAPES.", lower_bound=0, upper_bound=len(SHAPES) - 1)
    flags.DEFINE_enum("mode", "adam", list(MODES), "How it is trained.")
    flags.DEFINE_integer("steps", 10, "Steps to train.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Prints the record of one cell of the memory table as JSON."""
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    values = flags.FLAGS
    cell = memory_cell(SHAPES[values.shape], values.mode, values.steps)
    print(json.dumps(cell | {"environment": environment.describe()}))


if __name__ == "__main__":
    _define_flags()
    app.run(main)
