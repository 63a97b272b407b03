"""Batches for training and evaluation."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import scipy.sparse

from sparse_xmc.data.formats import Dataset
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


class Batches:
    """An iterator over a data set in batches of nearly always equal shapes, so that jit compiles once.

    Args:
      dataset: the data set.
      batch_size: B, the number of points in a batch; at most the number of points in the data set.
      own_rows: function from B to bool [B], true for the rows of a batch that this process needs. Other rows
        of dense features and encoded texts are not read, and are 0. None for all rows.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        own_rows: Callable[[int], np.ndarray] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._dataset = dataset
        self._most = batch_size
        self.batch_size = batch_size = min(batch_size, max(1, len(dataset)))
        self._own_rows = own_rows
        self._positives = max(1, np.diff(dataset.labels.indptr).max(initial=1))
        if not isinstance(dataset.features, np.ndarray):
            # The number of entries is padded to a multiple of 1.25 times its mean, so that nearly all batches
            # have the same shape.
            mean = dataset.features.nnz / max(1, len(dataset))
            self._entries = max(16, int(1.25 * mean * batch_size))

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
        of_points = [features[rows]] + ([encoded[rows]] if isinstance(encoded, np.ndarray) else [])
        sums = [np.asarray(abs(part).sum(axis=1)).ravel() for part in of_points]
        return rows[~np.isfinite(sum(sums))]

    def _shuffled_rows(self, seed: int, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng((seed, epoch)).permutation(len(self._dataset))
        size = self.batch_size
        return [order[start : start + size] for start in range(0, self.steps_per_epoch * size, size)]

    def in_order(self) -> Iterator[tuple[slice, Batch]]:
        """Yield all points in order, as pairs (range of points, batch); the last batch may be smaller."""
        for points in self._slices():
            yield points, self._batch(np.arange(points.start, points.stop))

    def to_predict(self, multiple_of: int = 1) -> Iterator[tuple[slice, Batch]]:
        """Yield all points in order, in batches padded to a few sizes for data sets of any size and density.

        The number of rows is padded to a power of two, or to B, and to a multiple of `multiple_of`, by
        repeating the last point; the number of entries of bags of words to 16, 64, 256, ... times the number
        of rows.

        Args:
          multiple_of: divisor of the number of rows, such as the size of the mesh's data axis.

        Yields:
          The range of points, and the batch; rows after the range are padding.
        """
        for points in self._slices():
            rows = np.arange(points.start, points.stop)
            size = min(self._most, _power_of_two(len(rows)))
            size += -size % multiple_of
            yield points, self._batch(np.pad(rows, (0, size - len(rows)), mode="edge"), of_any=True)

    def _slices(self) -> Iterator[slice]:
        for start in range(0, len(self._dataset), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self._dataset)))

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches that `shuffled` yields."""
        return max(1, len(self._dataset) // self.batch_size)

    def _batch(self, points: np.ndarray, of_any: bool = False) -> Batch:
        labels = self._dataset.labels[points]
        positives = np.full((len(points), self._positives), -1, np.int32)
        counts = np.diff(labels.indptr)
        positives[np.arange(self._positives) < counts[:, None]] = labels.indices
        return Batch(inputs=self._inputs(points, of_any), positives=positives)

    def _inputs(self, points: np.ndarray, of_any: bool) -> np.ndarray | BagOfWords | WordsAndText:
        features, encoded = self._dataset.features, self._dataset.encoded
        if isinstance(features, np.ndarray):
            return self._rows(features, points)
        bags = self._bags(features[points], of_any)
        if encoded is None:
            return bags
        text = self._rows(encoded, points) if isinstance(encoded, np.ndarray) else encoded.take(points)
        return WordsAndText(bags, text)

    def _rows(self, matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Return the rows of these points; rows that this process does not need are 0, and are not read."""
        own = None if self._own_rows is None else self._own_rows(len(points))
        if own is None or own.all():
            return matrix[points]
        rows = np.zeros((len(points), matrix.shape[1]), matrix.dtype)
        rows[own] = matrix[points[own]]
        return rows

    def _bags(self, features: scipy.sparse.csr_array, of_any: bool) -> BagOfWords:
        size = features.shape[0]
        unit = _capacity(features.nnz, size) if of_any else self._entries
        padding = -features.nnz % unit if features.nnz else unit
        rows = np.repeat(np.arange(size, dtype=np.int32), np.diff(features.indptr))
        return BagOfWords(
            rows=np.pad(rows, (0, padding), constant_values=size),
            words=np.pad(features.indices.astype(np.int32), (0, padding)),
            weights=np.pad(features.data, (0, padding)),
            num_examples=size,
        )


def _capacity(entries: int, rows: int) -> int:
    """Return the padded number of entries of `rows` bags: `rows` times a power of 4 that is at least 16."""
    capacity = 16 * rows
    while capacity < entries:
        capacity *= 4
    return capacity


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()
