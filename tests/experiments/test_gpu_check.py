import json
import subprocess
import sys

import pytest

from experiments import gpu_check

JUNIT = """<testsuites><testsuite name="pytest" tests="5">
<testcase classname="tests.one" name="test_good" />
<testcase classname="tests.one" name="test_bad"><failure message="assert 1 == 2">...</failure></testcase>
<testcase classname="tests.two" name="test_broken"><error message="failed on setup">...</error></testcase>
<testcase classname="tests.two" name="test_a"><skipped message="no nvcc">...</skipped></testcase>
<testcase classname="tests.two" name="test_b"><skipped message="no nvcc">...</skipped></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted():
    assert gpu_check.count_tests(JUNIT) == {
        "passed": 1,
        "skipped": {"no nvcc": 2},
        "failed": {
            "tests.one::test_bad": "assert 1 == 2",
            "tests.two::test_broken": "failed on setup",
        },
    }


def test_a_part_that_fails_is_recorded_and_the_rest_go_on():
    def broken():
        raise gpu_check.PartError("no such device")

    saved = []
    parts = {"one": lambda: {"answer": 42}, "two": broken, "three": dict}
    report = gpu_check.check(parts, {"zero": "kept"}, lambda report: saved.append(json.dumps(report)))
    assert list(report) == ["zero", "one", "two", "three"]
    assert report["one"]["result"] == {"answer": 42}
    assert report["two"]["failed"] == "no such device"
    assert report["three"]["result"] == {}
    assert all(report[name]["seconds"] >= 0 for name in parts)
    assert [len(json.loads(s)) for s in saved] == [2, 3, 4]  # after each part


def test_a_command_that_fails_says_how_it_ended():
    script = "import os, sys; print('x' * 10_000 + os.environ['NAME']); sys.exit(3)"
    with pytest.raises(gpu_check.PartError, match=r"status 3\nx+the end\n$") as raised:
        gpu_check.run(sys.executable, "-c", script, NAME="the end")
    assert len(str(raised.value)) < 5000


def test_program_without_a_gpu_records_that(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    path.write_text('{"build": {"result": "of an earlier run"}}')
    command = [sys.executable, "-m", "experiments.gpu_check", f"--json={path}", "--parts=device"]
    # Without nvidia-smi, whatever this machine has.
    finished = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert finished.returncode != 0
    assert "failed: device" in finished.stderr
    report = json.loads(path.read_text())
    assert "nvidia-smi" in report["device"]["failed"]
    assert report["build"] == {"result": "of an earlier run"}


def test_unknown_parts_are_named(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.gpu_check",
        f"--json={tmp_path / 'x'}",
        "--parts=device,luck",
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode != 0
    assert "--parts are device, build, tests, benchmark, words, training, claim; got luck" in (
        finished.stdout + finished.stderr
    )
