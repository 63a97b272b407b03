"""Points, which are the inputs of a classifier, and data sets, which are points with labels."""

import dataclasses
import hashlib

import numpy as np
import scipy.sparse

from sparse_xmc.data.tokens import TokenLists


@dataclasses.dataclass(frozen=True)
class Points:
    """N points, each with D features.

    Attributes:
      features: float32 `[N, D]`, a dense array (possibly memory-mapped) or a CSR matrix.
      encoded: for texts, whose features are bags of words, the same texts for a pretrained encoder: their
        embeddings, float32 `[N, E]` (possibly memory-mapped), or their tokens if the encoder is fine-tuned;
        or None.

    Raises:
      ValueError: the arrays differ in N, or an array has another dtype, rank or format than above.
    """

    features: np.ndarray | scipy.sparse.csr_array
    encoded: np.ndarray | TokenLists | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.features, np.ndarray | scipy.sparse.csr_array):
            raise ValueError(
                f"features must be an ndarray or a csr_array, got {type(self.features).__name__}"
            )
        if self.features.ndim != 2 or self.features.dtype != np.float32:
            raise ValueError(
                f"features must be float32 [N, D], got {self.features.dtype} of shape {self.features.shape}"
            )
        if self.encoded is None:
            return
        if not self.is_sparse:
            raise ValueError("encoded texts go with bags of words; embeddings alone are dense features")
        if len(self.encoded) != len(self):
            raise ValueError(f"encoded has {len(self.encoded)} texts but features {len(self)} rows")

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def num_features(self) -> int:
        """D, the number of features."""
        return self.features.shape[1]

    @property
    def is_sparse(self) -> bool:
        """Whether the features are a sparse matrix, such as bags of words."""
        return not isinstance(self.features, np.ndarray)

    def with_labels(self, labels: scipy.sparse.csr_array) -> "Dataset":
        """Return the data set of these points with labels, a bool CSR matrix `[N, L]`."""
        return Dataset(self.features, labels, encoded=self.encoded)


@dataclasses.dataclass(frozen=True)
class Dataset(Points):
    """A data set of N points, each with D features and a set of labels out of L.

    Attributes:
      features, encoded: as for `Points`.
      labels: bool or uint8 CSR matrix `[N, L]`. The labels of a point are the stored entries of its row,
        which must be sorted, distinct and nonzero.
      excluded: bool CSR matrix `[N, L]` of labels that are excluded from the ranking of a point in
        evaluation, or None; see `read_filter`.

    Raises:
      ValueError: the arrays differ in N, or an array has another dtype, rank or format than above.
    """

    labels: scipy.sparse.csr_array
    excluded: scipy.sparse.csr_array | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.labels, scipy.sparse.csr_array):
            raise ValueError(f"labels must be a csr_array, got {type(self.labels).__name__}")
        if self.labels.ndim != 2 or self.labels.dtype not in (np.bool_, np.uint8):
            raise ValueError(
                f"labels must be bool or uint8 [N, L], got {self.labels.dtype} of shape {self.labels.shape}"
            )
        if self.features.shape[0] != self.labels.shape[0]:
            raise ValueError(f"features have {self.features.shape[0]} rows but labels {self.labels.shape[0]}")
        if not self.labels.has_canonical_format:
            raise ValueError("labels must have sorted indices without duplicates; see sum_duplicates()")
        if not self.labels.data.all():
            raise ValueError("labels must not store zeros; see eliminate_zeros()")
        if self.excluded is not None and self.excluded.shape != self.labels.shape:
            raise ValueError(
                f"excluded must have the shape of the labels, {self.labels.shape}, got {self.excluded.shape}"
            )

    @property
    def num_labels(self) -> int:
        """L, the number of labels."""
        return self.labels.shape[1]

    def fingerprint(self) -> str:
        """Return a content hash of the data set, 16 hexadecimal digits.

        It covers the sizes, all labels, and 256 evenly spaced rows of the features, which may be too large to
        be read as a whole.
        """
        digest = hashlib.sha256(repr((self.features.shape, self.labels.shape)).encode())
        rows = np.unique(np.linspace(0, max(0, len(self) - 1), 256).astype(np.int64))[: len(self)]
        parts = [self.labels.indptr, self.labels.indices]
        for matrix in (self.features, self.encoded):
            if isinstance(matrix, np.ndarray):
                parts.append(matrix[rows])
            elif isinstance(matrix, TokenLists):
                parts += [matrix.lengths, matrix[rows].ids]
            elif matrix is not None:
                sample = matrix[rows]
                parts += [sample.indptr, sample.indices, sample.data]
        for part in parts:
            array = np.ascontiguousarray(part)
            digest.update((array.astype(np.int64) if array.dtype.kind in "iu" else array).tobytes())
        return digest.hexdigest()[:16]

    def label_counts(self) -> np.ndarray:
        """Return the number of points of each label, int64 `[L]`."""
        return np.bincount(self.labels.indices, minlength=self.num_labels)

    def hold_out(self, fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """Split the data set at random into training and held-out points.

        Args:
          fraction: fraction of the points to hold out; at least one point is in each part.
          seed: seed of the random choice.

        Returns:
          The remaining points and the held-out points, both in their original order.

        Raises:
          ValueError: the fraction is not between 0 and 1, or there are not two points.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"the fraction that is held out must be between 0 and 1, got {fraction}")
        if len(self) < 2:
            raise ValueError(f"holding out takes at least 2 points, got {len(self)}")
        order = np.random.default_rng(seed).permutation(len(self))
        held_out = min(len(self) - 1, max(1, round(fraction * len(self))))
        return self.take(np.sort(order[held_out:])), self.take(np.sort(order[:held_out]))

    def take(self, rows: np.ndarray | slice) -> "Dataset":
        """Return the data set of the given rows, in the given order.

        Args:
          rows: integer `[M]`, bool `[N]`, or a slice. With a slice, dense features of the result are a view
            (and stay memory-mapped); with an array, only the chosen rows are copied into memory.
        """
        excluded = None if self.excluded is None else self.excluded[rows]
        encoded = None if self.encoded is None else self.encoded[rows]
        return Dataset(self.features[rows], self.labels[rows], excluded, encoded=encoded)
