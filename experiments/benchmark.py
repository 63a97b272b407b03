r"""Times an op of `xla_ops` against other ways to compute the same in JAX, or measures whole training steps.

    python -m experiments.benchmark --op=fan_in_matmul --labels=670091 --json=result.json

See `experiments.measure.ops`; the ops are in `experiments.measure.problems`.

    python -m experiments.benchmark --op=training_step --json=result.json
    python -m experiments.benchmark --op=training_step --labels=131073 --penultimate=8192 --mode=lean

measures time and memory of training steps: of the networks in `experiments.measure.workloads`, or of one: the
first of them, but for the sizes that are given. See `experiments.measure.steps`.
"""

import json
from pathlib import Path

from absl import app, flags

from experiments.measure import ops, problems, steps, workloads

# The flags that say what is measured; --fan_in and --penultimate are those of `experiments.run`.
_OF_OPS = ("labels", "inputs", "fan_in", "batch", "dtype", "density")
_OF_STEPS = ("labels", "features", "fan_in", "penultimate", "mode", "steps")
_FAN_IN = 32


def _define_flags() -> None:
    flags.DEFINE_enum("op", "fan_in_matmul", [*problems.OPS, "training_step"], "What to measure.")
    flags.DEFINE_integer("labels", workloads.AMAZON_670K.labels, "Number of labels.", lower_bound=1)
    flags.DEFINE_integer("inputs", 32_768, "Number of inputs of an op.", lower_bound=1)
    flags.DEFINE_integer("batch", 32, "Examples in the batch of an op.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the values of an op.")
    flags.DEFINE_float("density", 1.0, "The part of the logits with a gradient, for fan_in_loss.", 0.0, 1.0)
    flags.DEFINE_integer(
        "features", workloads.NUM_FEATURES, "Input features, for training_step.", lower_bound=1
    )
    flags.DEFINE_enum("mode", None, list(workloads.MODES), "How to train, for training_step; by default all.")
    flags.DEFINE_integer("steps", 10, "Steps that memory is measured over, for training_step.", lower_bound=1)
    flags.DEFINE_integer("repeats", 15, "Runs of each contender, fewer for slow ones.", lower_bound=1)
    flags.DEFINE_string("json", None, "File to write the report to.")
    flags.declare_key_flag("fan_in")
    flags.declare_key_flag("penultimate")


def main(argv: list[str]) -> None:
    """Prints the table, and writes --json."""
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    values = flags.FLAGS
    used = _OF_STEPS if values.op == "training_step" else _OF_OPS
    given = [name for name in {*_OF_OPS, *_OF_STEPS} - {*used} if values[name].present]
    if unused := sorted({*given, *workloads.flags_without_use(*used)}):
        raise app.UsageError(f"--op={values.op} has no use for {', '.join(f'--{name}' for name in unused)}")
    if values.op == "training_step":
        network = workloads.network_of_flags()
        networks = workloads.NETWORKS if network in workloads.NETWORKS else (network,)
        modes = list(workloads.MODES) if values.mode is None else [values.mode]
        report = steps.measure(networks, modes, values.repeats, values.steps)
    else:
        fan_in = _FAN_IN if values.fan_in is None else values.fan_in
        shape = problems.Shape(values.labels, values.inputs, fan_in, values.batch, values.density)
        report = ops.measure(values.op, shape, values.dtype, values.repeats)
        print(ops.table(report))
    if values.json is not None:
        Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()  # not on import: tests import several programs, and their flags share names
    app.run(main)
