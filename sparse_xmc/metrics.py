"""Ranking metrics of extreme classification: P@k, nDCG@k, recall@k and their propensity-scored forms.

The metrics work on ranked label ids, never on a dense [points, labels] score matrix, and are
accumulated batch by batch, so their memory does not grow with the number of points.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array, issparse

from sparse_xmc.data.files import new_file
from sparse_xmc.data.validation import to_binary

# The constants (a, b) of `inverse_propensities` that Jain et al. (2016) fitted to each family of data sets.
PROPENSITY_CONSTANTS = {"wikipedia": (0.5, 0.4), "amazon": (0.6, 2.6), "default": (0.55, 1.5)}

# The groups of labels in `label_groups`, from frequent to rare. "head" is not the head of a classifier here.
LABEL_GROUPS = ("head", "middle", "tail")


def inverse_propensities(labels: csr_array, a: float = 0.55, b: float = 1.5) -> np.ndarray:
    """Return one weight per label, larger for rarer labels, under the model of missing labels.

    With N training points, of which n_l have the label l, the weight is 1 + C (n_l + b)^-a, where
    C = (ln N - 1) (b + 1)^a.

    Args:
      labels: [N, L] label matrix of the training set; nonzero entries are positives.
      a: exponent; `PROPENSITY_CONSTANTS` holds the usual pairs (a, b).
      b: offset added to the label counts, positive.

    Returns:
      [L] float64 array of weights, each greater than 1.

    Raises:
      ValueError: `labels` is not a CSR matrix or has fewer than 3 rows (C would be negative), or
          `a` or `b` is not positive.

    Source: Jain, Prabhu and Varma, "Extreme Multi-label Loss Functions for Recommendation, Tagging,
    Ranking & Other Missing Label Applications", KDD 2016.
    """
    labels = _binary_csr(labels, "labels")
    num_points, num_labels = labels.shape
    if num_points < 3:
        raise ValueError(f"labels: expected at least 3 rows (training points), got {num_points}")
    for name, value in (("a", a), ("b", b)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    counts = np.bincount(labels.indices, minlength=num_labels)
    c = (np.log(num_points) - 1) * (b + 1) ** a
    return 1 + c * (counts + b) ** -a


@dataclasses.dataclass(frozen=True)
class LabelStatistics:
    """Statistics of the training labels that evaluation needs.

    Attributes:
      inv_propensities: float64 [L], from `inverse_propensities`.
      groups: int8 [L], from `label_groups`.
    """

    inv_propensities: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, labels: csr_array, a: float = 0.55, b: float = 1.5) -> "LabelStatistics":
        """Compute the statistics of a label matrix [N, L]; for a and b see `inverse_propensities`."""
        return cls(inverse_propensities(labels, a, b), label_groups(labels))

    def save(self, path: str | os.PathLike) -> None:
        """Write the statistics as an `.npz` file."""
        with new_file(path) as file:
            np.savez(file, inv_propensities=self.inv_propensities, groups=self.groups)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LabelStatistics":
        """Read statistics saved by `save`.

        Raises:
          ValueError: the file does not contain such statistics; the message names it.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                weights, groups = arrays["inv_propensities"], arrays["groups"]
        except Exception as error:  # NumPy passes on any exception of zipfile, zlib and its header parser.
            reason = " ".join(str(error).split())  # Some messages span several lines.
            raise ValueError(f"{path}: not the statistics of labels: {reason}") from error
        for name, array, dtype in (("inv_propensities", weights, "float64"), ("groups", groups, "int8")):
            if array.dtype != dtype or array.shape != (weights.size,):
                raise ValueError(f"{path}: {name} must be {dtype} [L], got {array.dtype} {list(array.shape)}")
        last = len(LABEL_GROUPS) - 1
        for name, array, expected, is_right in (
            ("inv_propensities", weights, "finite", np.isfinite(weights)),
            ("groups", groups, f"in 0..{last}", (groups >= 0) & (groups <= last)),
        ):
            if not is_right.all():
                label = int(is_right.argmin())
                raise ValueError(f"{path}: {name} must be {expected}, got {array[label]} of label {label}")
        return cls(weights, groups)


class RankingMetrics:
    """Streaming averages of ranking metrics at several cut-offs k.

    Call `update` once per batch, then `compute`. All metrics are fractions in [0, 1] over all points; points
    without labels are included and contribute 0.

    * ``p@k``: hits among the first k, divided by k.
    * ``ndcg@k``: DCG of the first k, divided by the DCG of min(k, labels of the point) hits. The hit
      at rank r (from 1) gains 1 / log2(r + 1).
    * ``recall@k``: hits among the first k, divided by the point's number of labels.
    * ``psp@k``: the mean over points of (sum of inverse propensities of the hits / k), divided by the same
      mean for the best possible ranking.
    * ``psndcg@k``: the mean over points of (DCG with the inverse propensities as gains / the unweighted ideal
      DCG of ``ndcg@k``), divided by the same mean for the best possible ranking, by decreasing inverse
      propensity.

    These are the definitions of pyxclib and napkinXC, with which published numbers are computed.

    Args:
      ks: distinct cut-offs, each at least 1.
      inv_propensities: [L] positive weights, see `inverse_propensities`. Without them ``psp@k``
          and ``psndcg@k`` are left out.

    Raises:
      ValueError: `ks` or `inv_propensities` are not as described.
    """

    def __init__(self, ks: Sequence[int] = (1, 3, 5), inv_propensities: ArrayLike | None = None):
        self.ks = np.asarray(ks)
        if (
            self.ks.ndim != 1
            or self.ks.size == 0
            or not np.issubdtype(self.ks.dtype, np.integer)
            or self.ks.min() < 1
            or len(np.unique(self.ks)) < len(self.ks)
        ):
            raise ValueError(f"ks: expected distinct integers of at least 1, got {ks!r}")
        self._num_labels = None
        self._inv_propensities = None
        if inv_propensities is not None:
            weights = np.asarray(inv_propensities, dtype=np.float64)
            if weights.ndim != 1 or not np.all((weights > 0) & np.isfinite(weights)):
                raise ValueError(
                    "inv_propensities: expected a vector of positive finite numbers, "
                    f"got shape {weights.shape} with values {weights}"
                )
            self._inv_propensities = weights
            self._num_labels = len(weights)

        max_k = int(self.ks.max())
        self._discounts = 1 / np.log2(np.arange(2, max_k + 2))
        self._ideal_dcg = np.concatenate([[0], np.cumsum(self._discounts)])  # by number of hits
        self._num_points = 0
        names = ["p", "ndcg", "recall"]
        if self._inv_propensities is not None:
            names += ["psp", "psndcg"]
        self._sums = {name: np.zeros(len(self.ks)) for name in names}
        # The divisor of each sum: the number of points, or the sum for the best ranking.
        self._totals = {name: np.zeros(len(self.ks)) for name in names}

    def update(self, top_labels: ArrayLike, positives: csr_array) -> None:
        """Add a batch of n points.

        Args:
          top_labels: [n, >= max(ks)] integers, each row the label ids in ranked order, best first.
              An id of -1 stands for no label and is a miss.
          positives: [n, L] label matrix; nonzero entries are positives. L is the same in all calls.

        Raises:
          ValueError: a shape or type is not as described, an id is outside [-1, L), or a row names a label
              twice.
        """
        positives = _binary_csr(positives, "positives")
        top_labels = self._checked_top_labels(top_labels, positives.shape)
        hits = is_listed(top_labels, positives)
        # A point without labels has no hits: the divisor 1 gives its contribution of 0.
        label_counts = np.maximum(np.diff(positives.indptr), 1)[:, None]
        ideal_dcg = self._ideal_dcg[np.minimum(label_counts, self.ks)]

        self._num_points += len(top_labels)
        for name in ("p", "ndcg", "recall"):
            self._totals[name] += len(top_labels)
        self._sums["p"] += (self._at_ks(hits) / self.ks).sum(0)
        self._sums["ndcg"] += (self._at_ks(hits * self._discounts) / ideal_dcg).sum(0)
        self._sums["recall"] += (self._at_ks(hits) / label_counts).sum(0)
        if self._inv_propensities is not None:
            gains = np.where(hits, self._inv_propensities[top_labels], 0)
            best_gains = _largest_weights(positives, self._inv_propensities, len(self._discounts))
            for sums, weights in ((self._sums, gains), (self._totals, best_gains)):
                sums["psp"] += (self._at_ks(weights) / self.ks).sum(0)
                sums["psndcg"] += (self._at_ks(weights * self._discounts) / ideal_dcg).sum(0)

    def compute(self) -> dict[str, float]:
        """Return the metrics of all points so far, under keys such as ``"p@1"`` and ``"psndcg@5"``.

        Raises:
          ValueError: `update` has not been called with any point.
        """
        if self._num_points == 0:
            raise ValueError("compute: expected at least one point from update(), got none")
        results: dict[str, float] = {}
        for name, sums in self._sums.items():
            totals = self._totals[name]
            # A total is 0 only for psp and psndcg, if no point has a label.
            values = np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0)
            results |= {f"{name}@{k}": float(value) for k, value in zip(self.ks, values, strict=True)}
        return results

    def _at_ks(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of the first k columns of values [n, max_k], for each k: [n, len(ks)]."""
        return np.cumsum(values, axis=1)[:, self.ks - 1]

    def _checked_top_labels(self, top_labels: ArrayLike, shape: tuple[int, int]) -> np.ndarray:
        """Return the first max(ks) columns of top_labels as int64 [n, max_k]."""
        num_points, num_labels = shape
        if self._num_labels not in (None, num_labels):
            raise ValueError(f"positives: expected {self._num_labels} columns (labels), got {num_labels}")
        top_labels = np.asarray(top_labels)
        max_k = len(self._discounts)
        if top_labels.ndim != 2 or top_labels.shape[0] != num_points or top_labels.shape[1] < max_k:
            raise ValueError(f"top_labels: expected shape [{num_points}, >={max_k}], got {top_labels.shape}")
        if not np.issubdtype(top_labels.dtype, np.integer):
            raise ValueError(f"top_labels: expected an integer dtype, got {top_labels.dtype}")
        top_labels = top_labels[:, :max_k].astype(np.int64)
        outside = top_labels[(top_labels < -1) | (top_labels >= num_labels)]
        if outside.size:
            raise ValueError(f"top_labels: expected ids in [-1, {num_labels}), got {outside[0]}")
        ordered = np.sort(top_labels, axis=1)
        if np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)):
            raise ValueError("top_labels: expected distinct ids in each row, got a repeated one")
        self._num_labels = num_labels
        return top_labels


def label_groups(labels: csr_array) -> np.ndarray:
    """Divide labels by frequency into groups that each have a third of all label occurrences.

    Labels are ordered from the most to the least frequent, and labels of equal frequency by their ids. The
    first occurrence of a label decides its group: head labels (0) are few and have the first third of the
    occurrences, middle labels (1) the second, tail labels (2) the last; labels that never occur are tail
    labels.

    Args:
      labels: [N, L] label matrix of the training set; nonzero entries are positives.

    Returns:
      int8 [L]: an index into `LABEL_GROUPS` for each label.

    Raises:
      ValueError: `labels` is not a CSR matrix.
    """
    labels = _binary_csr(labels, "labels")
    counts = np.bincount(labels.indices, minlength=labels.shape[1])
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    groups = np.empty(len(counts), np.int8)
    groups[order] = np.where(counts[order] > 0, 3 * before // max(1, labels.nnz), 2)
    return groups


def _binary_csr(matrix: csr_array, name: str) -> csr_array:
    """Return a CSR matrix as bool with sorted, distinct columns and no stored zeros; does not modify it."""
    if not issparse(matrix) or matrix.format != "csr" or matrix.ndim != 2:
        raise ValueError(f"{name}: expected a two-dimensional CSR matrix, got {type(matrix).__name__}")
    return to_binary(matrix)


def is_listed(top_labels: np.ndarray, positives: csr_array) -> np.ndarray:
    """Return for each ranked label whether it is among the positives of its point.

    Args:
      top_labels: integer [n, k], label ids, or -1 for no label.
      positives: [n, L] CSR matrix with sorted indices without duplicates.

    Returns:
      Bool [n, k].
    """
    if positives.nnz == 0:
        return np.zeros(top_labels.shape, dtype=bool)
    num_points, num_labels = positives.shape
    rows = np.arange(num_points, dtype=np.int64)
    # Keys ascend, because the columns of each row do, so a binary search finds a pair (point, label).
    keys = np.repeat(rows, np.diff(positives.indptr)) * num_labels + positives.indices
    wanted = rows[:, None] * num_labels + top_labels
    found = keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted
    # The key of label -1 equals the key of the last label of the previous point.
    return found & (top_labels >= 0)


def _largest_weights(positives: csr_array, weights: np.ndarray, k: int) -> np.ndarray:
    """Return float64 [n, k]: the k largest weights of each point's positives, descending, 0 after them."""
    counts = np.diff(positives.indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-weights[positives.indices], rows))
    ranks = np.arange(positives.nnz) - np.repeat(positives.indptr[:-1], counts)
    kept = ranks < k
    largest = np.zeros((len(counts), k))
    largest[rows[kept], ranks[kept]] = weights[positives.indices[order[kept]]]
    return largest
