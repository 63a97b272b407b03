"""Filter files of the Extreme Classification Repository: labels that are excluded in evaluation."""

import array
import os
import re

import numpy as np
import scipy.sparse

from sparse_xmc.data import files
from sparse_xmc.data.files import INTEGER, LARGEST_SIZE, excerpt

_INTEGER = re.compile(INTEGER)


def read_filter(
    path: str | os.PathLike, num_points: int, num_labels: int | None = None
) -> scipy.sparse.csr_array:
    """Read a filter file of the Extreme Classification Repository (`filter_labels_test.txt`).

    Each line is `row label`, both from 0: the label is excluded from the ranking of this point in evaluation,
    for example because points and labels are the same products, and a product must not be predicted for
    itself.

    Args:
      path: the file to read.
      num_points: N, the number of points.
      num_labels: L, the number of labels; by default one more than the largest label in the file.

    Returns:
      Bool CSR matrix `[N, L]`, for `Dataset.excluded`.

    Raises:
      ValueError: a line is malformed, or its row or label is not below N or L; the message names the line.
    """
    pairs = array.array("q")
    limits = (("row", num_points), ("label", LARGEST_SIZE if num_labels is None else num_labels))
    for number, line in files.read_lines(path):
        fields = line.split()
        if len(fields) != 2 or not all(map(_INTEGER.fullmatch, fields)):
            raise ValueError(f"{path}:{number}: expected 'row label', got {excerpt(line)}")
        pair = [int(field) for field in fields]
        for (name, limit), value in zip(limits, pair, strict=True):
            if value >= limit:
                raise ValueError(f"{path}:{number}: expected a {name} below {limit}, got {value}")
        pairs.extend(pair)
    rows, labels = np.frombuffer(pairs, np.int64).reshape(-1, 2).T
    shape = (num_points, labels.max(initial=-1) + 1 if num_labels is None else num_labels)
    matrix = scipy.sparse.csr_array((np.ones(len(rows), bool), (rows, labels)), shape=shape)
    matrix.sum_duplicates()
    return matrix
