"""Training steps of the paper's Amazon-670K model, 32k penultimate layer, on synthetic data: memory and time.

`experiments.gpu_check` runs this with the memory of JAX's allocator limited. The paper reports 1.45 GB and
271 s an epoch for this model (fixed fan-in 32, CascadeXML features), on a V100.
"""

import json
from pathlib import Path

import jax
from absl import app, flags

from sparse_xmc.cli import program
from sparse_xmc.cli.run_flags import unused_flags

from . import clock
from .workloads import AMAZON_670K, BATCH_SIZE, NUM_FEATURES, Network, network_of_flags

PAPER = {"memory_bytes": 1.45e9, "seconds_per_epoch": 271}


def measure(network: Network, steps: int) -> dict:
    """Train for `steps` steps after two that are not counted; return a report serializable as JSON."""
    trainer, batches, losses = network.trainer("adam"), network.batches(8), []

    def step():
        batch = batches[trainer.step % len(batches)]
        losses.append(trainer.train_step(batch, trainer.config.learning_rate))
        return losses[-1]

    jax.block_until_ready(step())  # The first step is followed by a rewiring.
    seconds = clock.median_seconds(step, 1, calls_per_round=steps)
    memory = jax.devices()[0].memory_stats() or {}  # not available on a CPU
    return {
        "steps": steps,
        "losses": [float(loss) for loss in (*losses[:2], losses[-1])],
        "seconds_per_step": seconds,
        "seconds_per_epoch": seconds * AMAZON_670K.points / BATCH_SIZE,
        "peak_memory_bytes": memory.get("peak_bytes_in_use"),
        "memory_limit_bytes": memory.get("bytes_limit"),
        "paper": PAPER,
    }


def _define_flags() -> None:
    flags.DEFINE_integer("features", NUM_FEATURES, "Number of input features.")
    flags.DEFINE_integer("labels", AMAZON_670K.labels, "Number of labels.")
    flags.DEFINE_integer("steps", 200, "Steps to time.", lower_bound=1)
    flags.DEFINE_string("json", None, "File to write the report to.", required=True)
    flags.declare_key_flag("fan_in")
    flags.declare_key_flag("penultimate")


def main() -> None:
    """Measure, and write --json."""
    if unused := unused_flags("fan_in", "penultimate"):
        raise app.UsageError(f"no use for {', '.join(f'--{name}' for name in unused)}")
    report = measure(network_of_flags(), flags.FLAGS.steps)
    Path(flags.FLAGS.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()
    program.start(main)
