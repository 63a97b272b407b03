import struct

import numpy as np
import pytest
from small_files import FEATURES, LABELS, is_memory_mapped, write

from sparse_xmc import data
from sparse_xmc.data import storage


def npy_file(text):
    """Return the bytes of a .npy file with the given header and two values."""
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode() + bytes(8)


# For these NumPy raises OverflowError, ValueError, TokenError, RecursionError or IndexError.
BAD_HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 999999999999999999999), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -2), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2",
    "-" * 3000 + "1",
    "{'descr': ('f4',), 'fortran_order': False, 'shape': (1, 2), }",
)


class TestDense:
    @pytest.mark.parametrize("labels", ["2 2\n1:1\n0:1 1:1\n", "2 9 2\n1 8:1\n0,1\n"], ids=["N L", "N D L"])
    def test_read_dense(self, tmp_path, labels):
        np.save(tmp_path / "x.npy", FEATURES)
        dataset = data.read_dense(tmp_path / "x.npy", write(tmp_path / "y.txt", labels))
        np.testing.assert_array_equal(dataset.features, FEATURES, strict=True)
        np.testing.assert_array_equal(dataset.labels.toarray(), LABELS.toarray(), strict=True)
        assert is_memory_mapped(dataset.features)
        assert is_memory_mapped(dataset.take(slice(1)).features)

    @pytest.mark.parametrize(
        ("features", "labels", "fault"),
        [
            (FEATURES.astype(float), "2 2\n\n\n", r"x\.npy with .*y\.txt: features must be float32.*float64"),
            (FEATURES, "1 2\n\n", r"x\.npy with .*y\.txt: features have 2 rows but labels 1"),
            (FEATURES.astype(">f4"), "2 2\n\n\n", r"x\.npy with .*y\.txt: features must be float32.*>f4"),
            (FEATURES[0], "3 2\n\n\n\n", r"x\.npy with .*y\.txt: features must be float32.*shape \(3,\)"),
            (np.array([[None]]), "1 2\n\n", r"x\.npy: not a whole \.npy file: .*Python objects"),
            (np.float32([[1, 2], [3, np.inf]]), "2 2\n\n\n", r"x\.npy: expected finite .* in row 1$"),
            (np.float32([[np.nan, 2], [3, 4]]), "2 2\n\n\n", r"x\.npy: expected finite .* in row 0$"),
            (FEATURES, "2\n\n\n", r"y\.txt:1: expected a header 'N L'"),
            (FEATURES, "", r"y\.txt:1: expected a header 'N L'"),
        ],
    )
    def test_malformed_files_raise(self, tmp_path, features, labels, fault):
        np.save(tmp_path / "x.npy", features)
        with pytest.raises(ValueError, match=fault):
            data.read_dense(tmp_path / "x.npy", write(tmp_path / "y.txt", labels))

    def test_non_finite_value_is_found_in_any_block_of_rows(self, tmp_path, monkeypatch):
        features = np.zeros((50, 2), np.float32)
        features[41, 1] = np.nan
        np.save(tmp_path / "x.npy", features)
        monkeypatch.setattr(storage, "_BLOCK_VALUES", 16)
        with pytest.raises(ValueError, match=r"got inf or nan in row 41$"):
            data.read_dense(tmp_path / "x.npy", write(tmp_path / "y.txt", "50 2\n" + "\n" * 50))

    @pytest.mark.parametrize(
        "content", [b"", b"1 2 3\n", *(npy_file(text) for text in BAD_HEADERS)], ids=repr
    )
    def test_features_that_are_not_npy_raise(self, tmp_path, content):
        write(tmp_path / "x.npy", content)
        with pytest.raises(ValueError, match=r"x\.npy: not a whole \.npy file: "):
            data.read_dense(tmp_path / "x.npy", write(tmp_path / "y.txt", "1 2\n\n"))
