"""Saving of arrays and CSR matrices, which are memory-mapped when read."""

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
_BLOCK_VALUES = 1 << 24


def open_npy(path: str | os.PathLike) -> np.ndarray:
    """Open a `.npy` file, memory-mapped read-only.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the file is not a `.npy` file, is truncated, or contains Python objects; the message names
        it.
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
    except Exception as error:  # NumPy parses the header as Python source, which may raise any exception.
        reason = " ".join(str(error).split())  # Some messages span several lines.
        raise ValueError(f"{path}: not a whole .npy file: {reason}") from error


def check_finite(path: str | os.PathLike, matrix: np.ndarray) -> None:
    """Raise ValueError, naming `path` and the row, if a matrix `[N, D]` has an infinite or NaN value.

    Checks blocks of rows, so that a memory-mapped matrix may be larger than the memory.
    """
    rows = max(1, _BLOCK_VALUES // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), rows):
        finite = np.isfinite(matrix[start : start + rows]).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{path}: expected finite values, got inf or nan in row {start + finite.argmin()}"
            )


def seal(directory: Path, names: Sequence[str]) -> None:
    """Write the checksums of files in a directory to a file there, for `check_sealed`."""
    files.write_text(directory / _CHECKSUMS, json.dumps(files.checksums(directory, names)))


def check_sealed(directory: Path, names: Sequence[str]) -> None:
    """Raise ValueError, naming a file, if files in a directory have changed since `seal` was called."""
    try:
        recorded = dict(json.loads((directory / _CHECKSUMS).read_text()))
        difference = files.differing_file(directory, recorded, names)
    except (OSError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if difference:
        raise ValueError(f"{difference} since it was saved")


def save_csr(directory: str | os.PathLike, matrix: scipy.sparse.csr_array) -> None:
    """Write a CSR matrix as `data.npy`, `indices.npy`, `indptr.npy` and `shape.json`, with checksums.

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
    """Read a CSR matrix saved by `save_csr`; its arrays stay on disk, memory-mapped read-only.

    Args:
      directory: the directory given to `save_csr`.

    Returns:
      The CSR matrix, with its original shape and dtypes.

    Raises:
      ValueError: a file is missing or has changed since it was saved; the message names the directory.
    """
    directory = Path(directory)
    try:
        check_sealed(directory, _FILES)
        shape = tuple(json.loads((directory / "shape.json").read_text()))
        arrays = tuple(open_npy(directory / f"{name}.npy") for name in _ARRAYS)
        return scipy.sparse.csr_array(arrays, shape=shape, copy=False)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory}: not a saved CSR matrix: {error}") from error
