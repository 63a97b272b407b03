"""Run a row of the paper's table on your own data: `python examples/paper_table_to_your_data.py`.

A row of the table is a list of flagfiles: settings, data set and model, such as fixed fan-in 32 after a
penultimate layer of 32,768 hidden units. For your own data, only the files of points differ: .tsv files with
one point per line, its labels separated by `|`, a tab, and its text. By default, this program runs a row of
the paper, and the settings of this project for short texts, on a small data set that it writes; use
`--train=train.tsv --test=test.tsv --workdir=runs/mine` for yours. It needs a clone of the repository.
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
# Names of flagfiles in sparse_xmc/cli/flags; the last value of a flag is used.
ROWS = {
    "the paper's row": ["paper", "fixed_fan_in_32_32k"],
    "words as direct inputs": ["text_direct", "fixed_fan_in_32_4k_direct"],
}


def write_points(path: Path, count: int, seed: int) -> None:
    """Write points with two of 40 labels; their texts have one word for each label, and four random words."""
    rng = np.random.default_rng(seed)
    labels = [sorted(rng.choice(40, 2, replace=False)) for _ in range(count)]
    texts = [
        " ".join([*(f"w{i}" for i in row), *(f"x{i}" for i in rng.integers(0, 50, 4))]) for row in labels
    ]
    write_tsv(path, [[f"label {i}" for i in row] for row in labels], texts)


def run(row: list[str], train: Path, test: Path, workdir: Path, more: list[str]) -> dict:
    """Train a row on these points, or resume it, and return the contents of `result.json`."""
    command = [sys.executable, "-m", "experiments.run", *(f"--flagfile={name}" for name in row)]
    files = [f"--train={train.absolute()}", f"--test={test.absolute()}", f"--workdir={workdir.absolute()}"]
    subprocess.run([*command, *files, *more], cwd=ROOT, check=True)
    return json.loads((workdir / "result.json").read_text())


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Run all rows, print their metrics and a prediction, and return their results."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument(
        "--train", type=Path, help="file of training points; by default, a small data set is written"
    )
    parser.add_argument("--test", type=Path, help="file of test points")
    parser.add_argument("--workdir", type=Path, default=Path("runs/your_data"), help="directory of the runs")
    # All other arguments are flags of experiments.run, for all rows.
    values, more = parser.parse_known_args(arguments)
    values.workdir.mkdir(parents=True, exist_ok=True)
    if values.train is None:
        values.train, values.test = values.workdir / "train.tsv", values.workdir / "test.tsv"
        write_points(values.train, 2000, seed=0)
        write_points(values.test, 200, seed=1)
        # The data set is small, and so is the model.
        more = ["--embedding=32", "--penultimate=512", "--epochs=10", *more]
    results = {}
    for number, (name, row) in enumerate(ROWS.items()):
        workdir = values.workdir / f"row{number}"
        results[name] = run(row, values.train, values.test, workdir, more)
    for name, result in results.items():
        precisions = "/".join(f"{100 * result['test'][f'p@{k}']:.1f}" for k in (1, 3, 5))
        print(f"{name:24s}P@1/3/5 {precisions}, {result['peak_memory_bytes'] / 2**30:.2f} GiB")
    classifier = XMCClassifier.load(workdir)  # or `python -m experiments.predict --workdir=DIR`
    print("w3 w14:", ", ".join(classifier.predict(["w3 w14"], k=2).labels[0]))
    return results


if __name__ == "__main__":
    main()
