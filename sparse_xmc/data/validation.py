"""Conversion and validation of points and labels as callers give them.

Nothing here writes to an object of the caller's; results share its arrays where no conversion is needed.
"""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import scipy.sparse

# Anything with `__array__` is a matrix too: arrays of JAX or PyTorch, data frames.
Matrix: TypeAlias = np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix
Features: TypeAlias = Iterable[str] | Matrix | Any
Labels: TypeAlias = Iterable[Iterable[str]] | Matrix | Any

_ROWS_AT_ONCE = 4096
_ENTRIES_AT_ONCE = 1 << 22


class LabelMatrix(NamedTuple):
    """Labels given as a matrix.

    Attributes:
      values: bool CSR matrix [N, L] in canonical format, without stored zeros.
      names: the L names of the columns of a data frame, or None.
    """

    values: scipy.sparse.csr_array
    names: list[str] | None = None


def read_points(X: Features) -> list[str] | np.ndarray | scipy.sparse.csr_array:
    """Converts points to texts, or to features.

    Args:
      X: N texts: an iterable of str, or a column of a data frame; or features [N, D]: an array, a sparse
        matrix, a data frame of numbers, or a sequence of rows of numbers.

    Returns:
      A list of N str, or float32 features [N, D]: dense, or CSR in canonical format. An empty list for an
      iterable without items.

    Raises:
      TypeError: X is none of these.
      ValueError: X does not have two dimensions, or has values that are not finite in float32.
    """
    expected = "X must be a sequence of texts or a matrix of numbers [N, D]"
    values = _unwrap(X, expected)
    if isinstance(values, list):
        if not values or isinstance(values[0], str):
            return _check_texts(values)
        rows = _array_of_rows(values)
        if rows is None:
            return _check_texts(values)
        values = rows
    if not _is_numeric(values.dtype):
        raise TypeError(f"{expected}, got values of dtype {values.dtype}")
    if values.ndim != 2:
        raise ValueError(f"X must have shape [N, D], got {list(values.shape)}")
    with np.errstate(over="ignore"):  # what overflows is infinite, which is an error below
        if isinstance(values, np.ndarray):
            features = np.asarray(values, np.float32)
        else:
            features = to_canonical(values, np.float32)
    _check_finite("X", features)
    return features


def read_labels(y: Labels) -> LabelMatrix | list[list[str]]:
    """Converts labels to a label matrix, or to the names of each point's labels.

    Args:
      y: for each of N points an iterable of names (str); or a matrix [N, L], sparse or not, whose nonzero
        elements are labels; or a data frame of numbers [N, L] likewise, whose columns are named as the labels
        are, or by the numbers 0..L-1.

    Raises:
      TypeError: y is none of these.
      ValueError: y has another shape, values that are not finite, or names that cannot be saved.
    """
    expected = "y must be a sequence of names (str) for each point, or a matrix of numbers [N, L]"
    column_names = _column_names(y)
    values = _unwrap(y, expected)
    if isinstance(values, list):
        return [_check_names(i, names) for i, names in enumerate(values)]
    if not _is_numeric(values.dtype):
        raise TypeError(f"{expected}, got values of dtype {values.dtype}")
    if values.ndim != 2:
        raise ValueError(f"y must have shape [N, L], or be names for each point, got {list(values.shape)}")
    if not isinstance(values, np.ndarray):
        values = to_canonical(values)
    _check_finite("y", values)
    names = None
    if column_names is not None and column_names != list(range(values.shape[1])):
        names = column_names
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"y must have columns named by str, or 0..L-1, got a column named {name!r}")
            _check_name(name, "as the name of a column")
        if len(set(names)) < len(names):
            raise ValueError("y must have columns with distinct names, got a name twice")
    labels = scipy.sparse.csr_array(values != 0) if isinstance(values, np.ndarray) else to_binary(values)
    return LabelMatrix(labels, names)


def to_binary(matrix: Any) -> scipy.sparse.csr_array:
    """Which elements of a sparse matrix are not zero: bool CSR in canonical format without stored zeros."""
    summed = to_canonical(matrix)
    nonzero = summed.data != 0
    binary = scipy.sparse.csr_array((nonzero, summed.indices, summed.indptr), shape=summed.shape)
    if not nonzero.all():
        binary = binary.copy()  # its indices may be the caller's
        binary.eliminate_zeros()
    return binary


def to_canonical(matrix: Any, dtype: Any = None) -> scipy.sparse.csr_array:
    """A sparse matrix as CSR with sorted indices without duplicates, which are added.

    SciPy sorts in place, also within `matrix != 0`, and a conversion shares the indices. Here only a copy is
    sorted, and only if there is something to sort.
    """
    csr = scipy.sparse.csr_array(matrix, dtype=dtype)
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def _unwrap(values: Any, expected: str) -> Any:
    """A sparse matrix as it is, arrays of numbers and data frames as an array, and all else as a list.

    Raises:
      TypeError: it is none of these; the message begins with `expected`.
    """
    if scipy.sparse.issparse(values):
        return values
    if isinstance(values, str | bytes):
        raise TypeError(f"{expected}, got a single {type(values).__name__}")
    if isinstance(values, Mapping | set | frozenset):
        raise TypeError(f"{expected}, got a {type(values).__name__}")
    if _column_names(values) is not None:
        return _array_of_frame(values, expected)
    # Columns of pandas, Polars and PyArrow; as arrays their lists would be arrays of objects.
    for method in ("to_pylist", "to_list"):
        if not isinstance(values, np.ndarray) and hasattr(values, method):
            return getattr(values, method)()
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(f"{expected}, got an array with masked values")
    if hasattr(values, "__array__"):
        array = _to_array(values, expected)
        if array.ndim == 0:
            raise TypeError(f"{expected}, got {values!r}")
        return array.tolist() if array.dtype.kind in "OUST" else array
    try:
        items = iter(values)
    except TypeError:
        raise TypeError(f"{expected}, got {values!r}") from None
    return list(items)


def _column_names(values: Any) -> list[Any] | None:
    """The names of a data frame's columns; None for other objects."""
    names = getattr(values, "column_names", None)  # of PyArrow's tables, whose `columns` are arrays
    names = getattr(values, "columns", None) if names is None else names
    return None if names is None else list(names)


def _array_of_frame(frame: Any, expected: str) -> Any:
    """The numbers of a data frame as an array, or as a sparse matrix if the frame is sparse."""
    if hasattr(frame, "sparse"):  # an accessor that pandas gives to frames of sparse columns alone
        return frame.sparse.to_coo()
    array = _to_array(frame, expected)
    if array.ndim != 2:
        raise TypeError(f"{expected}, got a {type(frame).__name__} that NumPy does not convert to a matrix")
    if _is_numeric(array.dtype):
        return array
    # Columns of different dtypes, such as int and bool, become one array of objects.
    rows = [list(row) for row in array]
    numeric = _array_of_rows(rows)
    if numeric is not None:
        return numeric
    for i, row in enumerate(rows):
        for value in row:
            if not isinstance(value, numbers.Real):
                raise TypeError(
                    f"{expected}, got a data frame with {value!r} in point {i}; texts and lists of names are "
                    "given as one column"
                )
    raise TypeError(f"{expected}, got a data frame with values of dtype {array.dtype}")


def _to_array(values: Any, expected: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except Exception as error:  # which one depends on the library that the object is from
        raise TypeError(f"{expected}, got a {type(values).__name__}: {error}") from error


def _array_of_rows(rows: list[Any]) -> np.ndarray | None:
    """The array of numbers that a list of rows is equivalent to; None if there is none."""
    try:
        array = np.asarray(rows)
    except (TypeError, ValueError):  # such as rows of different lengths
        return None
    return array if _is_numeric(array.dtype) else None


def _is_numeric(dtype: np.dtype) -> bool:
    """Whether a dtype is of real numbers, those of JAX included, such as bfloat16."""
    return dtype.kind in "biuf" or jax.dtypes.issubdtype(dtype, np.floating)


def _check_texts(texts: list[Any]) -> list[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"X must be texts or a matrix of numbers; point {i} is {text!r}, a {type(text).__name__}"
            )
    return texts


def _check_names(point: int, names: Any) -> list[str]:
    """The names of a point's labels, as a list."""
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = list(names)  # once, as it may be an iterator
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"y must have a sequence of names (str) for each point, got {names!r} for point {point}"
        )
    for name in names:
        _check_name(name, f"for point {point}")
    return names


def _check_name(name: str, where: str) -> None:
    if not name or "\n" in name or "\r" in name:
        raise ValueError(f"labels must not be empty or have line breaks, got {name!r} {where}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"labels must be text that UTF-8 can encode, got {name!r} {where}") from None


def _check_finite(name: str, matrix: np.ndarray | scipy.sparse.csr_array) -> None:
    """Raises ValueError, naming the point, if a matrix has a value that is not finite."""
    if isinstance(matrix, np.ndarray):
        for start in range(0, len(matrix), _ROWS_AT_ONCE):  # it may be memory-mapped
            finite = np.isfinite(matrix[start : start + _ROWS_AT_ONCE]).all(axis=1)
            if not finite.all():
                _raise_not_finite(name, start + int(finite.argmin()))
        return
    for start in range(0, len(matrix.data), _ENTRIES_AT_ONCE):
        finite = np.isfinite(matrix.data[start : start + _ENTRIES_AT_ONCE])
        if not finite.all():
            entry = start + int(finite.argmin())
            _raise_not_finite(name, int(np.searchsorted(matrix.indptr, entry, side="right")) - 1)


def _raise_not_finite(name: str, point: int) -> None:
    raise ValueError(f"{name} must be finite, got NaN or infinity in point {point}")
