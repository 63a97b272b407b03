"""Conversion and validation of points and labels passed by callers.

No function modifies its arguments; results share arrays with them if no conversion is needed.
"""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import scipy.sparse

from sparse_xmc.data.text import check_label_name

# Any object with `__array__` is accepted as a matrix: arrays of JAX or PyTorch, data frames.
Matrix: TypeAlias = np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix
TextsOrFeatures: TypeAlias = Iterable[str] | Matrix | Any
Labels: TypeAlias = Iterable[Iterable[str]] | Matrix | Any

_ROWS_AT_ONCE = 4096
_ENTRIES_AT_ONCE = 1 << 22


class LabelMatrix(NamedTuple):
    """A label matrix, with names of the labels if it was a data frame.

    Attributes:
      values: bool CSR matrix [N, L] in canonical format, without stored zeros.
      names: the L names of the columns of a data frame, or None.
    """

    values: scipy.sparse.csr_array
    names: list[str] | None = None


def read_points(X: TextsOrFeatures) -> list[str] | np.ndarray | scipy.sparse.csr_array:
    """Convert points to texts, or to features.

    Args:
      X: N texts: an iterable of str, or a column of a data frame; or features [N, D]: an array, a sparse
        matrix, a data frame of numbers, or a sequence of rows of numbers.

    Returns:
      A list of N str, or float32 features [N, D]: dense, or CSR in canonical format. An empty list for an
      iterable without items.

    Raises:
      TypeError: X is of another type.
      ValueError: X does not have two dimensions, or has values that are not finite in float32.
    """
    expected = "X must be a sequence of texts or a matrix of numbers [N, D]"
    values = _unwrap(X, expected)
    if isinstance(values, list):
        if not values or isinstance(values[0], str):
            return _check_texts(values)
        rows = _rows_to_array(values)
        if rows is None:
            return _check_texts(values)
        values = rows
    if not _is_numeric(values.dtype):
        raise TypeError(f"{expected}, got values of dtype {values.dtype}")
    if values.ndim != 2:
        raise ValueError(f"X must have shape [N, D], got {list(values.shape)}")
    with np.errstate(over="ignore"):  # Values that overflow become infinite, which is an error below.
        if isinstance(values, np.ndarray):
            features = np.asarray(values, np.float32)
        else:
            features = to_canonical(values, np.float32)
    _check_finite("X", features)
    return features


def read_labels(y: Labels) -> LabelMatrix | list[list[str]]:
    """Convert labels to a label matrix, or to a list of label names for each point.

    Args:
      y: an iterable of names (str) for each of N points; or a matrix [N, L], sparse or dense, whose nonzero
        elements are labels; or a data frame of numbers [N, L], whose column names are the label names or the
        numbers 0..L-1.

    Returns:
      A `LabelMatrix` for a matrix or a data frame; else a list of N lists of names.

    Raises:
      TypeError: y is of another type.
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
            check_label_name(name, " as the name of a column")
        if len(set(names)) < len(names):
            raise ValueError("y must have columns with distinct names, got a name twice")
    labels = scipy.sparse.csr_array(values != 0) if isinstance(values, np.ndarray) else to_binary(values)
    return LabelMatrix(labels, names)


def to_binary(matrix: Any) -> scipy.sparse.csr_array:
    """Return which elements of a sparse matrix are nonzero: bool, canonical CSR without stored zeros."""
    summed = to_canonical(matrix)
    nonzero = summed.data != 0
    binary = scipy.sparse.csr_array((nonzero, summed.indices, summed.indptr), shape=summed.shape)
    if not nonzero.all():
        binary = binary.copy()  # The indices may be shared with the caller's matrix.
        binary.eliminate_zeros()
    return binary


def to_canonical(matrix: Any, dtype: Any = None) -> scipy.sparse.csr_array:
    """Convert a sparse matrix to CSR with sorted, distinct indices; duplicates are added up.

    SciPy sorts indices in place, even within `matrix != 0`, and a conversion shares them. This function sorts
    a copy, and only if the indices are not sorted.
    """
    csr = scipy.sparse.csr_array(matrix, dtype=dtype)
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def _unwrap(values: Any, expected: str) -> Any:
    """Return sparse matrices unchanged, numeric arrays and data frames as arrays, other objects as a list.

    Raises:
      TypeError: the object is of another type; the message begins with `expected`.
    """
    if scipy.sparse.issparse(values):
        return values
    if isinstance(values, str | bytes):
        raise TypeError(f"{expected}, got a single {type(values).__name__}")
    if isinstance(values, Mapping | set | frozenset):
        raise TypeError(f"{expected}, got a {type(values).__name__}")
    if _column_names(values) is not None:
        return _frame_to_array(values, expected)
    # Columns of pandas, Polars and PyArrow: converted to arrays, their lists would become arrays of objects.
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
    """Return the column names of a data frame; None for other objects."""
    names = getattr(values, "column_names", None)  # PyArrow tables, whose attribute `columns` has arrays
    names = getattr(values, "columns", None) if names is None else names
    return None if names is None else list(names)


def _frame_to_array(frame: Any, expected: str) -> Any:
    """Return the numbers of a data frame as an array, or as a sparse matrix if the frame is sparse."""
    if hasattr(frame, "sparse"):  # pandas defines this accessor for frames of sparse columns only.
        return frame.sparse.to_coo()
    array = _to_array(frame, expected)
    if array.ndim != 2:
        raise TypeError(f"{expected}, got a {type(frame).__name__} that NumPy does not convert to a matrix")
    if _is_numeric(array.dtype):
        return array
    # Columns of different dtypes, such as int and bool, become one array of objects.
    rows = [list(row) for row in array]
    numeric = _rows_to_array(rows)
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
    except Exception as error:  # The class of the exception depends on the library of the object.
        raise TypeError(f"{expected}, got a {type(values).__name__}: {error}") from error


def _rows_to_array(rows: list[Any]) -> np.ndarray | None:
    """Convert a list of rows to an array of numbers; return None if this is impossible."""
    try:
        array = np.asarray(rows)
    except (TypeError, ValueError):  # such as rows of different lengths
        return None
    return array if _is_numeric(array.dtype) else None


def _is_numeric(dtype: np.dtype) -> bool:
    """Return whether a dtype is of real numbers, including JAX's own dtypes such as bfloat16."""
    return dtype.kind in "biuf" or jax.dtypes.issubdtype(dtype, np.floating)


def _check_texts(texts: list[Any]) -> list[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"X must be texts or a matrix of numbers; point {i} is {text!r}, a {type(text).__name__}"
            )
    return texts


def _check_names(point: int, names: Any) -> list[str]:
    """Return the label names of a point as a list, after checking them."""
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = list(names)  # converted once, as it may be an iterator
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"y must have a sequence of names (str) for each point, got {names!r} for point {point}"
        )
    where = f" for point {point}"
    for name in names:
        check_label_name(name, where)
    return names


def _check_finite(name: str, matrix: np.ndarray | scipy.sparse.csr_array) -> None:
    """Raise ValueError, naming the point, if a matrix has a value that is not finite."""
    if isinstance(matrix, np.ndarray):
        for start in range(0, len(matrix), _ROWS_AT_ONCE):  # The matrix may be memory-mapped.
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
