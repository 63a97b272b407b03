"""Predict labels of new points: `sparse-xmc predict --workdir=RUN --input=texts.txt`.

RUN is the working directory of a finished `sparse-xmc run`, or a directory written by `XMCClassifier.save`.
The format of the input depends on the model: for texts, one per line (in a `.tsv`, the part after the tab),
from a file or standard input; for sparse features, a file in the repository's format, whose labels are
ignored; for dense features, a `.npy` file. All but the last may be compressed (`.gz`, `.xz`). Points are
read, predicted and printed in blocks of 1,024.

The output has one line for each point with its best labels: tab-separated values `label`, `score`, and with
--probabilities `probability`, for each label; or a JSON object of "labels", "scores" and "probabilities".
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from sparse_xmc import XMCClassifier
from sparse_xmc.cli import program, trained
from sparse_xmc.cli.datasets import printable, read_texts
from sparse_xmc.data import iterate_xmc_text
from sparse_xmc.data.storage import check_finite, open_npy

flags.adopt_module_key_flags(trained)  # so that --help shows them
_INPUT = flags.DEFINE_string("input", "/dev/stdin", "File of points, in the format that the model expects.")
_K = flags.DEFINE_integer("k", 5, "Maximum number of labels per point.", lower_bound=1)
_FORMAT = flags.DEFINE_enum(
    "format",
    "tsv",
    ["tsv", "jsonl"],
    "Format of the output: tab-separated values, or one JSON object per line.",
)
_PROBABILITIES = flags.DEFINE_bool(
    "probabilities", False, "Also print the probability that each label is correct."
)
_THRESHOLD = flags.DEFINE_float(
    "threshold",
    None,
    "Minimum score of printed labels, or with --probabilities, their minimum probability; by default, none.",
)

_BLOCK_SIZE = 1024


def main() -> None:
    """Predict labels of the points that the flags describe."""
    classifier = trained.load()
    calibration = classifier.saved_.calibration if _PROBABILITIES.value else None
    if _PROBABILITIES.value and calibration is None:
        workdir = flags.FLAGS.workdir
        raise ValueError(
            f"{workdir}: the model has no probabilities, as it was trained without validation points"
        )
    k = min(_K.value, classifier.n_labels_)
    for points in read_points(classifier, _INPUT.value):
        names, scores = classifier.predict(points, k=k)
        columns = {"scores": scores}
        if calibration is not None:
            columns["probabilities"] = calibration(scores)
        kept = np.ones(scores.shape, bool)
        if _THRESHOLD.value is not None:
            kept = columns["probabilities" if _PROBABILITIES.value else "scores"] >= _THRESHOLD.value
        for row, is_kept in enumerate(kept):
            print(line(names[row][is_kept], {name: values[row][is_kept] for name, values in columns.items()}))


def read_points(classifier: XMCClassifier, path: str) -> Iterator[Any]:
    """Yield the points of a file in blocks, in the format of the classifier."""
    if classifier.saved_.inputs is not None:
        texts = (text for _, text in read_texts(path))
        yield from iter(lambda: list(itertools.islice(texts, _BLOCK_SIZE)), [])
    elif classifier.saved_.config.bag_of_words:
        for dataset in iterate_xmc_text(path, _BLOCK_SIZE):
            yield dataset.features
    else:
        matrix = open_npy(path)
        for start in range(0, len(matrix), _BLOCK_SIZE):
            points = np.asarray(matrix[start : start + _BLOCK_SIZE])
            check_finite(path, points)
            yield points


def line(names: np.ndarray, columns: dict[str, np.ndarray]) -> str:
    """Return the labels of a point and their scores as a line in the format given by --format."""
    if _FORMAT.value == "jsonl":
        labels = [name if isinstance(name, str) else int(name) for name in names]
        return json.dumps({"labels": labels} | {name: values.tolist() for name, values in columns.items()})
    return "\t".join(
        "\t".join([printable(name), *(f"{value:.4f}" for value in values)])
        for name, *values in zip(names, *columns.values(), strict=True)
    )


if __name__ == "__main__":
    program.start(main)
