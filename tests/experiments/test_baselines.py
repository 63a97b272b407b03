"""Tests of `experiments.baselines` that do not need the baselines' packages."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from experiments import baselines

RESULT = {
    "name": "ours",
    "test": {"p@1": 0.51234, "p@3": 0.3, "p@5": 0.2},
    "train_seconds": 12.34,
    "model_bytes": 5_600_000,
    "peak_memory_bytes": 123_400_000,
}


def test_markdown_table_of_complete_result():
    assert baselines.markdown_table([RESULT]).splitlines() == [
        "| Model | P@1 | P@3 | P@5 | Training, s | Model, MB | Peak memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| ours | 51.23 | 30.00 | 20.00 | 12.3 | 5.6 | 123 |",
    ]


@pytest.mark.parametrize("missing", RESULT)
def test_markdown_table_has_dash_for_missing_value(missing):
    row = baselines.markdown_table([{key: value for key, value in RESULT.items() if key != missing}])
    full = baselines.markdown_table([RESULT])
    cells, full_cells = row.splitlines()[-1].split("|"), full.splitlines()[-1].split("|")
    changed = [new.strip() for new, old in zip(cells, full_cells, strict=True) if new != old]
    assert changed == ["-"] * (3 if missing == "test" else 1)


def test_require_baselines_names_missing_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"omikuji and napkinxc not installed; run: pip install '\.\[baselines\]'"
    ):
        baselines.require_baselines()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_measure_pads_rankings_and_reports_model_size(monkeypatch):
    def fake_baseline(data_file, model_dir):
        (Path(model_dir) / "weights").write_bytes(bytes(Path(data_file).stat().st_size))
        block = np.ones(8_000_000)
        return lambda features: [[3, 1, 2, 4, 0], [int(block[0])], []]

    monkeypatch.setattr(baselines, "_PACKAGES", ())
    monkeypatch.setitem(baselines.BASELINES, "fake", fake_baseline)
    row, top_labels = baselines.measure("fake", __file__, csr_array((3, 7)))
    assert row.keys() == RESULT.keys() - {"test"}
    assert row["name"] == "fake"
    assert row["model_bytes"] == Path(__file__).stat().st_size
    assert 0.9 * 64e6 < row["peak_memory_bytes"] < 1e11
    assert row["train_seconds"] > 0
    assert top_labels.tolist() == [[3, 1, 2, 4, 0], [1, -1, -1, -1, -1], [-1] * 5]
