"""Text formats of the Extreme Classification Repository: features with labels, and labels alone.

Files whose names end in `.gz` or `.xz` are decompressed. A ValueError for a malformed file begins with
`path:line`.
"""

import array
import collections
import itertools
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import scipy.sparse

from sparse_xmc.data import files, storage
from sparse_xmc.data.dataset import Dataset
from sparse_xmc.data.files import INTEGER, LARGEST_SIZE, excerpt

_log = logging.getLogger(__name__)

_INTEGER = re.compile(INTEGER)
_LABELS = re.compile(rb"(?:" + INTEGER + rb"(?:," + INTEGER + rb")*)?")
_NUMBER = rb"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_FEATURE = re.compile(INTEGER + rb":" + _NUMBER)
_FEATURES = re.compile(rb"\s*(?:" + INTEGER + rb":" + _NUMBER + rb"(?:\s+|$))*")
_LABEL_AND_VALUE = re.compile(rb"(" + INTEGER + rb")(?::(" + _NUMBER + rb"))?")


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
            return _load_cached(entry, path)
        except ValueError as error:
            _log.warning("parsing %s again: %s", path, error)
            shutil.rmtree(entry, ignore_errors=True)  # If it cannot be deleted, loading fails again below.
    dataset = _parse_xmc_text(path)
    with files.new_directory(entry) as directory:
        storage.save_csr(directory / "features", dataset.features)
        storage.save_csr(directory / "labels", dataset.labels)
    return _load_cached(entry, path)


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
    points, num_features, num_labels = _open_xmc_text(path)
    while part := list(itertools.islice(points, count)):
        yield _parse_points(part, num_features, num_labels)


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
    for where, line in _point_lines(path, lines, num_points):
        named = set()
        for token in line.split():
            match = _LABEL_AND_VALUE.fullmatch(token)
            if match is None:
                raise ValueError(f"{where}: expected 'label' or 'label:value', got {excerpt(token)}")
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


def _load_cached(entry: Path, path: str | os.PathLike) -> Dataset:
    dataset = Dataset(storage.load_csr(entry / "features"), storage.load_csr(entry / "labels"))
    sizes = [len(dataset), dataset.num_features, dataset.num_labels]
    if sizes != _parse_header(path, files.first_line(path), "N D L"):
        raise ValueError(f"{entry}: has other sizes than {path}")
    return dataset


def _parse_xmc_text(path: str | os.PathLike) -> Dataset:
    return _parse_points(*_open_xmc_text(path))


def _open_xmc_text(path: str | os.PathLike) -> tuple[Iterator[tuple[str, bytes]], int, int]:
    """Return the lines of the points, as `_point_lines` does, and the numbers of features and labels."""
    lines = files.read_lines(path)
    num_points, num_features, num_labels = _parse_header(path, next(lines, (1, b""))[1], "N D L")
    return _point_lines(path, lines, num_points), num_features, num_labels


def _parse_header(path: str | os.PathLike, header: bytes, form: str) -> list[int]:
    sizes = [int(field) if _INTEGER.fullmatch(field) else -1 for field in header.split()]
    if len(sizes) != len(form.split()) or not all(0 <= size <= LARGEST_SIZE for size in sizes):
        raise ValueError(
            f"{path}:1: expected a header '{form}' of whole numbers below 2^31, got {excerpt(header)}"
        )
    return sizes


def _point_lines(
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
        raise ValueError(f"{where}: expected 'label,label,...' before the first space, got {excerpt(names)}")
    return set(map(int, names.split(b","))) if names else set()


def _parse_features(where: str, pairs: bytes) -> tuple[list[int], np.ndarray]:
    if not _FEATURES.fullmatch(pairs):
        wrong = next(token for token in pairs.split() if not _FEATURE.fullmatch(token))
        raise ValueError(f"{where}: expected 'feature:value', got {excerpt(wrong)}")
    numbers = pairs.replace(b":", b" ").split()
    columns = list(map(int, numbers[::2]))
    if len(set(columns)) < len(columns):
        ((twice, _),) = collections.Counter(columns).most_common(1)
        raise ValueError(f"{where}: expected each feature once, got {twice} twice")
    with np.errstate(over="ignore"):
        values = np.array(list(map(float, numbers[1::2]))).astype(np.float32)
    if not np.isfinite(values).all():
        wrong = numbers[1::2][np.isfinite(values).argmin()]
        raise ValueError(f"{where}: expected values that float32 can hold, got {excerpt(wrong)}")
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
