"""Arrays and CSR matrices on disk, memory-mapped when read."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse

from sparse_xmc.data import files

_ARRAYS = ("data", "indices", "indptr")
_FILES = (*(f"{name}.npy" for name in _ARRAYS), "shape.json")
_CHECKSUMS = "checksums.json"
_VALUES_AT_ONCE = 1 << 24


def open_npy(path: str | os.PathLike) -> np.ndarray:
    """Opens a `.npy` file, memory-mapped read-only.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is no such file, cut off, or one of Python objects; the message names it.
    """
    try:
        with open(path, "rb") as file:
            version, _ = np.lib.format.read_magic(file)
            shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(file)
            expected = file.tell() + dtype.itemsize * math.prod(shape)
            size = os.fstat(file.fileno()).st_size
        if dtype.hasobject:
            raise ValueError("expected numbers, got Python objects")
        if size != expected:
            raise ValueError(f"expected {expected:,} bytes, got {size:,}: half-downloaded?")
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise
    except Exception as error:  # a header is Python source: NumPy raises whatever its parser does
        reason = " ".join(str(error).split())  # some are paragraphs
        raise ValueError(f"{path}: not a whole .npy file: {reason}") from error


def check_finite(path: str | os.PathLike, matrix: np.ndarray) -> None:
    """Raises ValueError, naming `path` and the row, if a matrix `[N, D]` has a value that is inf or NaN.

    It may be memory-mapped and larger than the memory: some rows are checked at a time.
    """
    rows = max(1, _VALUES_AT_ONCE // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), rows):
        finite = np.isfinite(matrix[start : start + rows]).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{path}: expected finite values, got inf or nan in row {start + finite.argmin()}"
            )


def seal(directory: Path, names: Sequence[str]) -> None:
    """Records the checksums of files in a directory, for `check_sealed`."""
    files.write_text(directory / _CHECKSUMS, json.dumps(files.checksums(directory, names)))


def check_sealed(directory: Path, names: Sequence[str]) -> None:
    """Raises ValueError if files are not as they were when the directory was sealed, and says which."""
    try:
        recorded = dict(json.loads((directory / _CHECKSUMS).read_text()))
        wrong = files.differing_file(directory, recorded, names)
    except (OSError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if wrong:
        raise ValueError(f"{wrong} since it was saved")


def save_csr(directory: str | os.PathLike, matrix: scipy.sparse.csr_array) -> None:
    """Writes a CSR matrix as `data.npy`, `indices.npy`, `indptr.npy` and `shape.json`, with checksums.

    Args:
      directory: where the files go; created if missing.
      matrix: CSR matrix `[N, M]` of any dtype.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
        with files.new_file(directory / f"{name}.npy") as file:
            np.save(file, getattr(matrix, name))
    files.write_text(directory / "shape.json", json.dumps(matrix.shape))
    seal(directory, _FILES)


def load_csr(directory: str | os.PathLike) -> scipy.sparse.csr_array:
    """Reads what `save_csr` wrote; the arrays stay on disk and are memory-mapped read-only.

    Args:
      directory: the directory given to `save_csr`.

    Returns:
      The CSR matrix, with the shape and dtypes it was saved with.

    Raises:
      ValueError: a file is missing, or not as it was saved; the message names the directory.
    """
    directory = Path(directory)
    try:
        check_sealed(directory, _FILES)
        shape = tuple(json.loads((directory / "shape.json").read_text()))
        arrays = tuple(open_npy(directory / f"{name}.npy") for name in _ARRAYS)
        return scipy.sparse.csr_array(arrays, shape=shape, copy=False)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory}: not a saved CSR matrix: {error}") from error
