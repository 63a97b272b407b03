"""Loading of data sets from the files that flags name, and the choice of their formats by file name."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sized
from pathlib import Path

import numpy as np

from sparse_xmc.cli.flagfiles import find
from sparse_xmc.data import (
    Dataset,
    LabelEncoder,
    iterate_tsv,
    read_dense,
    read_filter,
    read_xmc_text,
)
from sparse_xmc.data.files import read_text_lines
from sparse_xmc.encoders.frozen_encoder import PretrainedInput
from sparse_xmc.inputs import InputEncoder
from sparse_xmc.saving import SavedModel

# Readers of raw texts by the suffix of the file name. They yield the label names and the text of each point.
_TEXT_READERS: dict[str, Callable[[str], Iterator[tuple[list[str], str]]]] = {".tsv": iterate_tsv}


@dataclasses.dataclass(frozen=True)
class Splits:
    """The training and test points of a data set, and the encoders of texts and label names.

    Attributes:
      train: the training points.
      test: the test points.
      inputs: encoder of texts, or None.
      label_encoder: names of the labels, or None.
      unseen_labels: number of labels of test points that no training point has, and that cannot be predicted.
    """

    train: Dataset
    test: Dataset
    inputs: InputEncoder | None = None
    label_encoder: LabelEncoder | None = None
    unseen_labels: int = 0


def load(
    train: str,
    test: str,
    *,
    train_features: str | None = None,
    test_features: str | None = None,
    train_filter: str | None = None,
    test_filter: str | None = None,
    cache_dir: str | None = None,
    ngrams: int = 1,
    pretrained: PretrainedInput | None = None,
) -> Splits:
    """Load a training and a test set.

    Args:
      train: path of `labels<TAB>text` lines (`.tsv`), or of a file in the text format of the Extreme
        Classification Repository (any other name); either may end in `.gz` or `.xz`.
      test: path of the test points, in the same format.
      train_features: path of a `.npy` file of dense features, if `train` has only labels; or None.
      test_features: path of the dense features of the test points, or None.
      train_filter: path of a file of `row label` lines, labels that are excluded from the ranking of a point
        in evaluation; or None. For raw text, the labels in the file are looked up as
        label names, so this works only if names are numbers.
      test_filter: path of such a file for the test points, or None.
      cache_dir: directory in which parsed files of the repository's format, and embeddings of texts by a
        frozen encoder, are cached and memory-mapped; None for no cache.
      ngrams: for raw text, 1 for words only, 2 for words and pairs of neighbouring words.
      pretrained: for raw text, the pretrained part of an `InputEncoder`; or None.

    Returns:
      Both sets, with the same features and labels. For raw text, labels and words that no training point has
      are dropped.

    Raises:
      ValueError: a file is malformed, or the sets differ in format or sizes.
      FileNotFoundError: a file is missing.
    """
    train, test = str(find(train)), str(find(test))
    for path in filter(None, (train, test, train_features, test_features, train_filter, test_filter)):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file")
        if _suffix(path) == ".csv":
            raise ValueError(
                f"{path}: expected a .tsv of label|label|...<TAB>text, got comma-separated values"
            )
    if bool(train_features) != bool(test_features):
        raise ValueError("expected both train_features and test_features, or neither")
    if _is_text(train) != _is_text(test):
        raise ValueError(f"train and test must be in the same format, got {train} and {test}")
    if _is_text(train) and train_features is not None:
        raise ValueError(
            f"{train}: expected labels in the repository's format, as dense features are given, got raw text"
        )
    if pretrained is not None and not _is_text(train):
        raise ValueError(f"{train}: expected raw text (.tsv) for a pretrained encoder")
    if _is_text(train):
        splits = _load_texts(train, test, ngrams, pretrained, cache_dir)
    elif train_features and test_features:
        splits = Splits(read_dense(train_features, train), read_dense(test_features, test))
    else:
        splits = Splits(read_xmc_text(train, cache_dir), read_xmc_text(test, cache_dir))
    if not _is_text(train):
        unseen = np.setdiff1d(splits.test.labels.indices, splits.train.labels.indices)
        splits = dataclasses.replace(splits, unseen_labels=len(unseen))
    _check_not_empty(train, splits.train)
    _check_not_empty(test, splits.test)
    for size in ("num_features", "num_labels"):
        first, second = getattr(splits.train, size), getattr(splits.test, size)
        if first != second:
            raise ValueError(
                f"{size} differ: {first} in {train_features or train}, {second} in {test_features or test}"
            )
    return dataclasses.replace(
        splits,
        train=_exclude(splits.train, train_filter, splits.label_encoder),
        test=_exclude(splits.test, test_filter, splits.label_encoder),
    )


def load_for_model(
    saved: SavedModel, path: str, *, features: str | None = None, filter: str | None = None
) -> tuple[Dataset, int]:
    """Load labelled points for a saved model.

    Args:
      saved: the model; the file must match its inputs: texts, sparse or dense features.
      path: path of the points, as `test` in `load`.
      features: path of dense features, as `test_features` in `load`; required for a model of dense features.
      filter: path of excluded labels, as `test_filter` in `load`.

    Returns:
      The points, and the number of their labels that the model does not know.

    Raises:
      ValueError: a file is malformed, or does not match the model.
      FileNotFoundError: a file is missing.
    """
    path = str(find(path))
    unknown, config = 0, saved.config
    expected = "sparse features" if config.bag_of_words else "dense features"
    expected = "texts" if saved.label_encoder is not None else expected
    given = "texts" if _is_text(path) else "dense features" if features else "sparse features"
    if expected != given:
        raise ValueError(f"{path}: the model takes {expected}, got {given}")
    if saved.label_encoder is not None:
        if saved.inputs is None:
            raise ValueError(
                f"{path}: the model was trained on features with named labels; no file format has both. "
                "Use `XMCClassifier.score`."
            )
        names, texts = _read_labelled_texts(path)
        labels = saved.label_encoder(names)
        unknown = sum(len(set(point_names)) for point_names in names) - labels.nnz
        dataset = saved.inputs(texts).with_labels(labels)
    else:
        dataset = read_dense(features, path) if features else read_xmc_text(path)
        for size in ("num_features", "num_labels"):
            required, found = getattr(config, size), getattr(dataset, size)
            if found != required:
                raise ValueError(
                    f"{features or path}: expected {size} {required}, as in the model, got {found}"
                )
    _check_not_empty(path, dataset)
    return _exclude(dataset, filter, saved.label_encoder), unknown


def _check_not_empty(path: str, points: Sized) -> None:
    """Raise ValueError, naming the file, if there are no points."""
    if not len(points):
        raise ValueError(f"{path}: expected points, got none")


def _exclude(dataset: Dataset, path: str | None, encoder: LabelEncoder | None) -> Dataset:
    """Return the data set with the exclusions of a filter file."""
    if path is None:
        return dataset
    if encoder is None:
        return dataclasses.replace(dataset, excluded=read_filter(path, *dataset.labels.shape))
    pairs = read_filter(path, len(dataset))
    rows = np.split(pairs.indices.astype(str), pairs.indptr[1:-1])
    excluded = encoder(rows)
    if pairs.nnz and not excluded.nnz:
        example = f", such as {encoder.names[0]!r}" if encoder.names else ""
        raise ValueError(f"{path}: expected names of training labels{example}, found none")
    return dataclasses.replace(dataset, excluded=excluded)


def read_texts(path: str) -> Iterator[tuple[list[str], str]]:
    """Yield the label names and the text of each point of a file of raw texts.

    A `.tsv` file has lines `label|label|...<TAB>text`. In a file with any other name, each line is a text
    without labels. Either may be compressed (`.gz`, `.xz`).

    Args:
      path: the file to read.

    Raises:
      ValueError: the file is malformed; points before the malformed line may have been yielded already.
    """
    if _is_text(path):
        return _TEXT_READERS[_suffix(path)](path)
    return (([], line) for _, line in read_text_lines(path))


def _read_labelled_texts(path: str) -> tuple[list[list[str]], list[str]]:
    """Return the label names and the texts of all points of a file, after checking that there are points."""
    names, texts = [], []
    for point_names, text in read_texts(path):
        names.append(point_names)
        texts.append(text)
    _check_not_empty(path, texts)
    return names, texts


def _is_text(path: str) -> bool:
    """Return whether the file name is that of raw texts with named labels."""
    return _suffix(path) in _TEXT_READERS


def _suffix(path: str) -> str:
    """Return the suffix of a file name, such as ".tsv", without the suffix of a compressed file."""
    found = re.search(r"(\.[^./]+)(\.gz|\.xz)?$", path)
    return "" if found is None else found[1]


def _load_texts(
    train: str,
    test: str,
    ngrams: int,
    pretrained: PretrainedInput | None,
    cache_dir: str | None,
) -> Splits:
    train_names, train_texts = _read_labelled_texts(train)
    test_names, test_texts = _read_labelled_texts(test)
    labels = LabelEncoder.fit(train_names)
    try:
        inputs = InputEncoder.fit(train_texts, ngrams=ngrams, pretrained=pretrained)
    except ValueError as error:
        raise ValueError(f"{train}: no word occurs in at least two of its texts") from error
    return Splits(
        train=inputs(train_texts, cache_dir=cache_dir).with_labels(labels(train_names)),
        test=inputs(test_texts, cache_dir=cache_dir).with_labels(labels(test_names)),
        inputs=inputs,
        label_encoder=labels,
        unseen_labels=len({name for names in test_names for name in names} - set(labels.names)),
    )


def printable(name: object) -> str:
    """Return a label name with control characters and tabs escaped, for output to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
