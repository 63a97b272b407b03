"""Synthetic points with the statistics of real data sets, for any number of labels, made in batches.

* Label frequencies have a long tail: the label of rank r (from 0) has a frequency proportional to
  1 / (r + L / 1000), Zipf's law with Mandelbrot's offset. This fits the shipped data set: a hundredth of the
  labels has 0.35 of the occurrences (0.31 in that data set), a tenth 0.67 (0.67). With tens of labels per
  point, frequencies are more even, because the labels of a point are distinct.
* A point has 1 + Poisson distinct labels, all from one cluster of about 1,000 labels.
* The features of a point are the sum of the direction of its cluster, a direction for each of its labels, and
  noise, so that every label can be learnt. The direction of a label is computed from its number, not stored.

The memory is that of one batch and L / 1000 cluster directions.
"""

import numpy as np
import scipy.sparse

from sparse_xmc.data.batches import Batch

_LABELS_PER_CLUSTER = 1000
_CODE_LENGTH = 8  # nonzero features in the direction of a label
_NOISE = 0.3  # norm of the noise; the directions of clusters and labels have norm 1


class Synthetic:
    """A source of batches of synthetic points.

    Args:
      num_labels: L, at least 1,000.
      labels_per_point: mean number of labels of a point, at least 1.
      num_features: D, the number of features.
      seed: seed of all random choices, including the directions.

    Attributes:
      max_labels: P, the maximum number of labels of a point.

    Raises:
      ValueError: a size is out of range.
    """

    def __init__(self, num_labels: int, labels_per_point: float, num_features: int = 768, *, seed: int = 0):
        if num_labels < _LABELS_PER_CLUSTER:
            raise ValueError(f"num_labels must be at least {_LABELS_PER_CLUSTER}, got {num_labels}")
        if not 1 <= labels_per_point <= _LABELS_PER_CLUSTER / 10:
            raise ValueError(
                f"labels_per_point must be between 1 and {_LABELS_PER_CLUSTER // 10}, got {labels_per_point}"
            )
        self.num_labels = num_labels
        self.num_features = num_features
        self.max_labels = int(np.ceil(labels_per_point + 5 * labels_per_point**0.5))
        self._labels_per_point = labels_per_point
        self._seed = seed
        self._num_clusters = num_labels // _LABELS_PER_CLUSTER
        self._clusters = _unit(
            np.random.default_rng(seed).standard_normal((self._num_clusters, num_features), np.float32)
        )

    def batch(self, index: int, batch_size: int) -> Batch:
        """Return the batch with a number; equal numbers give equal batches.

        Returns:
          Features float32 [B, D], and positives int32 [B, P], ascending, padded with -1 at the end.
        """
        rng = np.random.default_rng((self._seed, index))
        counts = 1 + rng.poisson(self._labels_per_point - 1, batch_size)
        labels = self._labels(rng, np.minimum(counts, self.max_labels))
        directions = self._clusters[labels[:, 0] % self._num_clusters]
        features = directions + self._codes(labels)
        features += _NOISE * _unit(rng.standard_normal(features.shape, np.float32))
        ordered = np.sort(np.where(labels < 0, self.num_labels, labels), axis=1)
        return Batch(features, np.where(ordered == self.num_labels, -1, ordered).astype(np.int32))

    def _labels(self, rng: np.random.Generator, counts: np.ndarray) -> np.ndarray:
        """Draw distinct labels [B, P], -1 after the first `counts`."""
        labels = self._ranks(rng, (len(counts), self.max_labels))
        cluster = labels[:, :1] % self._num_clusters
        wanted = np.arange(self.max_labels) < counts[:, None]
        pending = wanted
        while pending.any():
            # Draw another label of similar frequency in the point's cluster: ranks alternate between
            # clusters.
            drawn = self._ranks(rng, labels.shape)
            labels = np.where(pending, drawn - drawn % self._num_clusters + cluster, labels)
            earlier = np.tril(np.ones((self.max_labels, self.max_labels), bool), k=-1)
            repeated = ((labels[:, :, None] == labels[:, None]) & earlier).any(axis=2)
            pending = wanted & (repeated | (labels >= self.num_labels))
        return np.where(wanted, labels, -1)

    def _ranks(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draw labels by their frequency; label 0 is the most frequent."""
        offset = self.num_labels / 1000
        ranks = offset * ((self.num_labels + offset) / offset) ** rng.random(shape) - offset
        return np.minimum(ranks.astype(np.int64), self.num_labels - 1)

    def _codes(self, labels: np.ndarray) -> np.ndarray:
        """Return the sum of the directions of each point's labels, scaled to mean norm 1: [B, D]."""
        numbers = labels[..., None] * _CODE_LENGTH + np.arange(_CODE_LENGTH)
        bits = _hash(numbers.astype(np.uint64))
        signs = np.where(bits >> np.uint64(63), 1, -1) * (labels >= 0)[..., None]
        columns = bits % np.uint64(self.num_features)
        codes = np.zeros((len(labels), self.num_features), np.float32)
        points = np.broadcast_to(np.arange(len(labels))[:, None, None], columns.shape)
        np.add.at(codes, (points, columns.astype(np.int64)), signs.astype(np.float32))
        return codes / np.sqrt(_CODE_LENGTH * (labels >= 0).sum(axis=1, keepdims=True), dtype=np.float32)


def label_matrix(positives: np.ndarray, num_labels: int) -> scipy.sparse.csr_array:
    """Convert positives [N, P], ascending, padded with -1, to a label matrix bool [N, L]."""
    listed = positives >= 0
    ends = np.append(0, np.cumsum(np.sum(listed, axis=1))).astype(np.int32)
    labels = positives[listed]
    return scipy.sparse.csr_array(
        (np.ones(len(labels), bool), labels, ends), shape=(len(positives), num_labels)
    )


def _hash(values: np.ndarray) -> np.ndarray:
    """Return the SplitMix64 hashes of uint64 values, uint64."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
