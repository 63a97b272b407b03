"""Helpers for the tests of file formats: small arrays, and functions that write and inspect files."""

import gzip
import lzma

import numpy as np
import scipy.sparse
from hypothesis import strategies as st

SUFFIXES = st.sampled_from(["", ".gz", ".xz"])


def csr(rows, dtype):
    return scipy.sparse.csr_array(np.array(rows, dtype))


def write(path, content):
    """Write text or bytes to a file, compressed as its suffix says; return the path."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return path


def is_memory_mapped(array):
    """Return whether an array is a view of a memory map."""
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = getattr(array, "base", None)
    return False


LABELS = csr([[0, 1], [1, 1]], bool)


FEATURES = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
