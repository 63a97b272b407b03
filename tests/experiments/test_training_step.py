"""The report on training steps, at a size where it takes moments."""

import json

import jax
import numpy as np
import pytest

from experiments import training_step
from experiments.training_step import MODES, Shape, batches, memory_cell, memory_line, time_lines

TINY = Shape("tiny", 500, 4, 256, 1.0)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a float to an integer power, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("mode", MODES)
def test_memory_counts_the_state_and_the_loss_falls(mode):
    record = memory_cell(TINY, mode, steps=60)
    weights, dense = 500 * 4, 768 * 256
    value, moments = {"adam": (4, 2 * 4), "lean": (2, 0)}[mode]
    expected = weights * (2 + value + moments) + dense * (4 + {"adam": 8, "lean": 4}[mode])
    assert expected <= record["state_bytes"] < 1.1 * expected + 20_000
    assert record["bytes"] == sum(record[f"{p}_bytes"] for p in ("state", "temporary", "scratch"))
    assert record["scratch_bytes"] >= 4 * 33 * 256
    assert record["last_loss"] < 0.9 * record["first_loss"]
    line = memory_line({**TINY._asdict(), "mode": mode, **json.loads(json.dumps(record))})
    assert "paper 1.00 GB" in line


def test_a_cell_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(training_step, "SHAPES", [Shape("broken", 10, 999, 8, None)])
    monkeypatch.setattr(training_step, "MODES", {"adam": MODES["adam"]})
    monkeypatch.setattr(training_step.sys, "executable", "/bin/false")
    (record,) = training_step.measure_memory(steps=1)
    assert "failed" in record
    assert "failed" in memory_line(record)


@pytest.mark.parametrize("mode", MODES)
def test_time_has_every_part_beside_its_floor(mode, monkeypatch):
    monkeypatch.setattr(training_step.environment, "copy_gb_per_second", lambda: 10.0)
    report = training_step.measure_time(TINY, mode, repeats=2)
    for density in ("density 1", "density near 0"):
        part = report[density]
        assert set(part["floor_seconds"]) < set(part["seconds"])
        assert all(seconds > 0 for seconds in part["seconds"].values())
        floors = sum(part["floor_seconds"].values())
        assert part["step_over_floors"] == pytest.approx(part["seconds"]["step"] / floors)
    assert len(time_lines(TINY, mode, report)) == 3


def test_batches_repeat_and_have_distinct_points():
    first, again = (next(batches(1000, seed=3)) for _ in range(2))
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.positives, again.positives)
    assert first.inputs.shape == (32, 768)
    assert first.positives.max() < 1000
    assert len(np.unique(first.inputs, axis=0)) == 32
