"""Tests of `experiments.defaults` on a tiny data set."""

import json
import subprocess
import sys
from pathlib import Path

import experiments
from sparse_xmc.data import write_tsv

ROOT = Path(experiments.__file__).parents[1]


def test_program_evaluates_defaults(tmp_path):
    words = ["apple", "brook", "cloud", "dune"]
    for name, repeats in (("train", 10), ("test", 2)):
        pairs = [(a, b) for a in words for b in words if a < b] * repeats
        write_tsv(
            tmp_path / f"{name}.tsv",
            [[a.upper(), b.upper()] for a, b in pairs],
            [f"{a} {b}" for a, b in pairs],
        )
    command = [sys.executable, "-m", "experiments.defaults", f"--json={tmp_path / 'out' / 'report.json'}"]
    command += [f"--{name}={tmp_path / name}.tsv" for name in ("train", "test")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["test"]["p@1"] == 1
    assert (report["points"], report["labels"]) == (60, 4)
    assert report["epochs"] == 100
    assert "test P@1/3/5 100.00/66.67/40.00, fitted in " in printed
