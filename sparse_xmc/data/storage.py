"""CSR matrices on disk, memory-mapped when read."""

import json
import os
from pathlib import Path

import numpy as np
import scipy.sparse

_ARRAYS = ("data", "indices", "indptr")


def save_csr(directory: str | os.PathLike, matrix: scipy.sparse.csr_array) -> None:
    """Writes a CSR matrix as `data.npy`, `indices.npy`, `indptr.npy` and `shape.json`.

    Args:
      directory: where the four files go; created if missing.
      matrix: CSR matrix `[N, M]` of any dtype.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
        np.save(directory / f"{name}.npy", getattr(matrix, name))
    (directory / "shape.json").write_text(json.dumps(matrix.shape))


def load_csr(directory: str | os.PathLike) -> scipy.sparse.csr_array:
    """Reads what `save_csr` wrote; the arrays stay on disk and are memory-mapped read-only.

    Args:
      directory: the directory given to `save_csr`.

    Returns:
      The CSR matrix, with the shape and dtypes it was saved with.

    Raises:
      ValueError: the files do not make up a CSR matrix; the message names the directory.
    """
    directory = Path(directory)
    try:
        shape = tuple(json.loads((directory / "shape.json").read_text()))
        arrays = tuple(np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        return scipy.sparse.csr_array(arrays, shape=shape, copy=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{directory}: not a saved CSR matrix: {error}") from error
