r"""Build, test and measure the library on a machine with an NVIDIA GPU, and write the results as JSON.

    python -m experiments.gpu_check --json=gpu.json --quick
    python -m experiments.gpu_check --json=gpu.json
    python -m experiments.gpu_check --json=gpu.json --parts=benchmark,claim

Run it from the root of a clone, with nvcc, jax[cuda12] or jax[cuda13], and the packages in pyproject.toml
(including the build requirements) installed. It installs nothing, and needs no network. The parts run one
after the other, each in processes of its own, with a limit in minutes:

  device     1    description of the machine: GPU, driver, CUDA, jax, commit
  build      10   the native modules, with CUDA for this device only
  tests      40   the whole test suite, on the GPU
  claim      5    training steps of the paper's model in 4 GiB (see `experiments.measure.gpu_claim`)
  benchmark  25   the ops at the size of Amazon-670K (see `experiments.measure.gpu_ops`)
  words      10   training steps and ranking with words as direct inputs (`measure.direct_inputs`)
  training   10   two epochs of experiments/flags/quickstart.cfg

A part that fails or exceeds its limit is recorded as failed, and the other parts still run. Partial results,
such as each test and each row of a benchmark, are written to the file immediately. Results of other parts
that are in the file already are kept.

--quick runs the first five parts within 8 minutes: only the tests of the ops, and one row of the benchmark
per kernel.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from absl import app, flags

from sparse_xmc.cli import program

ROOT = Path(__file__).parents[1]
CLAIM_BYTES = 4 << 30
_TAIL_CHARACTERS = 4000
_POLL_SECONDS = 0.5  # interval between two reads of the partial results of a process

# The tests of the ops, which need a device.
OPS_TESTS = [
    f"tests/xla_ops/test_{name}.py"
    for name in (
        "transformations",
        "fan_in_matmul",
        "fan_in_loss",
        "fan_in_step",
        "fan_in_top_k",
        "dense_step",
        "kth_smallest",
        "sparse_inputs",
        "cuda_workspace",
    )
]


class PartError(Exception):
    """The exception raised if a part of the check fails; the message is the end of its output."""


class OutOfTimeError(PartError):
    """The exception raised if a part was stopped at its deadline."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A running part of the check.

    Attributes:
      quick: whether to run the short version.
      deadline: time at which the part is stopped, by `time.monotonic`.
      record: function that records the results so far.
    """

    quick: bool
    deadline: float
    record: Callable[[dict], None]


def run(
    job: Job,
    *command: str,
    poll: Callable[[], None] = lambda: None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a command from the root of the repository and return its output.

    The command and all its child processes are killed at the job's deadline.

    Args:
      job: the running part.
      command: program and arguments.
      poll: function that is called at intervals while the command runs.
      env: additional environment variables.

    Raises:
      PartError: the command failed; OutOfTimeError if it was killed at the deadline.
    """
    with tempfile.TemporaryFile("w+") as output, _running(command, env, output) as process:
        while process.poll() is None:
            left = job.deadline - time.monotonic()
            if left <= 0:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(left, _POLL_SECONDS))
            poll()
        output.seek(0)
        text, status = output.read(), process.poll()
        if status == 0:
            return text
        kind = OutOfTimeError if status is None else PartError
        reason = "stopped at its deadline" if status is None else f"status {status}"
        raise kind(f"{' '.join(command)}: {reason}\n{text[-_TAIL_CHARACTERS:]}")


@contextlib.contextmanager
def _running(
    command: Sequence[str], env: Mapping[str, str] | None, output: IO[str]
) -> Iterator[subprocess.Popen]:
    """Start a process, and kill it and all its child processes at the end in any case."""
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    except OSError as error:
        raise PartError(f"{' '.join(command)}: {error}") from error
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_module(job: Job, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> dict:
    """Run `python -m experiments.NAME --json=FILE`, record partial results, and return the final one."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"

        def poll():
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # missing or incomplete
                job.record(json.loads(path.read_text()))

        command = (sys.executable, "-m", f"experiments.{name}", f"--json={path}", *arguments)
        run(job, *command, poll=poll, env=env)
        return json.loads(path.read_text())


# ---- parts ----


def device(job: Job) -> dict:
    """Describe the GPU, its driver and JAX. Raises PartError unless JAX computes on the GPU."""
    fields = ("name", "driver_version", "memory.total", "compute_cap")
    values = run(job, "nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    script = (
        "import json, jax; from sparse_xmc.cli import environment; "
        "assert jax.default_backend() == 'gpu', 'jax computes on: ' + jax.default_backend(); "
        "print(json.dumps({'runtime': jax.devices()[0].client.platform_version, **environment.describe()}))"
    )
    described = json.loads(run(job, sys.executable, "-c", script).splitlines()[-1])
    gpu = dict(zip(fields, values.splitlines()[0].split(", "), strict=True))
    plugins = {
        d.name: d.version
        for d in importlib.metadata.distributions()
        if d.name.startswith(("jax-cuda", "nvidia-"))
    }
    return {**gpu, **described, "packages": plugins, "nvcc": run(job, "nvcc", "--version").splitlines()[-2:]}


def build(job: Job) -> dict:
    """Build the missing native modules in place for this device."""
    query = run(job, "nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader,nounits")
    env = {"XLA_OPS_CUDA": "on", "XLA_OPS_CUDA_ARCHITECTURES": query.splitlines()[0].replace(".", "")}
    run(job, sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--parallel=2", env=env)
    return {"resources": (ROOT / "xla_ops" / "_cuda_resources.txt").read_text()}


def tests(job: Job) -> dict:
    """Run the test suite; failures are a result, not an error."""
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows"
        # Newer packages may give warnings that the suite does not know; they must not count as failures.
        options = ["-p", "experiments.measure.pytest_rows", f"--rows={rows}", "-W", "default"]
        options += [
            f"-n={min(8, os.cpu_count() or 1)}",
            "--dist=worksteal",
            *(OPS_TESTS if job.quick else []),
        ]

        def counts() -> dict:
            return count_tests(rows.read_text() if rows.exists() else "")

        try:
            run(job, sys.executable, "-m", "pytest", *options, poll=lambda: job.record(counts()))
        except PartError as error:
            job.record(counts())
            if isinstance(error, OutOfTimeError) or not counts()["failed"]:
                raise
        return counts()


def count_tests(rows: str) -> dict:
    """Count tests in the lines of `pytest_rows`: passed, skipped (by reason) and failed (with messages)."""
    passed, seconds = 0, 0.0
    skipped: collections.Counter[str] = collections.Counter()
    failed: dict[str, str] = {}
    for line in rows.splitlines(keepends=True):
        if not line.endswith("\n"):  # The line is still being written.
            break
        row = json.loads(line)
        seconds += row["seconds"]
        if row["outcome"] == "failed":
            failed[row["test"]] = row["why"]
        elif row["outcome"] == "skipped":
            skipped[row["why"]] += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": dict(skipped), "failed": failed, "seconds": round(seconds, 1)}


def claim(job: Job) -> dict:
    """Train at the size of the paper's experiment, with the allocator limited to CLAIM_BYTES."""
    query = run(job, "nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    fraction = CLAIM_BYTES / (float(query.splitlines()[0]) * 2**20)
    steps = ["--steps=50"] if job.quick else []
    return run_module(
        job, "measure.gpu_claim", *steps, env={"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.6f}"}
    )


def benchmark(job: Job) -> dict:
    """Time the ops."""
    return run_module(job, "measure.gpu_ops", *(["--quick"] if job.quick else []))


def words(job: Job) -> dict:
    """Time training steps and ranking for labels with words as direct inputs."""
    return run_module(job, "benchmark", "--op=direct_inputs")


def training(job: Job) -> dict:
    """Train on the shipped data set, for two epochs of 192 steps."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [
            "--flagfile=experiments/flags/quickstart.cfg",
            "--epochs=2",
            f"--workdir={directory}/run",
        ]
        run(job, sys.executable, "-m", "experiments.run", *arguments)
        return json.loads((Path(directory) / "run" / "result.json").read_text())


class Part(NamedTuple):
    """A part of the check.

    Attributes:
      run: function that runs the part and returns its results.
      seconds: time limit in seconds.
      quick_seconds: time limit in seconds with --quick; None if --quick omits the part.
    """

    run: Callable[[Job], dict]
    seconds: float
    quick_seconds: float | None = None


PARTS = {
    "device": Part(device, 60, 40),
    "build": Part(build, 600, 170),
    "tests": Part(tests, 2400, 110),
    "claim": Part(claim, 300, 60),
    "benchmark": Part(benchmark, 1500, 90),
    "words": Part(words, 600),
    "training": Part(training, 600),
}


def check(
    parts: Mapping[str, Part], report: dict, save: Callable[[dict], object], *, quick: bool = False
) -> dict:
    """Run parts and record their results or failures in a report.

    Args:
      parts: the parts by name.
      report: the report to add to.
      save: function that saves the report; called after every change.
      quick: whether to run the short versions.

    Returns:
      The report.
    """
    for name, part in parts.items():
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        seconds = part.quick_seconds if quick and part.quick_seconds is not None else part.seconds
        outcome: dict[str, Any] = {"failed": "was not finished"}
        report[name] = outcome

        def record(found: dict, outcome: dict = outcome, start: float = start) -> None:
            if found != outcome.get("result"):
                outcome["result"] = found
                outcome["seconds"] = round(time.monotonic() - start, 1)
                save(report)

        save(report)
        try:
            outcome["result"] = part.run(Job(quick, start + seconds, record))
            del outcome["failed"]
        except Exception as error:  # The other parts must run after any failure.
            outcome["failed"] = str(error) if isinstance(error, PartError) else repr(error)
        outcome["seconds"] = round(time.monotonic() - start, 1)
        save(report)
        status = "FAILED" if "failed" in outcome else "done"
        print(f"{name}: {status} in {outcome['seconds']} s", flush=True)
    return report


def _define_flags() -> None:
    flags.DEFINE_string(
        "json",
        None,
        "File to write the report to, as JSON; results of other parts in it are kept.",
        required=True,
    )
    flags.DEFINE_list("parts", None, "Parts to run; by default, all parts, or all that --quick includes.")
    flags.DEFINE_bool("quick", False, "Run short versions of the parts, within 8 minutes.")


def main() -> None:
    """Run the parts, and exit with an error if one failed."""
    values = flags.FLAGS
    default_names = [
        name for name, part in PARTS.items() if not values.quick or part.quick_seconds is not None
    ]
    names = default_names if values.parts is None else values.parts
    if unknown := set(names) - set(PARTS):
        raise app.UsageError(f"--parts must be among {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    path = Path(values.json)
    report = json.loads(path.read_text()) if path.exists() else {}

    def save(report: dict) -> None:  # replaces the file atomically
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        temporary.replace(path)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that child processes are killed
    check({name: PARTS[name] for name in names}, report, save, quick=values.quick)
    failed = [name for name in names if "failed" in report[name]]
    failed += ["tests"] if report.get("tests", {}).get("result", {}).get("failed") else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {path}")


if __name__ == "__main__":
    _define_flags()
    program.start(main)
