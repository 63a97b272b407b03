r"""Builds, tests and measures everything on a machine with an NVIDIA GPU, and writes what it found as JSON.

    python -m experiments.gpu_check --json=gpu.json

From the root of a clone, with nvcc, jax[cuda12] or jax[cuda13], and the packages that pyproject.toml names
(for building too); without network. The parts run one after the other, each in processes of its own, so that
one that fails is recorded and the rest go on:

  device    what it runs on: GPU, driver, CUDA, jax, commit
  build     the native modules, CUDA's among them
  tests     the whole test suite, on the GPU
  benchmark the ops at the size of Amazon-670K (see `experiments.measure.gpu_ops`)
  words     the same with words among the inputs (see `experiments.measure.direct_inputs`)
  training  two epochs of experiments/flags/quickstart.cfg
  claim     training steps of the paper's model in 4 GiB (see `experiments.measure.gpu_claim`)

`--parts=build,tests` runs some of them; results that are already in the file stay.
"""

import collections
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from . import program

ROOT = Path(__file__).parents[1]
CLAIM_BYTES = 4 << 30
_TAIL_CHARACTERS = 4000


class PartError(Exception):
    """A part of the check failed; the message is the end of what it printed."""


def run(*command: str, **env: str) -> str:
    """Runs a command from the root of the repository and returns what it printed; raises PartError."""
    finished = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if finished.returncode != 0:
        raise PartError(
            f"{' '.join(command)}: status {finished.returncode}\n{finished.stdout[-_TAIL_CHARACTERS:]}"
        )
    return finished.stdout


def run_module(name: str, *arguments: str, **env: str) -> dict:
    """Runs `python -m experiments.NAME --json=FILE` and returns the JSON."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        run(sys.executable, "-m", f"{__package__}.{name}", f"--json={path}", *arguments, **env)
        return json.loads(path.read_text())


# ---- parts ----


def device() -> dict:
    """The GPU, its driver, and what JAX says of it. Raises PartError unless JAX computes on it."""
    fields = ("name", "driver_version", "memory.total", "compute_cap")
    values = run("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    script = (
        "import json, jax; from experiments.measure import environment; "
        "assert jax.default_backend() == 'gpu', 'jax computes on: ' + jax.default_backend(); "
        "print(json.dumps({'runtime': jax.devices()[0].client.platform_version, **environment.describe()}))"
    )
    described = json.loads(run(sys.executable, "-c", script).splitlines()[-1])
    gpu = dict(zip(fields, values.splitlines()[0].split(", "), strict=True))
    plugins = {
        d.name: d.version
        for d in importlib.metadata.distributions()
        if d.name.startswith(("jax-cuda", "nvidia-"))
    }
    return {**gpu, **described, "packages": plugins, "nvcc": run("nvcc", "--version").splitlines()[-2:]}


def build() -> dict:
    """Builds both modules in place."""
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force", XLA_OPS_CUDA="on")
    return {"resources": (ROOT / "xla_ops" / "_cuda_resources.txt").read_text()}


def tests() -> dict:
    """Runs the test suite; failures are a result, not an error."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "junit.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={path}"]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not path.exists():
            raise PartError((finished.stdout + finished.stderr)[-_TAIL_CHARACTERS:])
        return count_tests(path.read_text())


def count_tests(junit: str) -> dict:
    """From pytest's XML: how many passed, were skipped (by reason) and failed (with the message)."""
    passed = 0
    skipped: collections.Counter[str] = collections.Counter()
    failed: dict[str, str] = {}
    for case in xml.etree.ElementTree.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = next((c for c in case if c.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if problem is not None:
            failed[name] = problem.get("message", "")[:400]
        elif skip is not None:
            skipped[skip.get("message", "")] += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": dict(skipped), "failed": failed}


def benchmark() -> dict:
    """Times the ops."""
    return run_module("measure.gpu_ops")


def words() -> dict:
    """Times steps and top k of labels that read words beside units."""
    return run_module("benchmark", "--op=direct_inputs")


def training() -> dict:
    """Trains on the shipped data set, for two epochs of 192 steps."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [
            "--flagfile=experiments/flags/quickstart.cfg",
            "--epochs=2",
            f"--workdir={directory}/run",
        ]
        run(sys.executable, "-m", f"{__package__}.run", *arguments)
        return json.loads((Path(directory) / "run" / "result.json").read_text())


def claim() -> dict:
    """Trains at the size of the paper's experiment, with the allocator held to CLAIM_BYTES."""
    total = run("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits").splitlines()[0]
    fraction = CLAIM_BYTES / (float(total) * 2**20)
    return run_module("measure.gpu_claim", XLA_PYTHON_CLIENT_MEM_FRACTION=f"{fraction:.6f}")


PARTS = {f.__name__: f for f in (device, build, tests, benchmark, words, training, claim)}


def check(parts: dict[str, Callable[[], dict]], report: dict, save: Callable[[dict], object]) -> dict:
    """Runs parts and enters what they return, or how they failed, into the report; saves it after each."""
    for name, part in parts.items():
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        outcome: dict[str, Any]
        try:
            outcome = {"result": part()}
        except (PartError, OSError) as error:
            outcome = {"failed": str(error)}
        report[name] = {"seconds": round(time.monotonic() - start, 1), **outcome}
        save(report)
        print(
            f"{name}: {'FAILED' if 'failed' in outcome else 'done'} in {report[name]['seconds']} s",
            flush=True,
        )
    return report


def _define_flags() -> None:
    flags.DEFINE_string("json", None, "File to write to, and to go on with.", required=True)
    flags.DEFINE_list("parts", list(PARTS), "Parts to run.")


def main() -> None:
    """Runs the parts, and exits with an error if one failed."""
    if unknown := set(flags.FLAGS.parts) - set(PARTS):
        raise app.UsageError(f"--parts are {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    path = Path(flags.FLAGS.json)
    report = json.loads(path.read_text()) if path.exists() else {}
    parts = {name: PARTS[name] for name in flags.FLAGS.parts}
    check(parts, report, lambda report: path.write_text(json.dumps(report, indent=2) + "\n"))
    failed = [name for name in parts if "failed" in report[name]]
    failed += ["tests"] if report.get("tests", {}).get("result", {}).get("failed") else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {path}")


if __name__ == "__main__":
    _define_flags()
    program.start(main)
