"""Batches for training and evaluation."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
import scipy.sparse

from sparse_xmc.data.dataset import Dataset, Points
from sparse_xmc.data.tokens import Tokens

Array = np.ndarray | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class BagOfWords:
    """A batch of weighted bags of words, as a flat list of (row, word, weight) entries.

    Attributes:
      rows: int32 [N], the point of each entry, ascending; padding entries have row = B.
      words: int32 [N], the word of each entry, in 0..V-1.
      weights: float32 [N], the weight of each entry, for example TF-IDF.
      num_examples: B, the number of points (static under `jit`).
    """

    rows: Array
    words: Array
    weights: Array
    num_examples: int = dataclasses.field(metadata={"static": True})

    def __len__(self) -> int:
        return self.num_examples


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class WordsAndText:
    """A batch of B texts, both as bags of words and as the inputs or outputs of a pretrained encoder.

    Attributes:
      bags: the bags of words of the texts.
      encoded: the embeddings of the texts, float32 [B, E], or their `Tokens`.
    """

    bags: BagOfWords
    encoded: Array | Tokens

    def __len__(self) -> int:
        return len(self.bags)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """A batch of B points.

    Attributes:
      inputs: the inputs of the encoder: float32 [B, D], a `BagOfWords` of size B, `WordsAndText`, or any
        other pytree of arrays.
      positives: int32 [B, P], the labels of each point, distinct, padded with -1.
    """

    inputs: Any
    positives: Array


Inputs: TypeAlias = np.ndarray | BagOfWords | WordsAndText
LocalRows: TypeAlias = Callable[[int], np.ndarray]  # from B to bool [B]


class Batches:
    """An iterator over a data set in batches of nearly always equal shapes, so that jit compiles once.

    Args:
      dataset: the data set.
      batch_size: B, the number of points in a batch; at most the number of points in the data set.
      local_rows: function from B to bool [B], true for the rows of a batch that this process needs. Other
        rows of dense features and encoded texts are not read, and are 0. None for all rows.
    """

    def __init__(self, dataset: Dataset, batch_size: int, *, local_rows: LocalRows | None = None):
        _check_batch_size(batch_size)
        self._dataset = dataset
        self.batch_size = min(batch_size, max(1, len(dataset)))
        self._local_rows = local_rows
        self._positives_width = max(1, np.diff(dataset.labels.indptr).max(initial=1))
        self._entries_multiple = 1
        if not isinstance(dataset.features, np.ndarray):
            # The number of entries is padded to a multiple of 1.25 times its mean, so that nearly all batches
            # have the same shape.
            mean = dataset.features.nnz / max(1, len(dataset))
            self._entries_multiple = max(16, int(1.25 * mean * self.batch_size))

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches that `shuffled` yields."""
        return max(1, len(self._dataset) // self.batch_size)

    def shuffled(self, seed: int, epoch: int, *, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch in random order.

        Points that do not fill a batch are dropped, unless the data set is smaller than a batch.

        Args:
          seed: seed of the order, an integer in 0..2^32-1.
          epoch: number of the epoch; seed and epoch determine the order.
          first: number of batches to skip.
        """
        for rows in self._shuffled_rows(seed, epoch)[first:]:
            yield self._batch(rows)

    def in_order(self) -> Iterator[tuple[slice, Batch]]:
        """Yield all points in order, as pairs (range of points, batch); the last batch may be smaller."""
        for points in _ranges(len(self._dataset), self.batch_size):
            yield points, self._batch(np.arange(points.start, points.stop))

    def rows_not_finite(self, seed: int, epoch: int, number: int) -> np.ndarray:
        """Return the points with NaN or infinite inputs in a batch of `shuffled`.

        Args:
          seed, epoch: as for `shuffled`.
          number: number of the batch within the epoch, from 0.

        Returns:
          Integer array of the rows of the data set.
        """
        rows = self._shuffled_rows(seed, epoch)[number]
        features, encoded = self._dataset.features, self._dataset.encoded
        inputs = [features[rows]] + ([encoded[rows]] if isinstance(encoded, np.ndarray) else [])
        sums = [np.asarray(abs(matrix).sum(axis=1)).ravel() for matrix in inputs]
        return rows[~np.isfinite(sum(sums))]

    def _shuffled_rows(self, seed: int, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng((seed, epoch)).permutation(len(self._dataset))
        size = self.batch_size
        return [order[start : start + size] for start in range(0, self.steps_per_epoch * size, size)]

    def _batch(self, rows: np.ndarray) -> Batch:
        labels = self._dataset.labels[rows]
        positives = np.full((len(rows), self._positives_width), -1, np.int32)
        counts = np.diff(labels.indptr)
        positives[np.arange(self._positives_width) < counts[:, None]] = labels.indices
        inputs = _take_inputs(self._dataset, rows, self._local_rows, self._entries_multiple)
        return Batch(inputs=inputs, positives=positives)


def padded_inputs(
    points: Points, batch_size: int, *, multiple_of: int = 1, local_rows: LocalRows | None = None
) -> Iterator[tuple[slice, Inputs]]:
    """Yield the inputs of all points in order, padded to a few sizes for any number of points and words.

    The number of rows is padded to a power of two, or to B, and to a multiple of `multiple_of`, by repeating
    the last point; the number of entries of bags of words to 16, 64, 256, ... times the number of rows.

    Args:
      points: the points.
      batch_size: B, the maximum number of points in a batch.
      multiple_of: divisor of the number of rows, such as the size of the mesh's data axis.
      local_rows: as for `Batches`.

    Yields:
      The range of points, and the inputs; rows after the range are padding.
    """
    _check_batch_size(batch_size)
    for batch in _ranges(len(points), batch_size):
        rows = np.arange(batch.start, batch.stop)
        size = min(batch_size, 1 << (len(rows) - 1).bit_length())  # the next power of two
        size += -size % multiple_of
        rows = np.pad(rows, (0, size - len(rows)), mode="edge")
        yield batch, _take_inputs(points, rows, local_rows)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _ranges(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _take_inputs(
    points: Points, rows: np.ndarray, local_rows: LocalRows | None, entries_multiple: int | None = None
) -> Inputs:
    """Return the inputs of the points with the numbers `rows`; `entries_multiple` is as for `_bags`."""
    features, encoded = points.features, points.encoded
    if isinstance(features, np.ndarray):
        return _take_rows(features, rows, local_rows)
    bags = _bags(features[rows], entries_multiple)
    if encoded is None:
        return bags
    if isinstance(encoded, np.ndarray):
        return WordsAndText(bags, _take_rows(encoded, rows, local_rows))
    return WordsAndText(bags, encoded.take(rows))


def _take_rows(matrix: np.ndarray, rows: np.ndarray, local_rows: LocalRows | None) -> np.ndarray:
    """Return rows of a matrix; rows that this process does not need are 0, and are not read."""
    local = None if local_rows is None else local_rows(len(rows))
    if local is None or local.all():
        return matrix[rows]
    taken = np.zeros((len(rows), matrix.shape[1]), matrix.dtype)
    taken[local] = matrix[rows[local]]
    return taken


def _bags(features: scipy.sparse.csr_array, multiple: int | None) -> BagOfWords:
    """Return the rows of a matrix as bags of words.

    The number of entries is padded to a multiple of `multiple`; if this is None, to the number of rows times
    a power of 4 that is at least 16.
    """
    size = features.shape[0]
    if multiple is None:
        multiple = 16 * size
        while multiple < features.nnz:
            multiple *= 4
    padding = -features.nnz % multiple if features.nnz else multiple
    rows = np.repeat(np.arange(size, dtype=np.int32), np.diff(features.indptr))
    return BagOfWords(
        rows=np.pad(rows, (0, padding), constant_values=size),
        words=np.pad(features.indices.astype(np.int32), (0, padding)),
        weights=np.pad(features.data, (0, padding)),
        num_examples=size,
    )
