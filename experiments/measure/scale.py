"""Memory and time of training steps by number of labels, for `experiments.label_scale`.

* Peak memory is measured over a number of steps and one rewiring, which each result records. Models that
  would not fit into the machine's memory are not started, and their results say so.
* A step is timed with a gradient at every logit, as at the start of training, and with nearly none, as later.
  The initial bias of all labels is 0 in the first case, and -1.1, beyond the margin of negatives, in the
  second. The learning rate is so low that the bias hardly changes; both densities are recorded.
* Times of the parts of a step are cumulative: features; plus the loss; plus gradients; plus the update
  (Adam), the whole step. A layer that is updated without gradients in memory may take less time for its step
  than for its gradients. Rewiring is timed separately.
* The projected time of an epoch assumes nearly no gradient, and a rewiring every 1,000 steps.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sparse_xmc.cli import environment
from sparse_xmc.cli.memory import PeakMemory
from sparse_xmc.data.batches import Batch
from sparse_xmc.evaluation import gradient_density
from sparse_xmc.mesh import make_mesh
from sparse_xmc.model import Classifier
from sparse_xmc.planning import placeholder_dataset, plan_memory
from sparse_xmc.train import Trainer

from . import clock, meshes
from .workloads import BATCH_SIZE, NUM_FEATURES, Scale, make_batches, make_trainer, read_settings, stepper

_STEPS_PER_REWIRING = 1000
_BATCHES = 4
_RATE = 1e-6
# The initial logits are almost exactly the bias, which therefore sets the density of the gradient.
_ALL_GRADIENTS, _FEW_GRADIENTS = ((f"--output_bias={bias}", "--output_bound=none") for bias in (0.0, -1.1))


def measure(scale: Scale, model: str, seconds: float, now: clock.Clock = time.perf_counter) -> dict:
    """Train a few steps and time them; return a report serializable as JSON.

    Args:
      scale: the number of labels, and the statistics of the data.
      model: name of a flagfile in sparse_xmc/cli/flags/models, without its suffix.
      seconds: approximate time for which each part is repeated.
      now: function that returns the time in seconds.
    """
    arguments = [f"--flagfile=experiments/flags/models/{model}.cfg"]
    arguments += [f"--batch_size={BATCH_SIZE}", f"--rewire_interval={_STEPS_PER_REWIRING}"]
    settings = read_settings(arguments)
    report = {"scale": scale._asdict(), "model": model, "batch_size": BATCH_SIZE}
    points = placeholder_dataset(scale.labels, scale.labels_per_point, NUM_FEATURES, BATCH_SIZE)
    plan = plan_memory(settings.classifier(NUM_FEATURES, scale.labels), settings.training, points)
    report["planned_bytes"] = plan.bytes
    if not plan.fits:
        needed, available = (size / 2**30 for size in (plan.bytes, plan.available))
        reason = f"does not fit: needs {needed:.1f} GiB, of which {available:.1f} are available"
        return report | {"failed": reason, "environment": environment.describe()}

    quartiles = {}

    def record(name: str, call: Callable[[], Any]) -> None:
        rounds = clock.interleaved_times({name: call}, None, seconds=seconds, min_rounds=3, clock=now)
        quartiles[name] = np.quantile(rounds[name], (0.25, 0.5, 0.75)).tolist()

    def start(*more: str) -> tuple[Trainer, Callable[[], Any]]:
        """Return a trainer and its step, after compilation and one step with a rewiring."""
        trainer = make_trainer([*arguments, *more], NUM_FEATURES, scale.labels)
        step = stepper(trainer, batches, _RATE)
        jax.block_until_ready(step())
        return trainer, step

    densities = {}
    batches = make_batches(scale.labels, scale.labels_per_point, count=_BATCHES)
    memory = PeakMemory()
    trainer, step = start(*_ALL_GRADIENTS)
    record("step, all gradients", step)
    report |= {"peak_memory_bytes": memory.bytes(), "peak_memory_measured_as": memory.method}
    densities["step, all gradients"] = gradient_density(trainer.model, batches, settings.training.loss)

    del trainer, step
    trainer, step = start(*_FEW_GRADIENTS)
    record("step", step)
    densities["step"] = gradient_density(trainer.model, batches, settings.training.loss)

    record("rewiring", functools.partial(_rewire, trainer, batches[0]))
    parts = _parts(trainer.model, batches[0], settings.training.loss)
    del trainer, step  # Frees the moments, as gradients need memory.
    for name, part in parts.items():
        record(name, part)
    times = {name: median for name, (_, median, _) in quartiles.items()}
    steps = scale.points / BATCH_SIZE
    return report | {
        "seconds": times,
        "seconds_quartiles": quartiles,
        "gradient_density": densities,
        "epoch_seconds": steps * (times["step"] + times["rewiring"] / _STEPS_PER_REWIRING),
        "environment": environment.describe(),
    }


def _rewire(trainer: Trainer, batch: Batch) -> Any:
    trainer.rewire(batch)
    return trainer.state


def _parts(model: Classifier, batch: Batch, loss: str) -> dict[str, Callable[[], Any]]:
    """Return functions without arguments that run increasing parts of a step."""
    graphdef, params, *other = nnx.split(model, nnx.Param, ...)

    def classifier(params, other):
        return nnx.merge(graphdef, params, *other, copy=True)

    def features(params, other, batch):
        return classifier(params, other).encoder(batch.inputs)

    def loss_of(params, other, batch):
        return classifier(params, other).loss(batch.inputs, batch.positives, loss)

    functions = {"features": features, "loss": loss_of, "gradients": jax.value_and_grad(loss_of)}
    return {name: functools.partial(jax.jit(f), params, other, batch) for name, f in functions.items()}


def run_all(scales: list[Scale], models: list[str], results: Path, seconds: float) -> list[str]:
    """Measure all models without a result, each in a process of its own.

    Returns:
      The command and the last lines of the output of each failed process.
    """
    results.mkdir(parents=True, exist_ok=True)
    failures = []
    for scale in scales:
        for model in models:
            path = _path(results, scale, model)
            print(f"{scale.labels:,} labels, {model}: ", end="", flush=True)
            if path.exists():
                print(f"{path} already exists")
                continue
            program = "experiments.label_scale"
            command = [sys.executable, "-m", program, f"--results={results}"]
            command += [f"--labels={scale.labels}", f"--models={model}", f"--seconds={seconds}", "--here"]
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode == 0:
                print(finished.stdout.strip().splitlines()[-1])
            else:
                print(f"failed (exit status {finished.returncode})")
                last = finished.stderr.strip().splitlines()[-5:]
                failures.append("\n    ".join([" ".join(command), *last]))
    return failures


def run_here(scale: Scale, model: str, results: Path, seconds: float) -> None:
    """Measure one model in this process, and write its result."""
    report = measure(scale, model, seconds)
    _write(_path(results, scale, model), report)
    if "failed" in report:
        print(report["failed"])
    else:
        print(
            f"{report['peak_memory_bytes'] / 2**30:.2f} GiB, "
            f"{1000 * report['seconds']['step']:.0f} ms per step"
        )


def run_on_mesh(scale: Scale, model: str, sizes: dict[str, int], results: Path) -> None:
    """Measure memory and communication of each device of a mesh, in this process, and write the result."""
    results.mkdir(parents=True, exist_ok=True)
    report = meshes.measure(scale, model, make_mesh(**sizes))
    mesh_name = "_".join(f"{axis}{size}" for axis, size in sizes.items())
    _write(results / f"{model}_{scale.labels}_{mesh_name}.json", report)
    print(meshes.line(report))


def _write(path: Path, report: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)


def _path(results: Path, scale: Scale, model: str) -> Path:
    return results / f"{model}_{scale.labels}.json"
