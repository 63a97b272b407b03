r"""Measure memory and time of training steps from ten thousand to nine million labels, on synthetic points.

    python -m experiments.label_scale --results=experiments/results/label_scale

trains each system with each number of labels for a few steps at batch size 32 with 768 features, each in a
process of its own; `experiments.tables --label_scale` renders the results. Measurements with existing results
are skipped. See `experiments.measure.scale` for the method.

    JAX_NUM_CPU_DEVICES=8 python -m experiments.label_scale --results=DIR --mesh=label:8 --labels=8623847

measures memory and communication of each device of a mesh for fixed fan-in; see `experiments.measure.meshes`.
"""

import sys
from pathlib import Path

from absl import app, flags

from sparse_xmc.cli import program
from sparse_xmc.cli.run_flags import unused_flags
from sparse_xmc.mesh import parse_mesh

from .measure.scale import run_all, run_here, run_on_mesh
from .measure.workloads import SCALES

_ON_MESH = "fixed_fan_in_32_32k"  # the model that is measured on a mesh


def _define_flags() -> None:
    flags.DEFINE_string("results", None, "Directory that results go to.", required=True)
    flags.DEFINE_multi_integer("labels", [s.labels for s in SCALES], "Numbers of labels, of those in SCALES.")
    flags.DEFINE_list(
        "models",
        "dense,bottleneck_64,fixed_fan_in_32_32k",
        "The systems: flagfiles in sparse_xmc/cli/flags/models.",
    )
    flags.DEFINE_float("seconds", 10, "About how long each part is repeated.")
    flags.DEFINE_bool("here", False, "Measure one system in this process.")


def main():
    """Measure the systems that the flags describe."""
    if unused := unused_flags("mesh"):
        raise app.UsageError(
            f"--models say what is trained, so {', '.join(f'--{n}' for n in unused)} may not"
        )
    values, results = flags.FLAGS, Path(flags.FLAGS.results)
    scales = [scale for scale in SCALES if scale.labels in values.labels]
    if unknown := set(values.labels) - {scale.labels for scale in SCALES}:
        raise app.UsageError(f"--labels must be among {[s.labels for s in SCALES]}, got {sorted(unknown)}")
    if values.mesh is not None:
        for scale in scales:
            run_on_mesh(scale, _ON_MESH, parse_mesh(values.mesh), results)
    elif values.here:
        run_here(scales[0], values.models[0], results, values.seconds)
    elif failures := run_all(scales, values.models, results, values.seconds):
        sys.exit("\n".join(["", *failures, f"{len(failures)} failed"]))


if __name__ == "__main__":
    _define_flags()
    program.start(main)
