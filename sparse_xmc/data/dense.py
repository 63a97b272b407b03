"""The format of dense features: a `.npy` file of features, and a file of labels."""

import os

from sparse_xmc.data import files, storage
from sparse_xmc.data.dataset import Dataset
from sparse_xmc.data.xmc_text import read_xmc_labels, read_xmc_text


def read_dense(features_npy: str | os.PathLike, labels: str | os.PathLike) -> Dataset:
    """Read dense features (such as embeddings) and a file of labels.

    Args:
      features_npy: a `.npy` file of finite float32 `[N, D]`. It is memory-mapped, and read once to check the
        values.
      labels: a file in the format of `read_xmc_labels` or of `read_xmc_text`; the number of fields in the
        first line decides which. Features in a file of the latter format are ignored.

    Returns:
      The data set, with memory-mapped dense features and bool labels.

    Raises:
      ValueError: a file is malformed, or the files differ in N.
    """
    has_features = len(files.first_line(labels).split()) == 3
    matrix = read_xmc_text(labels).labels if has_features else read_xmc_labels(labels)
    features = storage.open_npy(features_npy)
    try:
        dataset = Dataset(features, matrix)
    except ValueError as error:
        raise ValueError(f"{features_npy} with labels from {labels}: {error}") from error
    storage.check_finite(features_npy, features)
    return dataset
