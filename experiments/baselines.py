"""Train Omikuji and napkinXC on the data of our models, and print a table of all results.

    pip install '.[baselines]'
    python -m experiments.baselines --ours=result.json

All models use the same TF-IDF features and are evaluated by `sparse_xmc.metrics`. Each baseline runs with its
own defaults and all CPUs, in a fresh process:

* training time is measured from reading the data file to the saved model;
* model size is the total size of the saved files;
* peak memory is the largest resident set of the process up to the end of training, minus the resident
  set just before it (with the libraries and the test set loaded). It is read from VmHWM in
  /proc/self/status, hence Linux only: ru_maxrss of getrusage survives exec, so that in a fresh process
  it starts at the peak of the parent, which holds the whole data set.

Omikuji takes no seed; from run to run its precisions move by a few tenths of a percent.
"""

import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from absl import flags
from scipy.sparse import csr_array, csr_matrix

from sparse_xmc.cli import datasets, flagfiles, program
from sparse_xmc.cli.memory import status_bytes
from sparse_xmc.data import Dataset, write_xmc_text
from sparse_xmc.metrics import RankingMetrics

_KS = (1, 3, 5)
_PACKAGES = ("omikuji", "napkinxc")

# Function from features [n, features] to the ranked label ids of each point, best first.
Predict = Callable[[csr_array], Iterable[Iterable[int]]]


def require_baselines() -> None:
    """Exit with the command that installs the baselines if one of them is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not installed; run: pip install '.[baselines]'")


def train_omikuji(data_file: str, model_dir: str, num_trees: int) -> Predict:
    """Train and save a forest of Parabel-like trees, Omikuji's default model."""
    import omikuji

    parameters = omikuji.Model.default_hyper_param()
    parameters.n_trees = num_trees
    model = omikuji.Model.train_on_data(data_file, parameters)
    model.save(model_dir)

    def predict(features: csr_array) -> Iterable[list[int]]:
        for start, stop in zip(features.indptr[:-1], features.indptr[1:], strict=True):
            pairs = zip(
                features.indices[start:stop].tolist(), features.data[start:stop].tolist(), strict=True
            )
            yield [label for label, _ in model.predict(pairs, top_k=max(_KS))]

    return predict


def train_napkinxc(data_file: str, model_dir: str) -> Predict:
    """Train a probabilistic label tree with the defaults of napkinXC, which saves it while training."""
    from napkinxc.models import PLT

    model = PLT(model_dir, seed=0)
    model.fit_on_file(data_file)
    return lambda features: model.predict(csr_matrix(features), top_k=max(_KS))


BASELINES: dict[str, Callable[[str, str], Predict]] = {
    "Omikuji, 1 tree": functools.partial(train_omikuji, num_trees=1),
    "Omikuji, 3 trees": functools.partial(train_omikuji, num_trees=3),
    "napkinXC PLT": train_napkinxc,
}


def measure(name: str, data_file: str, features: csr_array) -> tuple[dict, np.ndarray]:
    """Train one of BASELINES on `data_file` in this process and predict from `features`.

    Returns:
      The row of the table without the metrics, and the ranked labels, int64 [n, 5], padded with -1.
    """
    for package in _PACKAGES:
        importlib.import_module(package)
    with tempfile.TemporaryDirectory() as model_dir:
        before = status_bytes("VmRSS")
        start = time.perf_counter()
        predict = BASELINES[name](data_file, model_dir)
        row = {
            "name": name,
            "train_seconds": time.perf_counter() - start,
            "peak_memory_bytes": status_bytes("VmHWM") - before,
            "model_bytes": sum(path.stat().st_size for path in Path(model_dir).rglob("*") if path.is_file()),
        }
        top_labels = np.full((features.shape[0], max(_KS)), -1, dtype=np.int64)
        for ranked, labels in zip(top_labels, predict(features), strict=True):
            labels = list(labels)
            ranked[: len(labels)] = labels
    return row, top_labels


def run_baselines(train: Dataset, test: Dataset) -> list[dict]:
    """Train and score every baseline, each in a process of its own; return their rows of the table.

    Training points without features are dropped, as Omikuji cannot read them.

    Raises:
      ValueError: the features are not sparse.
    """
    if isinstance(train.features, np.ndarray):
        raise ValueError("the baselines are trained on sparse features, got dense ones")
    train = train.take(np.diff(train.features.indptr) > 0)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        data_file = os.path.join(directory, "train.txt")
        write_xmc_text(data_file, train)
        for name in BASELINES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _stdout_to_stderr) as pool:
                row, top_labels = pool.submit(measure, name, data_file, test.features).result()
            metrics = RankingMetrics(_KS)
            metrics.update(top_labels, test.labels)
            rows.append(row | {"test": metrics.compute()})
    return rows


def markdown_table(rows: Iterable[dict]) -> str:
    """Render results as a Markdown table, with a dash for missing values.

    Args:
      rows: results as in our result.json, with the keys name, test (of p@1, p@3 and p@5 as
          fractions), train_seconds, model_bytes and peak_memory_bytes.
    """
    lines = [
        "| Model | P@1 | P@3 | P@5 | Training, s | Model, MB | Peak memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        precisions = [row.get("test", {}).get(f"p@{k}") for k in _KS]
        cells = [
            row.get("name", "-"),
            *(_scaled(value, 100, 2) for value in precisions),
            _scaled(row.get("train_seconds"), 1, 1),
            _scaled(row.get("model_bytes"), 1e-6, 1),
            _scaled(row.get("peak_memory_bytes"), 1e-6, 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _scaled(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _stdout_to_stderr() -> None:
    """Redirect stdout to stderr, so that logs of the baselines' native code do not mix with the table."""
    os.dup2(2, 1)


def _define_flags() -> None:
    wordnet = flagfiles.PACKAGE / "data" / "wordnet"
    flags.DEFINE_string(
        "train", str(wordnet / "train.tsv.xz"), "File of training points, .tsv (labels<TAB>text)."
    )
    flags.DEFINE_string("test", str(wordnet / "test.tsv.xz"), "File of test points, in the same format.")
    flags.DEFINE_integer(
        "ngrams", 1, "Features: 1 for words, 2 for words and pairs of neighbouring words.", 1
    )
    flags.DEFINE_string("json", None, "File to write the results of the baselines to, as JSON.")
    flags.DEFINE_multi_string(
        "ours", [], "A result.json of `sparse-xmc run`, for another row of the table; can be repeated."
    )


def main() -> None:
    """Print the table of the baselines and of --ours."""
    require_baselines()
    values = flags.FLAGS
    ours = [json.loads(Path(path).read_text()) for path in values.ours]

    splits = datasets.load(values.train, values.test, ngrams=values.ngrams)
    train, test = splits.train, splits.test
    baselines = run_baselines(train, test)
    print(markdown_table(baselines + ours))
    if values.json is not None:
        report = {
            "train_points": train.labels.shape[0],
            "test_points": test.labels.shape[0],
            "ngrams": values.ngrams,
            "features": train.features.shape[1],
            "labels": train.labels.shape[1],
            "python": platform.python_version(),
            "cpu_count": os.cpu_count(),
            "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
            "results": baselines,
        }
        Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()  # not on import: tests import several programs, whose flags share names
    program.start(main)
