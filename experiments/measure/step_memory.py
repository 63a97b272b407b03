"""The memory of training steps, for `experiments.measure.steps`.

Every model of the table is measured in a process of its own: this program with the JSON of the measurement as
its only argument. The growth of its peak resident size is compared with the sum of known sizes: the arrays of
the training state, XLA's temporaries, and the scratch memory of the ops; and with the plan of `plan_memory`.
Before the measurement, the process trains a tiny classifier of the same kind, so that libraries and compiler
are loaded.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np

from sparse_xmc.cli.memory import PeakMemory
from xla_ops import _native

from .workloads import Network, stepper

_RATE = 1e-3
_GIB = 2**30
# The loss is a mean over millions of labels, so Adam needs a small epsilon. Initially, all labels are easy
# negatives.
_ARGUMENTS = ("--epsilon=1e-12", "--output_bias=-1", "--output_bound=none")


def memory_record(network: Network, mode: str, steps: int) -> dict:
    """Train for some steps, with a rewiring after the first, and report memory and losses."""
    tiny = network._replace(labels=1000, penultimate=max(128, network.fan_in))
    step = stepper(tiny.trainer(mode, *_ARGUMENTS), tiny.batches(1), _RATE)
    for _ in range(3):
        jax.block_until_ready(step())
    batches = network.batches(steps)
    planned = network.plan(mode, *_ARGUMENTS).bytes
    peak = PeakMemory()
    trainer, losses = network.trainer(mode, *_ARGUMENTS), []
    live = sum(a.nbytes for a in jax.tree.leaves(trainer.state) if isinstance(a, jax.Array))
    for batch in batches:
        losses.append(float(trainer.train_step(batch, _RATE)))
    resident = peak.bytes()
    analysis = trainer.trace(batches[0])["step"].lower().compile().memory_analysis()
    if analysis is None:
        raise RuntimeError(f"XLA does not report the memory of a step on {jax.default_backend()}")
    parts = {
        "state_bytes": live,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "scratch_bytes": _native.cpu().peak_scratch_bytes(),
    }
    tail = max(1, steps // 10)
    return {
        "bytes": sum(parts.values()),
        **parts,
        "planned_bytes": planned,
        "peak_resident_bytes": resident,
        "steps": steps,
        "first_loss": float(np.mean(losses[:tail])),
        "last_loss": float(np.mean(losses[-tail:])),
    }


def measure_memory(networks: Sequence[Network], modes: Sequence[str], steps: int) -> list[dict]:
    """Measure the memory table, a record for each network and mode."""
    records = []
    for network in networks:
        for mode in modes:
            model = json.dumps({"network": network._asdict(), "mode": mode, "steps": steps})
            command = [sys.executable, "-m", "experiments.measure.step_memory", model]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            record = {**network._asdict(), "mode": mode}
            if process.returncode == 0:
                record |= json.loads(process.stdout.splitlines()[-1])
            else:
                record["failed"] = (process.stderr.strip().splitlines() or ["killed"])[-1]
            print(memory_line(record), flush=True)
            records.append(record)
    return records


def memory_line(record: dict) -> str:
    """Render a row of the memory table for the terminal."""
    name = "{data:15} {labels:9,} {fan_in:3} {penultimate:8,} {mode:5}".format(**record)
    if "failed" in record:
        return f"{name} failed: {record['failed']}"
    paper = f"{record['paper_gb']:.2f} GB" if record["paper_gb"] else "-"
    losses = "loss {first_loss:.3e} -> {last_loss:.3e} in {steps} steps".format(**record)
    size, planned, resident = (
        record[name] / _GIB for name in ("bytes", "planned_bytes", "peak_resident_bytes")
    )
    return (
        f"{name} {size:6.3f} GiB, planned {planned:6.3f} GiB, resident {resident:6.3f} GiB, "
        f"paper {paper}; {losses}"
    )


if __name__ == "__main__":
    model = json.loads(sys.argv[1])
    print(json.dumps(memory_record(Network(**model["network"]), model["mode"], model["steps"])))
