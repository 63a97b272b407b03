import numpy as np
import pytest
from small_files import write

from sparse_xmc import data


class TestFilter:
    @pytest.mark.parametrize("num_labels", [5, None])
    def test_read_filter(self, tmp_path, num_labels):
        path = write(tmp_path / "filter.txt", "0 3\n2 1\r\n0 3\n0 0\n")
        expected = np.zeros((3, num_labels or 4), bool)
        expected[[0, 2, 0], [3, 1, 0]] = True
        read = data.read_filter(path, 3, num_labels)
        np.testing.assert_array_equal(read.toarray(), expected, strict=True)
        assert read.has_canonical_format

    def test_empty_file_excludes_nothing(self, tmp_path):
        path = write(tmp_path / "filter.txt", "")
        assert data.read_filter(path, 3, 4).shape == (3, 4)
        assert data.read_filter(path, 3).nnz == 0

    @pytest.mark.parametrize(
        ("line", "fault"),
        [
            ("3 0", "expected a row below 3, got 3"),
            ("0 4", "expected a label below 4, got 4"),
            ("0 9223372036854775808", "expected 'row label', got '0 9223372036854775808'"),
            ("0", "expected 'row label', got '0'"),
            ("0 -1", "expected 'row label', got '0 -1'"),
            ("", "expected 'row label', got ''"),
        ],
    )
    def test_malformed_lines_raise(self, tmp_path, line, fault):
        with pytest.raises(ValueError, match=rf"filter\.txt:2: {fault}"):
            data.read_filter(write(tmp_path / "filter.txt", f"1 1\n{line}\n"), 3, 4)
