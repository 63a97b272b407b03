"""Checks that the files of a saved model belong together."""

from collections.abc import Mapping
from pathlib import Path

from sparse_xmc.data.text import LabelEncoder
from sparse_xmc.inputs import FROZEN_FILE, TOKENIZER_FILE, WORDS_FILE, InputEncoder
from sparse_xmc.metrics import LabelStatistics
from sparse_xmc.model import ClassifierConfig
from sparse_xmc.model_files import LABEL_STATISTICS, LABELS


def check_input_files(directory: Path, files: Mapping[str, Path], config: ClassifierConfig) -> None:
    """Raise an error unless a saved model has the files of the input encoder of its configuration.

    Args:
      directory: directory of the model.
      files: paths of the existing files, by name.
      config: configuration of the classifier.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: there is a file of a pretrained encoder, which the classifier does not have.
    """
    if config.text_features:
        expected = FROZEN_FILE if config.pretrained is None else TOKENIZER_FILE
        for name in (WORDS_FILE, expected):
            if name not in files:
                raise FileNotFoundError(
                    f"{directory / name}: not there, but the model reads texts by a pretrained encoder"
                )
    elif FROZEN_FILE in files or TOKENIZER_FILE in files:
        raise ValueError(f"{directory}: has a pretrained encoder, but the model reads words alone")


def check_sizes(
    files: Mapping[str, Path],
    config: ClassifierConfig,
    inputs: InputEncoder | None,
    labels: LabelEncoder | None,
    statistics: LabelStatistics | None,
) -> None:
    """Raise ValueError, naming the file, if a part of a saved model does not have the classifier's sizes."""
    sizes = []
    if inputs is not None:
        sizes.append((WORDS_FILE, "words", inputs.words.vocabulary_size, config.num_features))
    if labels is not None:
        sizes.append((LABELS, "labels", len(labels.names), config.num_labels))
    if statistics is not None:
        sizes.append((LABEL_STATISTICS, "labels", len(statistics.groups), config.num_labels))
    for name, unit, actual, expected in sizes:
        if actual != expected:
            raise ValueError(f"{files[name]}: has {actual} {unit}, but the model {expected}")
