"""The `Dataset` class, and readers and writers of the text formats of extreme classification.

Every reader decompresses files whose names end in `.gz` or `.xz`, and raises a ValueError that begins with
`path:line` for a malformed file.
"""

import array
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse

from sparse_xmc.data import files, storage
from sparse_xmc.data.tokens import TokenLists

_log = logging.getLogger(__name__)

_LARGEST = np.iinfo(np.int32).max  # number of points, labels or features
_ID = rb"\d{1,18}"  # at most 18 digits, which fit into 64 bits
_WHOLE = re.compile(_ID)
_LABELS = re.compile(rb"(?:" + _ID + rb"(?:," + _ID + rb")*)?")
_NUMBER = rb"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_FEATURE = re.compile(_ID + rb":" + _NUMBER)
_FEATURES = re.compile(rb"\s*(?:" + _ID + rb":" + _NUMBER + rb"(?:\s+|$))*")
_LABEL_AND_VALUE = re.compile(rb"(" + _ID + rb")(?::(" + _NUMBER + rb"))?")
_BLANKS = " \u00a0\u3000\ufeff"  # stripped around labels; the last one is a byte order mark


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set of N points, each with D features and a set of labels out of L.

    Attributes:
      features: float32 `[N, D]`, a dense array (possibly memory-mapped) or a CSR matrix.
      labels: bool or uint8 CSR matrix `[N, L]`. The labels of a point are the stored entries of its row,
        which must be sorted, distinct and nonzero.
      excluded: bool CSR matrix `[N, L]` of labels that are excluded from the ranking of a point in
        evaluation, or None; see `read_filter`.
      encoded: the same texts for a pretrained encoder, in addition to bags of words: their embeddings,
        float32 `[N, E]` (possibly memory-mapped), or their tokens if the encoder is fine-tuned; or None.

    Raises:
      ValueError: the arrays differ in N, or an array has another dtype, rank or format than above.
    """

    features: np.ndarray | scipy.sparse.csr_array
    labels: scipy.sparse.csr_array
    excluded: scipy.sparse.csr_array | None = None
    encoded: np.ndarray | TokenLists | None = None

    def __post_init__(self):
        if not isinstance(self.features, np.ndarray | scipy.sparse.csr_array):
            raise ValueError(
                f"features must be an ndarray or a csr_array, got {type(self.features).__name__}"
            )
        if self.features.ndim != 2 or self.features.dtype != np.float32:
            raise ValueError(
                f"features must be float32 [N, D], got {self.features.dtype} of shape {self.features.shape}"
            )
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
        if self.encoded is None:
            return
        if not self.is_sparse:
            raise ValueError("encoded texts go with bags of words; embeddings alone are dense features")
        if len(self.encoded) != len(self):
            raise ValueError(f"encoded has {len(self.encoded)} texts but features {len(self)} rows")

    def __len__(self) -> int:
        return self.features.shape[0]

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
                some = matrix[rows]
                parts += [some.indptr, some.indices, some.data]
        for part in parts:
            array = np.ascontiguousarray(part)
            digest.update((array.astype(np.int64) if array.dtype.kind in "iu" else array).tobytes())
        return digest.hexdigest()[:16]

    @property
    def num_features(self) -> int:
        """D, the number of features."""
        return self.features.shape[1]

    @property
    def num_labels(self) -> int:
        """L, the number of labels."""
        return self.labels.shape[1]

    @property
    def is_sparse(self) -> bool:
        """Whether the features are a sparse matrix, such as bags of words."""
        return not isinstance(self.features, np.ndarray)

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
        return Dataset(self.features[rows], self.labels[rows], excluded, encoded)


def read_xmc_text(path: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> Dataset:
    """Read the text format of the Extreme Classification Repository.

    The first line is `N D L`; each of the following N lines is
    `label,label,... feature:value feature:value ...`. The line of a point without labels begins with a space,
    and the line of a point without features ends after its labels. Ids count from 0. Repeated labels of a
    point count once; repeated features are an error.

    Args:
      path: the file to read.
      cache_dir: directory in which to cache the parsed matrices, with checksums. They are memory-mapped from
        there in this call and later ones, until the size or the time stamp of `path` changes. A damaged
        cache entry is replaced. None for no cache.

    Returns:
      The data set, with sparse features and bool labels.

    Raises:
      ValueError: the file is malformed; the message names the line.
    """
    if cache_dir is None:
        return _parse_xmc_text(path)
    source = os.stat(path)
    entry = Path(cache_dir) / f"{Path(path).name}-{source.st_size}-{source.st_mtime_ns}"
    if entry.exists():
        try:
            return _load_parsed(entry, path)
        except ValueError as error:
            _log.warning("parsing %s again: %s", path, error)
            shutil.rmtree(entry, ignore_errors=True)  # If it cannot be deleted, loading fails again below.
    dataset = _parse_xmc_text(path)
    with files.new_directory(entry) as directory:
        storage.save_csr(directory / "features", dataset.features)
        storage.save_csr(directory / "labels", dataset.labels)
    return _load_parsed(entry, path)


def _load_parsed(entry: Path, path: str | os.PathLike) -> Dataset:
    dataset = Dataset(storage.load_csr(entry / "features"), storage.load_csr(entry / "labels"))
    sizes = [len(dataset), dataset.num_features, dataset.num_labels]
    if sizes != _parse_header(path, _first_line(path), "N D L"):
        raise ValueError(f"{entry}: has other sizes than {path}")
    return dataset


def write_xmc_text(path: str | os.PathLike, dataset: Dataset) -> None:
    """Write the text format of the Extreme Classification Repository.

    `read_xmc_text` reads exactly the same values and labels. Zeros of dense features are not written.

    Args:
      path: the file to write; compressed if its name ends in `.gz` or `.xz`.
      dataset: the points to write.

    Raises:
      ValueError: a feature is infinite or NaN, or sparse features have unsorted or duplicate indices.
    """
    features, labels = dataset.features, dataset.labels
    dense = isinstance(features, np.ndarray)
    if not isinstance(features, np.ndarray) and not features.has_canonical_format:
        raise ValueError("features must have sorted indices without duplicates; see sum_duplicates()")
    with files.open_binary(path, "wb") as file:
        file.write(f"{len(dataset)} {dataset.num_features} {dataset.num_labels}\n".encode())
        for row in range(len(dataset)):
            ids, _ = _entries(labels, row)
            columns, values = _nonzeros(features[row]) if dense else _entries(features, row)
            if not np.isfinite(values).all():
                raise ValueError(f"{path}:{row + 2}: expected finite features, got inf or nan in row {row}")
            # astype(str) gives the shortest text from which the same float32 is read.
            pairs = " ".join(
                f"{column}:{value}" for column, value in zip(columns, values.astype(str), strict=True)
            )
            file.write(f"{','.join(map(str, ids))} {pairs}\n".encode())


def read_xmc_labels(path: str | os.PathLike) -> scipy.sparse.csr_array:
    """Read the label matrix format of the Extreme Classification Repository (`trn_X_Y.txt`).

    The first line is `N L`; each of the following N lines is `label:value label:value ...`, where `:value`
    may be missing, and a label with value 0 is absent. An empty line is a point without labels.

    Args:
      path: the file to read.

    Returns:
      Bool CSR matrix `[N, L]` with sorted indices without duplicates.

    Raises:
      ValueError: the file is malformed; the message names the line.
    """
    lines = files.read_lines(path)
    num_points, num_labels = _parse_header(path, next(lines, (1, b""))[1], "N L")
    rows = _Rows("label", num_labels)
    for where, line in _points(path, lines, num_points):
        named = set()
        for token in line.split():
            match = _LABEL_AND_VALUE.fullmatch(token)
            if match is None:
                raise ValueError(f"{where}: expected 'label' or 'label:value', got {_show(token)}")
            if match[2] is None or float(match[2]) != 0:
                named.add(int(match[1]))
        rows.append(where, named)
    return rows.matrix()


def write_xmc_labels(path: str | os.PathLike, labels: scipy.sparse.csr_array) -> None:
    """Write the label matrix format of the Extreme Classification Repository, for `read_xmc_labels`.

    Args:
      path: the file to write; compressed if its name ends in `.gz` or `.xz`.
      labels: `[N, L]`, as in a `Dataset`.
    """
    with files.open_binary(path, "wb") as file:
        file.write(f"{labels.shape[0]} {labels.shape[1]}\n".encode())
        for row in range(labels.shape[0]):
            ids, _ = _entries(labels, row)
            file.write((" ".join(f"{label}:1" for label in ids) + "\n").encode())


def read_filter(
    path: str | os.PathLike, num_points: int, num_labels: int | None = None
) -> scipy.sparse.csr_array:
    """Read a filter file of the Extreme Classification Repository (`filter_labels_test.txt`).

    Each line is `row label`, both from 0: the label is excluded from the ranking of this point in evaluation,
    because it is the point itself.

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
    limits = (("row", num_points), ("label", _LARGEST if num_labels is None else num_labels))
    for number, line in files.read_lines(path):
        fields = line.split()
        if len(fields) != 2 or not all(map(_WHOLE.fullmatch, fields)):
            raise ValueError(f"{path}:{number}: expected 'row label', got {_show(line)}")
        pair = [int(field) for field in fields]
        for (what, limit), value in zip(limits, pair, strict=True):
            if value >= limit:
                raise ValueError(f"{path}:{number}: expected a {what} below {limit}, got {value}")
        pairs.extend(pair)
    rows, labels = np.frombuffer(pairs, np.int64).reshape(-1, 2).T
    shape = (num_points, labels.max(initial=-1) + 1 if num_labels is None else num_labels)
    matrix = scipy.sparse.csr_array((np.ones(len(rows), bool), (rows, labels)), shape=shape)
    matrix.sum_duplicates()
    return matrix


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
    has_features = len(_first_line(labels).split()) == 3
    matrix = read_xmc_text(labels).labels if has_features else read_xmc_labels(labels)
    features = storage.open_npy(features_npy)
    try:
        dataset = Dataset(features, matrix)
    except ValueError as error:
        raise ValueError(f"{features_npy} with labels from {labels}: {error}") from error
    storage.check_finite(features_npy, features)
    return dataset


def read_tsv(path: str | os.PathLike) -> tuple[list[list[str]], list[str]]:
    """Read raw text with named labels: UTF-8 lines `label|label|...<TAB>text`.

    The part before the first tab may be empty, for a point without labels. Blanks around a label are removed,
    and so is a byte order mark at the beginning of the file.

    Args:
      path: the file to read.

    Returns:
      `(labels, texts)`, both of length N: the label names of each point, and its text without changes.

    Raises:
      ValueError: the file is malformed, or begins with a header line `labels<TAB>text`; the message names the
        line.
    """
    labels, texts = [], []
    for number, line in files.read_text_lines(path):
        names, tab, text = line.partition("\t")
        if not tab:
            fault = f"no tab in {line[:40]!r}" if line.strip() else "a blank line"
            raise ValueError(f"{path}:{number}: expected 'label|label|...<TAB>text', got {fault}")
        if "\r" in line:
            raise ValueError(f"{path}:{number}: expected lines that end in \\n or \\r\\n, got \\r within one")
        names = names.strip(_BLANKS)
        if number == 1 and re.fullmatch(r"labels?\ttexts?", f"{names}\t{text}", re.IGNORECASE):
            raise ValueError(f"{path}:1: expected no headings, got {line!r}: remove that line")
        labels.append([name.strip(_BLANKS) for name in names.split("|")] if names else [])
        if "" in labels[-1]:
            raise ValueError(f"{path}:{number}: expected a label on each side of a bar, got {names!r}")
        texts.append(text)
    return labels, texts


def write_tsv(path: str | os.PathLike, labels: Sequence[Sequence[str]], texts: Sequence[str]) -> None:
    """Write raw text with named labels, for `read_tsv`. Equal input gives byte-identical files.

    Args:
      path: the file to write; compressed if its name ends in `.gz` or `.xz`.
      labels: the label names of each of the N points.
      texts: the N texts.

    Raises:
      ValueError: a label is empty, contains a bar, tab or line break, or has blanks around it; a text has a
        line break; or the lengths differ. No file is written in these cases.
    """
    if len(labels) != len(texts):
        raise ValueError(f"{path}: {len(labels)} lists of labels but {len(texts)} texts")
    lines = []
    for number, (names, text) in enumerate(zip(labels, texts, strict=True), start=1):
        for name in names:
            if not name or name != name.strip(_BLANKS) or re.search(r"[|\t\r\n]", name):
                raise ValueError(
                    f"{path}:{number}: a label must be non-empty, without |, tab, line break or blanks "
                    f"around it, got {name!r}"
                )
        if re.search(r"[\r\n]", text):
            raise ValueError(f"{path}:{number}: a text must not contain a line break, got {text!r}")
        lines.append(f"{'|'.join(names)}\t{text}\n")
    with files.open_binary(path, "wb") as file:
        file.writelines(line.encode() for line in lines)


def _first_line(path: str | os.PathLike) -> bytes:
    with contextlib.closing(files.read_lines(path)) as lines:
        return next(lines, (1, b""))[1]


def _parse_header(path: str | os.PathLike, header: bytes, form: str) -> list[int]:
    sizes = [int(field) if _WHOLE.fullmatch(field) else -1 for field in header.split()]
    if len(sizes) != len(form.split()) or not all(0 <= size <= _LARGEST for size in sizes):
        raise ValueError(
            f"{path}:1: expected a header '{form}' of whole numbers below 2^31, got {_show(header)}"
        )
    return sizes


def _points(
    path: str | os.PathLike, lines: Iterator[tuple[int, bytes]], num_points: int
) -> Iterator[tuple[str, bytes]]:
    """Yield `(path:line, line)` for each line after the header, and check the number of lines."""
    number = 1
    for number, line in lines:
        if number > num_points + 1:
            raise ValueError(f"{path}:{number}: expected {num_points} points, as the header says, got more")
        yield f"{path}:{number}", line
    if number != num_points + 1:
        raise ValueError(
            f"{path}:{number}: expected {num_points} points, as the header says, got {number - 1}"
        )


def iterate_xmc_text(path: str | os.PathLike, count: int) -> Iterator[Dataset]:
    """Read the text format of `read_xmc_text` in parts of `count` points.

    Args:
      path: the file to read.
      count: number of points in a part.

    Yields:
      A data set of the next points; the last one may be smaller.

    Raises:
      ValueError: the file is malformed; points before the malformed line may have been yielded already.
    """
    lines = files.read_lines(path)
    num_points, num_features, num_labels = _parse_header(path, next(lines, (1, b""))[1], "N D L")
    points = _points(path, lines, num_points)
    while part := list(itertools.islice(points, count)):
        yield _parse_points(part, num_features, num_labels)


def _parse_xmc_text(path: str | os.PathLike) -> Dataset:
    lines = files.read_lines(path)
    num_points, num_features, num_labels = _parse_header(path, next(lines, (1, b""))[1], "N D L")
    return _parse_points(_points(path, lines, num_points), num_features, num_labels)


def _parse_points(points: Iterable[tuple[str, bytes]], num_features: int, num_labels: int) -> Dataset:
    features = _Rows("feature", num_features)
    labels = _Rows("label", num_labels)
    values = array.array("f")
    for where, line in points:
        if not line:
            raise ValueError(f"{where}: blank line; a point without labels must begin with a space")
        names, _, pairs = line.partition(b" ")
        labels.append(where, _parse_labels(where, names))
        columns, weights = _parse_features(where, pairs)
        features.append(where, columns)
        values.frombytes(weights[np.argsort(columns)].tobytes())
    return Dataset(features.matrix(np.frombuffer(values, np.float32)), labels.matrix())


def _parse_labels(where: str, names: bytes) -> set[int]:
    if not _LABELS.fullmatch(names):
        raise ValueError(f"{where}: expected 'label,label,...' before the first space, got {_show(names)}")
    return set(map(int, names.split(b","))) if names else set()


def _parse_features(where: str, pairs: bytes) -> tuple[list[int], np.ndarray]:
    if not _FEATURES.fullmatch(pairs):
        wrong = next(token for token in pairs.split() if not _FEATURE.fullmatch(token))
        raise ValueError(f"{where}: expected 'feature:value', got {_show(wrong)}")
    numbers = pairs.replace(b":", b" ").split()
    columns = list(map(int, numbers[::2]))
    if len(set(columns)) < len(columns):
        ((twice, _),) = collections.Counter(columns).most_common(1)
        raise ValueError(f"{where}: expected each feature once, got {twice} twice")
    with np.errstate(over="ignore"):
        values = np.array(list(map(float, numbers[1::2]))).astype(np.float32)
    if not np.isfinite(values).all():
        wrong = numbers[1::2][np.isfinite(values).argmin()]
        raise ValueError(f"{where}: expected values that float32 can hold, got {_show(wrong)}")
    return columns, values


class _Rows:
    """A builder of CSR matrices by rows, which needs a few bytes per entry."""

    def __init__(self, kind: str, num_columns: int):
        self._kind = kind
        self._num_columns = num_columns
        self._indices = array.array("i")
        self._indptr = array.array("q", [0])

    def append(self, where: str, columns: Collection[int]) -> None:
        """Append a row with these distinct columns, in any order."""
        if columns and max(columns) >= self._num_columns:
            raise ValueError(
                f"{where}: expected {self._kind} ids below {self._num_columns}, as the header says, "
                f"got {max(columns)}"
            )
        self._indices.extend(sorted(columns))
        self._indptr.append(len(self._indices))

    def matrix(self, data: np.ndarray | None = None) -> scipy.sparse.csr_array:
        """Return the matrix, with the entries `data`; True if `data` is None."""
        indices = np.frombuffer(self._indices, np.int32)
        if data is None:
            data = np.ones(len(indices), bool)
        indptr = np.frombuffer(self._indptr, np.int64)
        return scipy.sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1, self._num_columns))


def _entries(matrix: scipy.sparse.csr_array, row: int) -> tuple[np.ndarray, np.ndarray]:
    part = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return matrix.indices[part], matrix.data[part]


def _nonzeros(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (columns,) = values.nonzero()
    return columns, values[columns]


def _show(text: bytes) -> str:
    """Return the beginning of a piece of a file, for an error message."""
    return repr(text[:40].decode(errors="replace"))
