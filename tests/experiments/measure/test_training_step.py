"""Tests of the time and memory of training steps, at small sizes."""

import itertools
import json
import subprocess
import sys

import jax
import pytest

from experiments.measure import clock, step_memory, steps
from experiments.measure.step_memory import measure_memory, memory_line, memory_record
from experiments.measure.workloads import MODES, Network

TINY = Network("tiny", 1000, 4, 256, 1.0, features=96)

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("mode", MODES)
def test_memory_record_counts_state_and_loss_decreases(mode):
    record = memory_record(TINY, mode, steps=200)
    weights, dense = 1000 * 4, 96 * 256
    value, moments = {"adam": (4, 2 * 4), "lean": (2, 0)}[mode]
    expected = weights * (2 + value + moments) + dense * (4 + {"adam": 8, "lean": 4}[mode])
    assert expected <= record["state_bytes"] < 1.1 * expected + 20_000
    assert record["bytes"] == sum(record[f"{p}_bytes"] for p in ("state", "temporary", "scratch"))
    if jax.default_backend() == "cpu":  # On a GPU, scratch memory is part of XLA's temporaries.
        assert record["scratch_bytes"] >= 4 * 33 * 256
    assert record["last_loss"] < 0.95 * record["first_loss"]
    line = memory_line({**TINY._asdict(), "mode": mode, **json.loads(json.dumps(record))})
    assert "paper 1.00 GB" in line


def test_measure_memory_reports_failure(monkeypatch):
    monkeypatch.setattr(step_memory.sys, "executable", "/bin/false")
    (record,) = measure_memory([TINY], ["adam"], steps=1)
    assert record["failed"] == "killed"
    assert memory_line(record).endswith("failed: killed")


@pytest.mark.parametrize("mode", MODES)
def test_measure_time_reports_parts_and_floors(mode, monkeypatch):
    monkeypatch.setattr(clock, "copy_gb_per_second", lambda: 1e-3)
    report = steps.measure_time(TINY, mode, repeats=2, now=itertools.count().__next__)
    assert report["gemm_gflops"] == pytest.approx(2 * 2048**3 / 1e9)  # Each call takes one second.
    weights, dense, products = 1000 * 4, 96 * 256, 32 * 96 * 256 / 2048**3
    # Bytes per weight: weights and moments are read and written; SGD writes only weights with a gradient.
    # An index has 2 bytes.
    updates = {"adam": (24, 24, 24), "lean": (4, 2, 16)}[mode]
    for density, gathers, update in (("density 1", 3, updates[0]), ("density near 0", 1, updates[1])):
        part = report[density]
        assert set(part["seconds"]) == {*part["floor_seconds"], "gather", "step"}
        assert set(part["seconds"].values()) == {1.0}
        assert part["floor_seconds"] == pytest.approx(
            {
                "penultimate forward": products + 4 * dense / 1e6,
                "output layer": gathers + (update + 2) * weights / 1e6,
                "penultimate update": products + updates[2] * dense / 1e6,
            }
        )
        assert part["step_over_floors"] == pytest.approx(1 / sum(part["floor_seconds"].values()))
    assert len(steps.time_lines(TINY, mode, report)) == 3


def test_program_uses_sizes_from_flags(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "experiments.benchmark", "--op=training_step", "--mode=lean"]
    command += ["--labels=1000", "--features=32", "--fan_in=4", "--penultimate=64"]
    command += ["--repeats=1", "--steps=3", f"--json={path}"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "as given, 1,000 labels, fan-in 4, 64 penultimate, lean" in printed
    report = json.loads(path.read_text())
    assert report["time"].keys() == {"lean"}
    (record,) = report["memory"]
    sizes = {name: record[name] for name in ("labels", "features", "fan_in", "penultimate", "mode")}
    assert sizes == {"labels": 1000, "features": 32, "fan_in": 4, "penultimate": 64, "mode": "lean"}
    assert record["bytes"] > 0
    assert record["steps"] == 3
