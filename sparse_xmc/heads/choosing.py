"""Connections chosen from the training points: what a label's points have in common, and others have not."""

from collections.abc import Iterator

import numpy as np
import scipy.sparse

# Products of a block of labels with the points' inputs have at most so many entries at once.
_ENTRIES_AT_ONCE = 1 << 19
_ROWS_AT_ONCE = 1 << 13


def choose_columns(
    features: np.ndarray | scipy.sparse.csr_array, labels: scipy.sparse.csr_array, count: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yields for blocks of labels the columns whose mean over a label's points exceeds that over all by most.

    Of dense features, which may be negative, those whose mean is farthest from that over all points.

    Nothing of size L x D exists, nor of size N x D besides the features.

    Args:
      features: float32 [N, D], dense, or sparse such as TF-IDF.
      labels: bool [N, L].
      count: C, how many columns to choose.

    Yields:
      A range of n labels; columns int32 [n, C], best first, -1 where there are no more; and by how much their
      means differ, float32 [n, C], 0 there. Which of equal ones comes first is not defined.

    Reference: the class means of Rocchio's classifier, in Manning, Raghavan & Schütze, Introduction to
    Information Retrieval, 2008, chapter 14.
    """
    dense = isinstance(features, np.ndarray)
    overall = _means(features)
    points_of = scipy.sparse.csr_array(labels.T, dtype=np.float32)
    if isinstance(
        features, scipy.sparse.csr_array
    ):  # of one type, or SciPy converts all features for each product
        kind = features.indices.dtype
        points_of.indices, points_of.indptr = points_of.indices.astype(kind), points_of.indptr.astype(kind)
    for block in _blocks(points_of, features):
        of_block = points_of[block]
        sums = scipy.sparse.csr_array(of_block @ features)
        points = np.diff(of_block.indptr).astype(np.float32)
        row = np.repeat(np.arange(sums.shape[0]), np.diff(sums.indptr))
        difference = sums.data / points[row] - overall[sums.indices]
        best, rank = _largest(row, np.abs(difference) if dense else np.maximum(difference, 0), count)
        columns = np.full((len(points), count), -1, np.int32)
        excess = np.zeros((len(points), count), np.float32)
        columns[row[best], rank] = sums.indices[best]
        excess[row[best], rank] = difference[best]
        yield block, columns, excess


def _means(features: np.ndarray | scipy.sparse.csr_array) -> np.ndarray:
    """The mean of each column, float32 [D], a few rows after the other: SciPy copies what it sums."""
    sums = np.zeros(features.shape[1])
    for start in range(0, features.shape[0], _ROWS_AT_ONCE):
        sums += np.asarray(features[start : start + _ROWS_AT_ONCE].sum(axis=0)).ravel()
    return (sums / max(1, features.shape[0])).astype(np.float32)


def _largest(row: np.ndarray, gain: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the `count` largest gains of each row, of those that are not 0.

    Args:
      row: of each entry, ascending.
      gain: float32, at least 0.

    Returns:
      Where those entries are, and the rank of each in its row, from 0.
    """
    entry = np.flatnonzero(gain > 0)
    row = row[entry]
    # One integer to sort by, which is fast: floats that are not negative are ordered like their bits.
    order = np.argsort((row << 32) - gain[entry].view(np.int32))
    of_row = np.bincount(row)
    rank = np.arange(order.size) - (np.cumsum(of_row) - of_row)[row]
    best = rank < count
    return entry[order[best]], rank[best]


def _blocks(
    points_of: scipy.sparse.csr_array, features: np.ndarray | scipy.sparse.csr_array
) -> Iterator[slice]:
    """Yields ranges of labels whose points have about as many entries as are taken at once."""
    if isinstance(features, np.ndarray):
        of_point = np.full(len(features), features.shape[1])
    else:
        of_point = np.diff(features.indptr)
    entries = np.concatenate([[0], np.cumsum(of_point[points_of.indices])])
    until = entries[points_of.indptr]  # of the labels before each
    start, labels = 0, points_of.shape[0]
    while start < labels:
        end = int(np.searchsorted(until, until[start] + _ENTRIES_AT_ONCE, side="right")) - 1
        end = min(labels, max(start + 1, end))
        yield slice(start, end)
        start = end
