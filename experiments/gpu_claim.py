"""Training steps of the paper's Amazon-670K model, 32k penultimate layer, on random data: memory and time.

`experiments.gpu_check` runs this with the memory of JAX's allocator limited. The paper reports 1.45 GB and
271 s an epoch for this model (fixed fan-in 32, CascadeXML features), on a V100.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from sparse_xmc.data.batches import Batch
from sparse_xmc.models import Classifier, ClassifierConfig
from sparse_xmc.training import Trainer, TrainingConfig

TRAIN_POINTS = 490_449
LABELS_PER_POINT = 5
PAPER = {"memory_bytes": 1.45e9, "seconds_per_epoch": 271}


def measure(config: ClassifierConfig, training: TrainingConfig, steps: int) -> dict:
    """Trains for `steps` steps after two that are not counted; the returned report is ready for JSON."""
    rng = np.random.default_rng(0)
    batches = [
        Batch(
            rng.standard_normal((training.batch_size, config.num_features), np.float32),
            rng.integers(0, config.num_labels, (training.batch_size, LABELS_PER_POINT), np.int32),
        )
        for _ in range(8)
    ]
    trainer = Trainer(Classifier(config, rngs=nnx.Rngs(0)), training, seed=0)
    losses = [float(trainer.train_step(batches[i], training.learning_rate)) for i in range(2)]
    start = time.perf_counter()
    for step in range(steps):
        loss = trainer.train_step(batches[step % len(batches)], training.learning_rate)
    losses.append(float(loss))
    seconds = (time.perf_counter() - start) / steps
    memory = jax.devices()[0].memory_stats() or {}  # none on a CPU
    return {
        "steps": steps,
        "losses": losses,
        "seconds_per_step": seconds,
        "seconds_per_epoch": seconds * TRAIN_POINTS / training.batch_size,
        "peak_memory_bytes": memory.get("peak_bytes_in_use"),
        "memory_limit_bytes": memory.get("bytes_limit"),
        "paper": PAPER,
    }


def _define_flags() -> None:
    flags.DEFINE_integer("features", 768, "Number of input features.")
    flags.DEFINE_integer("labels", 670_091, "Number of labels.")
    flags.DEFINE_integer("penultimate", 32_768, "Width of the penultimate layer.")
    flags.DEFINE_integer("fan_in", 32, "Connections per label.")
    flags.DEFINE_integer("steps", 200, "Steps to time.", lower_bound=1)
    flags.DEFINE_string("json", None, "File to write the report to.", required=True)


def main(argv: list[str]) -> None:
    """Measures, and writes --json."""
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    values = flags.FLAGS
    config = ClassifierConfig(
        num_features=values.features,
        num_labels=values.labels,
        penultimate=values.penultimate,
        fan_in=values.fan_in,
        dropout=0.1,
    )
    report = measure(config, TrainingConfig(batch_size=32), values.steps)
    Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
