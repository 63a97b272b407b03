import json
import math
import subprocess
import sys
import time
import types

import psutil
import pytest

from experiments import gpu_check
from experiments.gpu_check import Part

SUITE = """
import pytest, time
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.fixture
def broken(): raise OSError("no disk")
def test_broken(broken): pass
@pytest.mark.parametrize("n", [1, 2])
def test_skipped(n): pytest.skip("no nvcc")
def test_hangs(): time.sleep(100)
"""


class EndableJob(types.SimpleNamespace):
    """A job without a deadline, until a test calls `end`."""

    quick, deadline = False, math.inf

    def end(self):
        self.deadline = -math.inf


def test_pytest_rows_writes_outcomes_immediately(tmp_path):
    path, rows = tmp_path / "test_suite.py", tmp_path / "rows"
    path.write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "experiments.measure.pytest_rows", f"--rows={rows}"]
    command += ["-n=1", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(path)]
    seen = []

    def poll():
        seen.append(gpu_check.count_tests(rows.read_text() if rows.exists() else ""))
        if sum(seen[-1]["skipped"].values()) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu_check.run(EndableJob(), *command, poll=poll)
    assert seen[-1].pop("seconds") >= 0
    assert seen[-1] == {
        "passed": 1,
        "skipped": {"no nvcc": 2},
        "failed": {
            "test_suite.py::test_bad": "assert 1 == 2",
            "test_suite.py::test_broken": "OSError: no disk",
        },
    }


def test_count_tests_ignores_incomplete_line():
    line = json.dumps({"test": "a", "outcome": "passed", "seconds": 1.5})
    assert gpu_check.count_tests(f"{line}\n{line}\n{line[:9]}")["passed"] == 2


def test_check_records_failures_and_continues():
    def broken(job):
        job.record({"rows": [1]})
        raise gpu_check.PartError("no such device")

    def wrong(job):
        raise KeyError("driver")

    saved = []
    runs = {"one": lambda job: {"answer": 42}, "two": broken, "three": wrong, "four": lambda job: {}}
    parts = {name: Part(run, 10) for name, run in runs.items()}
    report = gpu_check.check(parts, {"zero": "kept"}, lambda report: saved.append(json.dumps(report)))
    assert list(report) == ["zero", "one", "two", "three", "four"]
    assert report["one"]["result"] == {"answer": 42}
    assert report["two"] == {"failed": "no such device", "result": {"rows": [1]}} | report["two"]
    assert report["three"]["failed"] == "KeyError('driver')"
    assert report["four"]["result"] == {}
    assert "failed" not in report["four"]
    assert all(report[name]["seconds"] >= 0 for name in parts)
    # While a part runs, the report has its partial results, and marks it as not finished.
    during = [json.loads(text) for text in saved]
    assert {"failed": "was not finished", "result": {"rows": [1]}} in [
        {k: v for k, v in report.get("two", {}).items() if k != "seconds"} for report in during
    ]


def test_check_uses_time_limits_of_quick():
    jobs = {}
    parts = {"both": Part(lambda job: jobs.update(both=job) or {}, 1000, 10)}
    for quick, seconds in ((True, 10), (False, 1000)):
        gpu_check.check(parts, {}, lambda report: None, quick=quick)
        assert jobs["both"].quick is quick
        assert seconds - 5 < jobs["both"].deadline - time.monotonic() <= seconds
    assert sum(part.quick_seconds or 0 for part in gpu_check.PARTS.values()) <= 8 * 60 - 10
    assert all((gpu_check.ROOT / path).exists() for path in gpu_check.OPS_TESTS)


def test_run_error_has_status_and_end_of_output():
    script = "import os, sys; print('x' * 10_000 + os.environ['NAME']); sys.exit(3)"
    with pytest.raises(gpu_check.PartError, match=r"status 3\nx+the end\n$") as raised:
        gpu_check.run(EndableJob(), sys.executable, "-c", script, env={"NAME": "the end"})
    assert len(str(raised.value)) < 5000


def test_run_kills_child_processes_at_deadline(tmp_path):
    script = f"""
import pathlib, subprocess, sys, time
print("started", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(100)
"""
    job, child = EndableJob(), tmp_path / "child"

    def poll():
        if child.exists() and child.read_text():
            job.end()

    with pytest.raises(gpu_check.OutOfTimeError, match="stopped at its deadline\nstarted"):
        gpu_check.run(job, sys.executable, "-c", script, poll=poll)
    process = psutil.Process(int(child.read_text())) if psutil.pid_exists(int(child.read_text())) else None
    assert process is None or process.wait(timeout=60) is None  # The process may still be ending.


def test_run_module_keeps_partial_results(monkeypatch):
    # The module writes an incomplete file first.
    module = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[1].removeprefix("--json="))
path.write_text('{"rows": [')
time.sleep(1.5)
path.write_text(json.dumps({"rows": [1, 2]}))
time.sleep(100)
"""
    found, run = [], gpu_check.run

    def record(rows):
        found.append(rows)
        job.end()

    job = EndableJob(record=record)

    def run_script(job, python, dash_m, name, path, **options):
        assert (dash_m, name) == ("-m", "experiments.some")
        return run(job, python, "-c", module, path, **options)

    monkeypatch.setattr(gpu_check, "run", run_script)
    with pytest.raises(gpu_check.OutOfTimeError):
        gpu_check.run_module(job, "some")
    assert found == [{"rows": [1, 2]}]


def test_program_records_missing_gpu(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"build": {"result": "of an earlier run"}}')
    command = [sys.executable, "-m", "experiments.gpu_check", f"--json={path}", "--parts=device,claim"]
    # PATH does not contain nvidia-smi, even if this machine has it.
    finished = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert finished.returncode != 0
    assert "failed: device, claim" in finished.stderr
    report = json.loads(path.read_text())
    assert "nvidia-smi" in report["device"]["failed"]
    assert "nvidia-smi" in report["claim"]["failed"]
    assert report["build"] == {"result": "of an earlier run"}
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


def test_program_rejects_unknown_parts(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.gpu_check",
        f"--json={tmp_path / 'x'}",
        "--parts=device,luck",
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode != 0
    assert "--parts must be among device, build, tests, claim, benchmark, words, training; got luck" in (
        finished.stdout + finished.stderr
    )
