r"""Memory and time of training steps from ten thousand to nine million labels, on synthetic points.

    python -m experiments.label_scale --results=experiments/results/label_scale

trains, for each number of labels and each system, a few steps at batch 32 on 768 features, each in a process
of its own; `experiments.tables --label_scale` shows the results. What has a result already is skipped.

* Peak memory is measured over a number of steps and one rewiring, as `experiments.environment` says in each
  result. What would not fit into the machine's memory is not started, and the result says so.
* A step is timed with a gradient at every logit, as at the start of training, and with nearly none, as later:
  the bias of all labels at 0, and at -1.1, beyond the margin of negatives. Both densities are recorded.
* Parts of a step are timed by running more and more of it: the features, with the loss, with all gradients,
  the whole step (Adam). A fixed fan-in layer is updated without gradients in memory, so that its step may
  take less than its gradients. Rewiring is timed on its own.
* The projected time of an epoch takes nearly no gradient, and a rewiring every 1,000 steps.
"""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import psutil
from absl import app, flags
from flax import nnx

from experiments import environment, prepare, sweep
from experiments.synthetic import Synthetic
from sparse_xmc.data.batches import Batch
from sparse_xmc.evaluation import gradient_density
from sparse_xmc.models import Classifier, ClassifierConfig
from sparse_xmc.training import Trainer, TrainingConfig

BATCH_SIZE = 32
NUM_FEATURES = 768
_STEPS_PER_REWIRING = 1000
_BATCHES = 4


class Scale(NamedTuple):
    """A number of labels, with what else matters of the data set that has it.

    Attributes:
      name: that of a data set, or what it is.
      labels: L.
      labels_per_point: the mean.
      points: the number of training points.
    """

    name: str
    labels: int
    labels_per_point: float
    points: int


def _of(name: str) -> Scale:
    statistics = prepare.DATASETS[name]
    return Scale(name, statistics.labels, statistics.labels_per_point, statistics.train)


# Where a data set's statistics are not known, 5 labels per point and 5 points per label are assumed.
SCALES = (
    Scale("10k (assumed)", 10_000, 5.0, 10_000),
    _of("Wiki10-31K"),
    _of("LF-AmazonTitles-131K"),
    _of("Wiki-500K"),
    _of("Amazon-670K"),
    Scale("1.3M (assumed)", 1_305_265, 5.0, 1_305_265),
    _of("Amazon-3M"),
    Scale("8.6M (assumed)", 8_623_847, 5.0, 8_623_847),
)


def measure(scale: Scale, cell: str, seconds: float) -> dict:
    """Trains a few steps and times them; the report is ready for JSON.

    Args:
      scale: the number of labels and the data's statistics.
      cell: a flagfile in experiments/flags/cells, without its ending.
      seconds: about how long each part is repeated.
    """
    values = sweep.effective_flags([f"--flagfile=experiments/flags/cells/{cell}.cfg"])
    config = ClassifierConfig(
        num_features=NUM_FEATURES,
        num_labels=scale.labels,
        penultimate=values["penultimate"],
        output_layer=values["output_layer"],
        fan_in=values["fan_in"],
    )
    report = {"scale": scale._asdict(), "cell": cell, "batch_size": BATCH_SIZE}
    needed, available = needed_bytes(config), psutil.virtual_memory().available
    if needed > available:
        reason = (
            f"does not fit: needs {needed / 2**30:.1f} GiB, of which {available / 2**30:.1f} are available"
        )
        return report | {"failed": reason, "environment": environment.describe()}

    source = Synthetic(scale.labels, scale.labels_per_point, NUM_FEATURES)
    batches = [source.batch(i, BATCH_SIZE) for i in range(_BATCHES)]
    memory = environment.PeakMemory()
    training = TrainingConfig(batch_size=BATCH_SIZE, rewire_interval=_STEPS_PER_REWIRING)
    trainer = Trainer(Classifier(config, rngs=nnx.Rngs(0)), training, seed=0)
    times, densities = {}, {}
    step = functools.partial(_step, trainer, batches)
    step()  # compiles; this first one is followed by a rewiring
    times["step, all gradients"] = _median_seconds(step, seconds)
    report |= {"peak_memory_bytes": memory.bytes(), "peak_memory_measured_as": memory.method}
    densities["step, all gradients"] = gradient_density(trainer.model, batches)

    bias = trainer.state["params"]["output"]["bias"]
    trainer.state["params"]["output"]["bias"] = bias.replace(jax.numpy.full_like(bias[...], -1.1))
    times["step"] = _median_seconds(step, seconds)
    densities["step"] = gradient_density(trainer.model, batches)
    times["rewiring"] = _median_seconds(functools.partial(_rewire, trainer, batches[0]), seconds)

    graphdef, params, other = nnx.split(trainer.model, nnx.Param, ...)
    del trainer, step  # the moments make room for the gradients
    for name, part in _parts(graphdef).items():
        times[name] = _median_seconds(functools.partial(part, params, other, batches[0]), seconds)
    steps = scale.points / BATCH_SIZE
    return report | {
        "seconds": times,
        "gradient_density": densities,
        "epoch_seconds": steps * (times["step"] + times["rewiring"] / _STEPS_PER_REWIRING),
        "environment": environment.describe(),
    }


def needed_bytes(config: ClassifierConfig) -> int:
    """What training surely needs: weights, two moments, and gradients and logits where they are made."""
    model = nnx.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0)))
    parameters = sum(np.prod(a.shape, dtype=np.int64) for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if config.output_layer == "fixed_fan_in":
        return int(12 * parameters)
    return int(16 * parameters + 4 * BATCH_SIZE * config.num_labels)


def _step(trainer: Trainer, batches: list) -> None:
    trainer.train_step(batches[trainer.step % len(batches)], 1e-3)
    jax.block_until_ready(trainer.state)


def _rewire(trainer: Trainer, batch: Batch) -> None:
    trainer.rewire(batch)
    jax.block_until_ready(trainer.state)


def _parts(graphdef) -> dict:
    """Functions of (params, other, batch) that run more and more of a step."""

    def model(params, other):
        return nnx.merge(graphdef, params, other, copy=True)

    def features(params, other, batch):
        return model(params, other).features(batch.inputs)

    def loss(params, other, batch):
        return model(params, other).loss(batch.inputs, batch.positives)

    return {
        "features": jax.jit(features),
        "loss": jax.jit(loss),
        "gradients": jax.jit(jax.value_and_grad(loss)),
    }


def _median_seconds(call, seconds: float) -> float:
    """The median time of a call, repeated for about so long but at least 3 times, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def run_all(scales: list[Scale], cells: list[str], results: Path, seconds: float) -> list[str]:
    """Measures what has no result yet, each in a process of its own.

    Returns:
      For each process that failed, its command and the last lines of its output.
    """
    results.mkdir(parents=True, exist_ok=True)
    failures = []
    for scale in scales:
        for cell in cells:
            path = results / f"{cell}_{scale.labels}.json"
            print(f"{scale.labels:,} labels, {cell}: ", end="", flush=True)
            if path.exists():
                print(f"{path} is there")
                continue
            command = [sys.executable, "-m", "experiments.label_scale", f"--results={results}"]
            command += [f"--labels={scale.labels}", f"--cells={cell}", f"--seconds={seconds}", "--here"]
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode == 0:
                print(finished.stdout.strip().splitlines()[-1])
            else:
                print(f"failed (exit status {finished.returncode})")
                last = finished.stderr.strip().splitlines()[-5:]
                failures.append("\n    ".join([" ".join(command), *last]))
    return failures


def _measure_here(scale: Scale, cell: str, results: Path, seconds: float) -> None:
    report = measure(scale, cell, seconds)
    path = results / f"{cell}_{scale.labels}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)
    if "failed" in report:
        print(report["failed"])
    else:
        print(
            f"{report['peak_memory_bytes'] / 2**30:.2f} GiB, {1000 * report['seconds']['step']:.0f} ms a step"
        )


def _define_flags() -> None:
    flags.DEFINE_string("results", None, "Directory that results go to.", required=True)
    flags.DEFINE_multi_integer("labels", [s.labels for s in SCALES], "Numbers of labels, of those in SCALES.")
    flags.DEFINE_list(
        "cells",
        "dense,bottleneck_64,fixed_fan_in_32_32k",
        "The systems: flagfiles in experiments/flags/cells.",
    )
    flags.DEFINE_float("seconds", 10, "About how long each part is repeated.")
    flags.DEFINE_bool("here", False, "Measure one system in this process.")


def main(argv):
    """Measures."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    values, results = flags.FLAGS, Path(flags.FLAGS.results)
    scales = [scale for scale in SCALES if scale.labels in values.labels]
    if unknown := set(values.labels) - {scale.labels for scale in SCALES}:
        raise app.UsageError(f"--labels must be among {[s.labels for s in SCALES]}, got {sorted(unknown)}")
    if values.here:
        _measure_here(scales[0], values.cells[0], results, values.seconds)
    elif failures := run_all(scales, values.cells, results, values.seconds):
        sys.exit("\n".join(["", *failures, f"{len(failures)} failed"]))


if __name__ == "__main__":
    _define_flags()
    app.run(main)
