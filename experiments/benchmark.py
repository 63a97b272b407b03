r"""Time an op of `xla_ops` against other JAX implementations, or measure whole training steps.

    python -m experiments.benchmark --op=fan_in_matmul --labels=670091 --json=result.json

See `experiments.measure.ops`; the ops are in `experiments.measure.problems`.

    python -m experiments.benchmark --op=training_step --json=result.json
    python -m experiments.benchmark --op=training_step --labels=131073 --penultimate=8192 --mode=lean

measures time and memory of training steps: of all networks in `experiments.measure.workloads`, or of one, the
first of them with the sizes that are given as flags. See `experiments.measure.steps`.

    python -m experiments.benchmark --op=direct_inputs --json=result.json

times training steps and ranking for labels with words as direct inputs. See
`experiments.measure.direct_inputs`.

    python -m experiments.benchmark --op=select_direct_inputs --json=result.json

measures time and memory of choosing these direct inputs. See `experiments.measure.feature_selection`.

    python -m experiments.benchmark --op=encoder_memory --json=result.json
    python -m experiments.benchmark --op=encoder_memory --labels=131073 --batch=512 --tokens=32

plans the memory of training steps with a BERT-base encoder, in float32 and bfloat16, with and without remat:
for the shapes in `experiments.measure.encoder_memory`, or for one, the first with the sizes given as flags.
"""

import json
from pathlib import Path
from typing import Any

from absl import app, flags

from sparse_xmc.cli import program
from sparse_xmc.cli.run_flags import unused_flags

from .measure import direct_inputs, encoder_memory, feature_selection, ops, problems, steps, workloads

# The flags of each kind of measurement; --fan_in and --penultimate are defined by `experiments.run`.
_OF_OPS = ("labels", "inputs", "fan_in", "batch", "dtype", "density")
_OF_STEPS = ("labels", "features", "fan_in", "penultimate", "mode", "steps")
_OF_DIRECT = ("labels", "inputs", "fan_in", "batch", "density", "vocabulary")
_OF_ENCODER = ("labels", "fan_in", "penultimate", "vocabulary", "batch", "tokens")
_FAN_IN = 32
# Default sizes of an op; for direct_inputs, those in `experiments/flags/text.cfg`.
_SIZES = {"inputs": 32_768, "batch": 32, "density": 1.0}
_DIRECT_SIZES = {"inputs": 8192, "batch": 256, "density": 0.01}


def _help(what: str, name: str) -> str:
    return f"{what}; by default {_SIZES[name]}, for direct_inputs {_DIRECT_SIZES[name]}."


def _define_flags() -> None:
    flags.DEFINE_enum(
        "op",
        "fan_in_matmul",
        [*problems.OPS, "training_step", "direct_inputs", "select_direct_inputs", "encoder_memory"],
        "What to measure.",
    )
    flags.DEFINE_integer("labels", workloads.AMAZON_670K.labels, "Number of labels.", lower_bound=1)
    flags.DEFINE_integer("inputs", None, _help("Number of inputs of an op", "inputs"), lower_bound=1)
    flags.DEFINE_integer("batch", None, _help("Examples in the batch of an op", "batch"), lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the values of an op.")
    flags.DEFINE_float(
        "density", None, _help("The part of the logits with a gradient, for losses", "density"), 0.0, 1.0
    )
    flags.DEFINE_integer(
        "vocabulary", 100_000, "Number of words, for direct_inputs and encoder_memory.", lower_bound=1000
    )
    flags.DEFINE_integer(
        "tokens", encoder_memory.SHAPES[0].tokens, "Tokens of a text, for encoder_memory.", 1
    )
    flags.DEFINE_integer(
        "features", workloads.NUM_FEATURES, "Input features, for training_step.", lower_bound=1
    )
    flags.DEFINE_enum("mode", None, list(workloads.MODES), "How to train, for training_step; by default all.")
    flags.DEFINE_integer("steps", 10, "Steps that memory is measured over, for training_step.", lower_bound=1)
    flags.DEFINE_integer("repeats", 15, "Runs of each contender, fewer for slow ones.", lower_bound=1)
    flags.DEFINE_string("json", None, "File to write the report to.")
    flags.declare_key_flag("fan_in")
    flags.declare_key_flag("penultimate")


def main() -> None:
    """Measure, print the table, and write --json."""
    values = flags.FLAGS
    of_others = {
        "training_step": _OF_STEPS,
        "direct_inputs": _OF_DIRECT,
        "select_direct_inputs": (),
        "encoder_memory": _OF_ENCODER,
    }
    used = of_others.get(values.op, _OF_OPS)
    known = set(_OF_OPS).union(*of_others.values())
    given = [name for name in known - {*used} if values[name].present]
    if unused := sorted({*given, *unused_flags(*used)}):
        raise app.UsageError(f"--op={values.op} has no use for {', '.join(f'--{name}' for name in unused)}")
    if values.op == "training_step":
        network = workloads.network_of_flags()
        networks = workloads.NETWORKS if network in workloads.NETWORKS else (network,)
        modes = list(workloads.MODES) if values.mode is None else [values.mode]
        report = steps.measure(networks, modes, values.repeats, values.steps)
    elif values.op == "select_direct_inputs":
        report = feature_selection.measure(feature_selection.Sizes())
        print(feature_selection.table(report))
    elif values.op == "encoder_memory":
        given_sizes = {name: getattr(values, name) for name in _OF_ENCODER if values[name].present}
        first = encoder_memory.SHAPES[0]
        shapes = (first._replace(**given_sizes),) if given_sizes else encoder_memory.SHAPES
        report = encoder_memory.measure(shapes)
        print(encoder_memory.table(report))
    else:
        fan_in = _FAN_IN if values.fan_in is None else values.fan_in
        defaults = _DIRECT_SIZES if values.op == "direct_inputs" else _SIZES
        given_sizes = {name: getattr(values, name) for name in defaults if values[name].present}
        sizes: dict[str, Any] = defaults | given_sizes
        shape = problems.Shape(labels=values.labels, fan_in=fan_in, **sizes)
        if values.op == "direct_inputs":
            report = direct_inputs.measure(shape, values.vocabulary, values.repeats)
            print(direct_inputs.table(report))
        else:
            report = ops.measure(values.op, shape, values.dtype, values.repeats)
            print(ops.table(report))
    if values.json is not None:
        Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()  # not on import: tests import several programs, whose flags share names
    program.start(main)
