import json
import subprocess
import time

import jax.numpy as jnp
import numpy as np

from experiments import environment


def test_description_is_complete_and_ready_for_json():
    description = json.loads(json.dumps(environment.describe()))
    assert {"python", "jax", "numpy"} <= description["versions"].keys()
    assert description["cpu"]
    assert description["threads"] >= 1
    assert description["memory_bytes"] > 0


def test_commit_is_that_of_the_checkout(monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout="abc123\n")
    )
    assert environment.describe()["commit"] == "abc123"


def test_commit_is_unknown_outside_of_git(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.describe()["commit"] == "unknown"


def test_calls_take_turns_after_a_round_that_does_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = environment.interleaved_times(calls, repeats=3)
    assert order == ["a", "b"] * 4
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_slow_calls_leave_early_and_failing_ones_say_why(monkeypatch):
    monkeypatch.setattr(environment, "TIME_BOX_SECONDS", 0.05)

    def fail():
        raise ValueError("no gradient\nand many more lines")

    calls = {
        "fast": lambda: jnp.zeros(1),
        "slow": lambda: time.sleep(0.02),
        "too slow": lambda: time.sleep(0.1),
        "failing": fail,
    }
    times = environment.interleaved_times(calls, repeats=8)
    assert len(times["fast"]) == 8
    assert 1 <= len(times["slow"]) <= 2
    assert len(times["too slow"]) == 1
    assert times["failing"] == "ValueError: no gradient"


def test_peak_memory_is_what_came_and_went_since():
    before = np.ones(400 << 20, np.uint8)  # an earlier, higher peak
    del before
    memory = environment.PeakMemory()
    assert memory.bytes() < 50 << 20
    array = np.ones(200 << 20, np.uint8)
    del array
    assert 195 << 20 < memory.bytes() < 260 << 20
