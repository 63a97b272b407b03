"""Selection of direct inputs: for each label, the columns that are larger for its points."""

from collections.abc import Iterator

import numpy as np
import scipy.sparse

# Bound on the number of entries of the product of a block of labels with the features of its points.
_ENTRIES_AT_ONCE = 1 << 19
_ROWS_AT_ONCE = 1 << 13


def select_direct_inputs(
    features: np.ndarray | scipy.sparse.csr_array, labels: scipy.sparse.csr_array, count: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Select for each label the columns whose mean over its points exceeds the mean over all points by most.

    For dense features, which may be negative, it selects the columns whose mean over the points of the label
    is farthest from the mean over all points.

    Works in blocks of labels: no array has size L x D, nor N x D besides the features.

    Args:
      features: float32 [N, D], dense, or sparse such as TF-IDF.
      labels: bool [N, L], the labels of each point.
      count: C, number of columns to select for each label.

    Yields:
      A range of n labels; the columns, int32 [n, C], best first, padded with -1; and the differences of their
      means, float32 [n, C], padded with 0. The order of columns with equal differences is not defined.

    Reference: the class means of Rocchio's classifier, in Manning, Raghavan & Schütze, Introduction to
    Information Retrieval, 2008, chapter 14.
    """
    dense = isinstance(features, np.ndarray)
    overall = _means(features)
    label_points = scipy.sparse.csr_array(labels.T, dtype=np.float32)
    if isinstance(features, scipy.sparse.csr_array):
        # Both need one index type, or SciPy converts all features for each product.
        dtype = features.indices.dtype
        label_points.indices = label_points.indices.astype(dtype)
        label_points.indptr = label_points.indptr.astype(dtype)
    for block in _blocks(label_points, features):
        block_points = label_points[block]
        sums = scipy.sparse.csr_array(block_points @ features)
        points = np.diff(block_points.indptr).astype(np.float32)
        row = np.repeat(np.arange(sums.shape[0]), np.diff(sums.indptr))
        difference = sums.data / points[row] - overall[sums.indices]
        best, rank = _largest(row, np.abs(difference) if dense else np.maximum(difference, 0), count)
        columns = np.full((len(points), count), -1, np.int32)
        excess = np.zeros((len(points), count), np.float32)
        columns[row[best], rank] = sums.indices[best]
        excess[row[best], rank] = difference[best]
        yield block, columns, excess


def _means(features: np.ndarray | scipy.sparse.csr_array) -> np.ndarray:
    """Return the mean of each column, float32 [D]. It sums blocks of rows, as SciPy copies its operand."""
    sums = np.zeros(features.shape[1])
    for start in range(0, features.shape[0], _ROWS_AT_ONCE):
        sums += np.asarray(features[start : start + _ROWS_AT_ONCE].sum(axis=0)).ravel()
    return (sums / max(1, features.shape[0])).astype(np.float32)


def _largest(row: np.ndarray, gain: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the `count` largest nonzero gains of each row.

    Args:
      row: integer [n], the row of each entry, ascending.
      gain: float32 [n], the gain of each entry, at least 0.
      count: maximum number of entries of a row to find.

    Returns:
      The positions of these entries, and the rank of each within its row, from 0.
    """
    entry = np.flatnonzero(gain > 0)
    row = row[entry]
    # Sorting by one integer is fast. Nonnegative floats are ordered like their bits.
    order = np.argsort((row << 32) - gain[entry].view(np.int32))
    row_sizes = np.bincount(row)
    rank = np.arange(order.size) - (np.cumsum(row_sizes) - row_sizes)[row]
    best = rank < count
    return entry[order[best]], rank[best]


def _blocks(
    label_points: scipy.sparse.csr_array, features: np.ndarray | scipy.sparse.csr_array
) -> Iterator[slice]:
    """Yield ranges of labels whose points have at most `_ENTRIES_AT_ONCE` entries, or a single label."""
    if isinstance(features, np.ndarray):
        point_sizes = np.full(len(features), features.shape[1])
    else:
        point_sizes = np.diff(features.indptr)
    entries = np.concatenate([[0], np.cumsum(point_sizes[label_points.indices])])
    num_entries = entries[label_points.indptr]  # number of entries of all labels before each label
    start, labels = 0, label_points.shape[0]
    while start < labels:
        end = int(np.searchsorted(num_entries, num_entries[start] + _ENTRIES_AT_ONCE, side="right")) - 1
        end = min(labels, max(start + 1, end))
        yield slice(start, end)
        start = end
