r"""Prepare a public data set: list the required files, check them, and convert them.

    python -m experiments.prepare --dataset=Amazon-670K

The flagfiles in sparse_xmc/cli/flags/data expect the files in DIR/DATASET in lower case, such as
data/amazon-670k. Labels and text come from the Extreme Classification Repository,
http://manikvarma.org/downloads/XC/XMLRepository.html, in either of its formats:

* train.txt and test.txt, a header `N D L` and lines of `label,label,... feature:value ...`;
* for data sets named LF-, trn.json.gz and tst.json.gz, one JSON object per line, with filter_labels_train.txt
  and filter_labels_test.txt.

Dense features are not in the repository: row i of such a file belongs to line i of the labels. Neither is the
raw text of other data sets: --raw_text reads it in the format of LightXML, CascadeXML and ELMO,
train_raw_texts.txt and test_raw_texts.txt with one point per line, and train_labels.txt and test_labels.txt
with their labels, separated by spaces.

The program writes trn_X_Y.txt and tst_X_Y.txt, the labels only, and for raw text train.tsv.gz and
test.tsv.gz. Existing files are checked and kept. All errors are reported together, with exit status 1.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from absl import app, flags

from sparse_xmc.cli import program
from sparse_xmc.data import (
    files,
    read_filter,
    read_tsv,
    read_xmc_labels,
    read_xmc_text,
    storage,
    write_tsv,
    write_xmc_labels,
)

# Number of dense features of each kind.
FEATURES = {"slice": 512, "cascade": 768}

_TOLERANCE = 0.01  # relative, for labels per point, which are published with two decimals


class Statistics(NamedTuple):
    """Published statistics of a data set, which its files must match.

    Attributes:
      train: the number of training points.
      test: the number of test points.
      labels: L, the number of labels.
      labels_per_point: mean number of labels of a training point.
      features: kinds of dense features used in the paper, keys of `FEATURES`.
      titles: whether to use only the title as raw text.
    """

    train: int
    test: int
    labels: int
    labels_per_point: float
    features: tuple[str, ...] = ()
    titles: bool = False


DATASETS = {
    "Eurlex-4K": Statistics(15_449, 3_865, 3_956, 5.30),
    "Wiki10-31K": Statistics(14_146, 6_616, 30_938, 18.64, ("cascade",)),
    "AmazonCat-13K": Statistics(1_186_239, 306_782, 13_330, 5.04),
    "LF-AmazonTitles-131K": Statistics(294_805, 134_835, 131_073, 2.29, titles=True),
    "LF-AmazonTitles-1.3M": Statistics(2_248_619, 970_237, 1_305_265, 22.20, titles=True),
    "LF-Wikipedia-500K": Statistics(1_813_391, 783_743, 501_070, 4.77),
    "Wiki-500K": Statistics(1_779_881, 769_421, 501_070, 4.75, ("slice", "cascade")),
    "Amazon-670K": Statistics(490_449, 153_025, 670_091, 5.45, ("slice", "cascade")),
    "Amazon-3M": Statistics(1_717_899, 742_507, 2_812_281, 36.17, ("cascade",)),
}

_SPLITS = {"train": "trn", "test": "tst"}


def required_files(name: str, features: tuple[str, ...], raw_text: bool = False) -> list[tuple[str, str]]:
    """Return the required files of a data set, as pairs (name, description); arguments as for `prepare`."""
    statistics, required = DATASETS[name], []
    for split, prefix in _SPLITS.items():
        points = f"{getattr(statistics, split):,} {split} points"
        if _has_json_files(name):
            required.append((f"{prefix}.json.gz", f"{points}: title, content, target_ind"))
            required.append(
                (f"filter_labels_{split}.txt", f"labels to exclude from the ranking of {split} points")
            )
        elif raw_text:
            required.append((f"{split}_raw_texts.txt", f"the text of {points}"))
            required.append((f"{split}_labels.txt", "their labels, separated by spaces"))
        else:
            required.append((f"{split}.txt", f"{points}, or only their labels, as {prefix}_X_Y.txt"))
        for feature in features:
            required.append((f"{feature}.{split}.npy", f"float32 [{points}, {FEATURES[feature]}]"))
    return required


def prepare(name: str, directory: Path, features: tuple[str, ...], raw_text: bool = False) -> list[str]:
    """Check and convert a data set.

    Args:
      name: a key of `DATASETS`.
      directory: directory of the files.
      features: kinds of dense features to check.
      raw_text: whether to prepare the raw text instead of the label file; without effect on a data set with
        JSON files (LF- in its name), of which both are prepared.

    Returns:
      Messages of all errors; each names the file, and what was expected and found.
    """
    statistics, errors = DATASETS[name], []

    def attempt(check: Callable, *arguments: Any) -> None:
        try:
            check(*arguments)
        except (FileNotFoundError, ValueError) as error:
            errors.append(str(error))

    for split in _SPLITS:
        convert = _prepare_text_lines if raw_text else _prepare_labels
        if _has_json_files(name):
            convert = _prepare_json
        attempt(convert, directory, split, statistics)
        if _has_json_files(name):
            attempt(_check_filter, directory, split, statistics)
        for feature in features:
            shape = (getattr(statistics, split), FEATURES[feature])
            attempt(check_features, directory / f"{feature}.{split}.npy", shape)
    return errors


def _has_json_files(name: str) -> bool:
    """Return whether the files of a data set are JSON, with labels and raw text."""
    return name.startswith("LF-")


def _prepare_labels(directory: Path, split: str, statistics: Statistics) -> None:
    """Write and check the labels of a data set in the text format of the repository."""
    target = directory / f"{_SPLITS[split]}_X_Y.txt"
    if not target.exists():
        labels = read_xmc_text(_existing(directory / f"{split}.txt")).labels
        check_labels(directory / f"{split}.txt", labels, split, statistics)
        with _atomic_file(target) as path:
            write_xmc_labels(path, labels)
    else:
        labels = read_xmc_labels(target)
        check_labels(target, labels, split, statistics)
    print(f"{target}: {_describe(labels)}")


def _prepare_json(directory: Path, split: str, statistics: Statistics) -> None:
    """Write and check the text and the labels of an LF- data set."""
    prefix = _SPLITS[split]
    source, text_file = directory / f"{prefix}.json.gz", directory / f"{split}.tsv.gz"
    labels_file = directory / f"{prefix}_X_Y.txt"
    if text_file.exists():
        names, _ = read_tsv(text_file)
        rows = [_numbers(f"{text_file}:{line}", row) for line, row in enumerate(names, start=1)]
        labels = _matrix(text_file, rows, statistics.labels)
    else:
        rows, texts = read_json(_existing(source), statistics.titles)
        labels = _matrix(source, rows, statistics.labels)
        check_labels(source, labels, split, statistics)
        with _atomic_file(text_file) as path:
            write_tsv(path, [[str(label) for label in row] for row in rows], texts)
    check_labels(text_file, labels, split, statistics)
    if labels_file.exists():
        others = read_xmc_labels(labels_file)
        if others.shape != labels.shape or (others != labels).nnz:
            raise ValueError(f"{labels_file}: has other labels than {text_file}")
    else:
        with _atomic_file(labels_file) as path:
            write_xmc_labels(path, labels)
    print(f"{text_file}: {_describe(labels)}")


def _prepare_text_lines(directory: Path, split: str, statistics: Statistics) -> None:
    """Write and check the text and the labels of a data set with one file for each, one point per line."""
    source, target = directory / f"{split}_labels.txt", directory / f"{split}.tsv.gz"
    if target.exists():
        names, _ = read_tsv(target)
    else:
        texts_file = _existing(directory / f"{split}_raw_texts.txt")
        names = [list(dict.fromkeys(line.split())) for _, line in files.read_text_lines(_existing(source))]
        _check_names(source, names, split, statistics)
        texts = [_in_one_line(line) for _, line in files.read_text_lines(texts_file)]
        if len(texts) != len(names):
            raise ValueError(
                f"{texts_file}: expected {len(names):,} lines, as {source} has, got {len(texts):,}"
            )
        with _atomic_file(target) as path:
            write_tsv(path, names, texts)
    _check_names(target, names, split, statistics)
    print(f"{target}: {len(names):,} points, {sum(map(len, names)) / len(names):.2f} labels per point")


def _check_names(path: Path, names: list[list[str]], split: str, statistics: Statistics) -> None:
    """Run `check_labels` on labels by name; a single file need not contain all labels."""
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(name, len(numbers)) for name in row] for row in names]
    if len(numbers) > statistics.labels:
        raise ValueError(f"{path}: expected {statistics.labels:,} labels at most, got {len(numbers):,}")
    check_labels(path, _matrix(path, rows, statistics.labels), split, statistics)


def _check_filter(directory: Path, split: str, statistics: Statistics) -> None:
    path = _existing(directory / f"filter_labels_{split}.txt")
    excluded = read_filter(path, getattr(statistics, split), statistics.labels)
    print(f"{path}: {excluded.nnz:,} pairs")


def read_json(path: Path, titles: bool = False) -> tuple[list[list[int]], list[str]]:
    """Read the points of an LF- data set: one JSON object per line, with `title`, `content`, `target_ind`.

    Args:
      path: the file.
      titles: whether to ignore the content.

    Returns:
      The label ids of each point, and its text on one line: the title, and the content if there is one.

    Raises:
      ValueError: a line is malformed, or the compressed data is damaged or truncated; the message names it.
    """
    labels, texts = [], []
    for number, line in files.read_text_lines(path):
        try:
            point = json.loads(line)
            parts = [point["title"], *([] if titles else [point.get("content", "")])]
            text, ids = _in_one_line(" ".join(parts)), point["target_ind"]
            text.encode()  # JSON may contain escapes for characters that UTF-8 cannot encode.
            if type(ids) is not list or any(type(label) is not int for label in ids):
                raise TypeError("target_ind must be a list of whole numbers")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number}: expected JSON with title, content and target_ind, got {line[:60]!r}: "
                f"{error}"
            ) from error
        texts.append(text)
        labels.append(ids)
    return labels, texts


def _in_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def check_labels(path: Path, labels: scipy.sparse.csr_array, split: str, statistics: Statistics) -> None:
    """Raise ValueError unless the numbers of points and labels, and labels per point, are as published."""
    expected = (getattr(statistics, split), statistics.labels)
    if labels.shape != expected:
        raise ValueError(
            f"{path}: expected {expected[0]:,} points and {expected[1]:,} labels, "
            f"got {labels.shape[0]:,} and {labels.shape[1]:,}"
        )
    mean = labels.nnz / labels.shape[0]
    if split == "train" and abs(mean / statistics.labels_per_point - 1) > _TOLERANCE:
        raise ValueError(
            f"{path}: expected {statistics.labels_per_point} labels per point, got {mean:.2f}: "
            "another version?"
        )


def check_features(path: Path, shape: tuple[int, int]) -> None:
    """Check a file of dense features without loading it as a whole.

    Args:
      path: a `.npy` file.
      shape: the expected shape.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the file is not a `.npy` file, has another shape or dtype, is truncated, or has infinite or
        NaN values.
    """
    features = storage.open_npy(_existing(path))
    if features.shape != shape or features.dtype != np.float32 or np.isfortran(features):
        raise ValueError(
            f"{path}: expected float32 {list(shape)} in C order, got {features.dtype} {list(features.shape)}"
            + (" in Fortran order" if np.isfortran(features) else "")
        )
    storage.check_finite(path, features)
    print(f"{path}: {shape[0]:,} points, {shape[1]} features")


def _numbers(where: str, names: list[str]) -> list[int]:
    if not all(re.fullmatch("[0-9]{1,18}", name) for name in names):
        raise ValueError(f"{where}: expected numbers of labels, got {names}")
    return [int(name) for name in names]


def _matrix(path: Path, rows: list[list[int]], num_labels: int) -> scipy.sparse.csr_array:
    """Convert the labels of each point to a matrix; raise ValueError if one is out of range."""
    for number, row in enumerate(rows, start=1):
        if row and not 0 <= min(row) <= max(row) < num_labels:
            raise ValueError(f"{path}:{number}: expected labels in 0..{num_labels - 1}, got {row}")
    indices = np.array([label for row in rows for label in sorted(set(row))], np.int32)
    indptr = np.cumsum([0, *(len(set(row)) for row in rows)])
    return scipy.sparse.csr_array((np.ones(len(indices), bool), indices, indptr), (len(rows), num_labels))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing")
    return path


@contextlib.contextmanager
def _atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `target` when the block ends without an exception."""
    partial = target.with_name(f".partial-{target.name}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _describe(labels: scipy.sparse.csr_array) -> str:
    points, num_labels = labels.shape
    return f"{points:,} points, {num_labels:,} labels, {labels.nnz / points:.2f} labels per point"


def _define_flags() -> None:
    flags.DEFINE_enum("dataset", None, list(DATASETS), "Data set to prepare.", required=True)
    flags.DEFINE_string(
        "dir", "data", "Directory of all data sets; the files are in DIR/DATASET, in lower case."
    )
    flags.DEFINE_bool(
        "raw_text", False, "Prepare raw text instead of labels, for a data set without LF- in its name."
    )
    flags.DEFINE_list(
        "features", None, "Kinds of dense features to check; by default, those that the paper uses."
    )


def main():
    """List the required files, and prepare the data set."""
    values = flags.FLAGS
    name, directory = values.dataset, Path(values.dir) / values.dataset.lower()
    default = () if values.raw_text else DATASETS[name].features
    features = default if values.features is None else tuple(values.features)
    if unknown := set(features) - FEATURES.keys():
        raise app.UsageError(f"--features must be among {', '.join(FEATURES)}, got {', '.join(unknown)}")
    print(f"{name} requires these files in {directory}:")
    for file, content in required_files(name, features, values.raw_text):
        print(f"  {file:26}{content}")
    print(flush=True)
    if errors := prepare(name, directory, features, values.raw_text):
        sys.exit("".join(f"{error}\n" for error in errors) + f"{directory} is not complete")
    print(f"{directory} is complete")


if __name__ == "__main__":
    _define_flags()
    program.start(main)
