"""Tests of `experiments.label_scale` with 1,000 labels, and of its tables and figure."""

import csv
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments import figures, tables
from experiments.measure import scale
from experiments.measure.workloads import SCALES, Scale
from sparse_xmc import planning

ROOT = Path(experiments.__file__).parents[1]
SMALL = Scale("small", 1000, 2.0, 3200)


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("model", ["dense", "bottleneck_64", "fixed_fan_in_32", "unstructured_32"])
def test_measure_reports_memory_times_and_densities(model):
    report = json.loads(json.dumps(scale.measure(SMALL, model, seconds=2, now=itertools.count().__next__)))
    assert report["scale"]["labels"] == 1000
    assert report["peak_memory_bytes"] > 0
    assert report["peak_memory_measured_as"].startswith("peak resident size")
    assert report["seconds"].keys() == set(tables._PARTS)
    assert set(report["seconds"].values()) == {1.0}
    assert report["seconds_quartiles"] == {part: [1.0, 1.0, 1.0] for part in tables._PARTS}
    assert report["gradient_density"]["step, all gradients"] > 0.99
    assert report["gradient_density"]["step"] < 0.2
    steps = 3200 / 32
    assert report["epoch_seconds"] == pytest.approx(steps * (1 + 1 / 1000))


def test_measure_skips_models_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(planning, "_available", lambda mesh: (1 << 20, "a small machine"))
    monkeypatch.setattr(scale, "make_trainer", None)
    report = scale.measure(SMALL, "dense", seconds=0.01)
    assert report["failed"] == "does not fit: needs 0.1 GiB, of which 0.0 are available"
    assert "seconds" not in report


def test_run_all_skips_existing_results(tmp_path, capsys):
    (tmp_path / "dense_10000.json").write_text("{}")
    smallest = SCALES[0]
    failures = scale.run_all([smallest], ["dense", "fixed_fan_in_32", "nonsense"], tmp_path, seconds=0.01)
    printed = capsys.readouterr().out
    assert "10,000 labels, dense: " in printed
    assert "dense_10000.json already exists" in printed
    assert re.search(r"10,000 labels, fixed_fan_in_32: \d\.\d\d GiB, \d+ ms per step", printed)
    assert len(failures) == 1
    assert "nonsense" in failures[0]
    assert {path.name for path in tmp_path.iterdir()} == {"dense_10000.json", "fixed_fan_in_32_10000.json"}
    assert json.loads((tmp_path / "fixed_fan_in_32_10000.json").read_text())["scale"]["labels"] == 10_000


def test_program_rejects_unknown_number_of_labels(tmp_path):
    command = [sys.executable, "-m", "experiments.label_scale", f"--results={tmp_path}", "--labels=77"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode != 0
    assert "--labels must be among [10000, 30938," in finished.stdout + finished.stderr


def make_report(labels, model, gib):
    return {
        "scale": {"name": "x", "labels": labels, "labels_per_point": 5.0, "points": 3200},
        "model": model,
        "peak_memory_bytes": int(gib * 2**30),
        "peak_memory_measured_as": "peak",
        "seconds": dict.fromkeys(tables._PARTS, 0.5),
        "seconds_quartiles": {part: [0.4, 0.5, 0.7] for part in tables._PARTS},
        "epoch_seconds": 90.0,
        "environment": {
            "cpu": "a processor",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 1 << 30,
            "device": "cpu",
            "versions": {},
            "commit": "abc",
        },
    }


def test_tables_program_renders_measured_and_failed_results(tmp_path):
    failed = {"scale": {"labels": 10**6}, "model": "dense", "failed": "does not fit"}
    reports = [make_report(10**6, "fixed_fan_in_32", 1.5), make_report(10**4, "dense", 0.25), failed]
    for i, report in enumerate(reports):
        (tmp_path / f"{i}.json").write_text(json.dumps(report))
    command = [sys.executable, "-m", "experiments.tables"]
    command += [f"--label_scale={tmp_path}", f"--out={tmp_path / 'out'}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    times = " | ".join(["500.0"] * len(tables._PARTS))
    rows = [line for line in printed.splitlines() if line.startswith("| 1")]
    assert rows[0] == f"| 10,000 | dense | 0.25 | {times} | 1.5 |"
    assert rows[1].startswith("| 1,000,000 | dense | does not fit |")
    assert rows[2] == f"| 1,000,000 | fixed fan-in 32 | 1.50 | {times} | 1.5 |"
    assert "- a processor" in printed
    assert "Runs by commit: 2 at abc." in printed
    with open(tmp_path / "out" / "label_scale.csv", newline="") as file:
        assert {len(line) for line in csv.reader(file)} == {len(tables._PARTS) + 4}
    assert (tmp_path / "out" / "label_scale.png").exists()


def test_draw_label_scale_includes_memory_from_paper():
    figure = figures.draw_label_scale([make_report(10**4, "dense", 0.25)])
    memory = figure.axes[0]
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in memory.lines if len(line.get_xdata())}
    assert {(10**4, 0.25), (670_091, 13.43), (2_812_281, 56.36)} <= points
    assert (670_091, 6.27) not in points  # unstructured
    np.testing.assert_array_equal(memory.lines[-1].get_ydata(), [4, 4])
    assert [text.get_text() for text in memory.texts] == ["4 GiB"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["dense: each label reads all 768 features", "paper, GPU memory"]


def test_draw_label_scale_error_bars_are_quartiles():
    reports = [make_report(labels, "dense", 1) for labels in (10**4, 10**5)]
    line, caps, _ = figures.draw_label_scale(reports).axes[1].containers[0]
    np.testing.assert_array_equal(line.get_ydata(), [0.5, 0.5])
    for cap, expected in zip(caps, (0.4, 0.7), strict=True):
        assert list(cap.get_ydata()) == pytest.approx([expected, expected])


def test_read_label_scale_raises_without_results(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        tables.read_label_scale(tmp_path)
