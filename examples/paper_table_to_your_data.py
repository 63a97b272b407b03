"""From a row of the paper's table to your own data: `python examples/paper_table_to_your_data.py`.

A row of a table is flagfiles: settings, data and a model, such as fixed fan-in 32 behind 32,768 units. The
row on your own data is the same with other files of points: TSV, a line a point, its labels separated by `|`,
a tab, its text. This runs the paper's row, and this project's settings for short texts, on a small set that
it writes, and on yours with `--train=train.tsv --test=test.tsv --workdir=runs/mine`. It is for a clone of the
repository.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from sparse_xmc import XMCClassifier
from sparse_xmc.data import write_tsv

ROOT = Path(__file__).parents[1]
# Flagfiles by name, of sparse_xmc/cli/flags and below; of two flags the last wins.
ROWS = {
    "the paper's row": ["paper", "fixed_fan_in_32_32k"],
    "words chosen by labels": ["text_direct", "fixed_fan_in_32_4k_direct"],
}


def write_points(path: Path, count: int, seed: int) -> None:
    """Points of two of 40 labels, each of which has a word of its own, among other words."""
    rng = np.random.default_rng(seed)
    labels = [sorted(rng.choice(40, 2, replace=False)) for _ in range(count)]
    texts = [
        " ".join([*(f"w{i}" for i in row), *(f"x{i}" for i in rng.integers(0, 50, 4))]) for row in labels
    ]
    write_tsv(path, [[f"label {i}" for i in row] for row in labels], texts)


def run(row: list[str], train: Path, test: Path, workdir: Path, more: list[str]) -> dict:
    """Trains a row on these points, or goes on with it; returns what `result.json` has."""
    command = [sys.executable, "-m", "experiments.run", *(f"--flagfile={name}" for name in row)]
    files = [f"--train={train.absolute()}", f"--test={test.absolute()}", f"--workdir={workdir.absolute()}"]
    subprocess.run([*command, *files, *more], cwd=ROOT, check=True)
    return json.loads((workdir / "result.json").read_text())


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Runs all rows, and prints their metrics and a prediction; returns their results."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--train", type=Path, help="TSV; by default a small set is written")
    parser.add_argument("--test", type=Path)
    parser.add_argument("--workdir", type=Path, default=Path("runs/your_data"))
    values, more = parser.parse_known_args(
        arguments
    )  # what is left are flags of experiments.run, for all rows
    values.workdir.mkdir(parents=True, exist_ok=True)
    if values.train is None:
        values.train, values.test = values.workdir / "train.tsv", values.workdir / "test.tsv"
        write_points(values.train, 2000, seed=0)
        write_points(values.test, 200, seed=1)
        more = ["--embedding=32", "--penultimate=512", "--epochs=10", *more]  # sizes of so small a set
    results = {}
    for number, (name, row) in enumerate(ROWS.items()):
        workdir = values.workdir / f"row{number}"
        results[name] = run(row, values.train, values.test, workdir, more)
    for name, result in results.items():
        precisions = "/".join(f"{100 * result['test'][f'p@{k}']:.1f}" for k in (1, 3, 5))
        print(f"{name:24s}P@1/3/5 {precisions}, {result['peak_memory_bytes'] / 2**30:.2f} GiB")
    classifier = XMCClassifier.load(workdir)  # or `python -m experiments.predict --workdir=...`
    print("w3 w14:", ", ".join(classifier.predict(["w3 w14"], k=2).labels[0]))
    return results


if __name__ == "__main__":
    main()
