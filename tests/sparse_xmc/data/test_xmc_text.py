import os
import shutil

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import strategies as st
from small_files import LABELS, SUFFIXES, csr, is_memory_mapped, write

from sparse_xmc import data
from sparse_xmc.data import files, xmc_text


@st.composite
def datasets(draw):
    n, d, num_labels = (draw(st.integers(0, 4)) for _ in range(3))
    values = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.just(0.0)
    features = draw(hnp.arrays(np.float32, (n, d), elements=values))
    if draw(st.booleans()):
        features = scipy.sparse.csr_array(features)
    labels = draw(
        hnp.arrays(draw(st.sampled_from([bool, np.uint8])), (n, num_labels), elements=st.integers(0, 1))
    )
    return data.Dataset(features, scipy.sparse.csr_array(labels))


# The largest and the smallest positive float32. The largest is written as a slightly larger decimal.
EXTREMES = data.Dataset(np.array([[3.4028235e38, -3.4028235e38, 1e-45]], np.float32), csr([[1]], bool))


class TestXmcText:
    @hypothesis.given(dataset=datasets(), suffix=SUFFIXES)
    @hypothesis.example(dataset=EXTREMES, suffix="")
    def test_round_trip(self, tmp_path_factory, dataset, suffix):
        path = tmp_path_factory.mktemp("xmc") / f"data.txt{suffix}"
        data.write_xmc_text(path, dataset)
        read = data.read_xmc_text(path)
        features = scipy.sparse.csr_array(dataset.features)
        np.testing.assert_array_equal(read.features.toarray(), features.toarray(), strict=True)
        np.testing.assert_array_equal(
            read.labels.toarray(), dataset.labels.toarray().astype(bool), strict=True
        )

    # Unsorted labels and features, a repeated label, no labels, no features, neither, CRLF, several spaces.
    TEXT = "4 5 3\n2,0,2 4:-.5 1:2\n  0:1e-3\r\n1\n \n"

    @pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
    def test_read(self, tmp_path, suffix):
        dataset = data.read_xmc_text(write(tmp_path / f"data.txt{suffix}", self.TEXT))
        expected = [[0, 2, 0, 0, -0.5], [1e-3, 0, 0, 0, 0], [0] * 5, [0] * 5]
        np.testing.assert_array_equal(dataset.features.toarray(), np.array(expected, np.float32), strict=True)
        assert dataset.features.has_sorted_indices
        np.testing.assert_array_equal(dataset.labels.toarray(), [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
        assert dataset.labels.dtype == bool

    def test_write(self, tmp_path):
        features = np.array([[0.1, 0, -2], [0, 0, 0], [0, 3, 0]], np.float32)
        dataset = data.Dataset(features, csr([[1, 0, 1], [0, 1, 0], [0, 0, 0]], bool))
        data.write_xmc_text(tmp_path / "data.txt", dataset)
        assert (tmp_path / "data.txt").read_text() == "3 3 3\n0,2 0:0.1 2:-2.0\n1 \n 1:3.0\n"

    @pytest.mark.parametrize(
        ("text", "line", "fault"),
        [
            ("", 1, "expected a header 'N D L' of whole numbers below 2.31, got ''"),
            ("1 2 10000000000\n0 0:1\n", 1, "expected a header 'N D L' .* below 2.31, got '1 2 10000000000'"),
            (f"1 2 {'9' * 5000}\n", 1, "expected a header 'N D L' .* below 2.31, got '1 2 999"),
            (f"1 2 3\n{'9' * 5000} 0:1\n", 2, "expected 'label,label,...' before the first space, got '999"),
            (f"1 2 3\n0 {'9' * 5000}:1\n", 2, "expected 'feature:value', got '999"),
            ("1 2\n0 0:1\n", 1, "expected a header 'N D L' .*, got '1 2'"),
            ("1 -2 3\n0 0:1\n", 1, "expected a header 'N D L' .*, got '1 -2 3'"),
            ("2 2 2\n0 0:1\n", 2, "expected 2 points, as the header says, got 1"),
            ("1 2 2\n0 0:1\n1 1:1\n", 3, "expected 1 points, as the header says, got more"),
            ("2 2 2\n0 0:1\n\n", 3, "blank line"),
            ("1 2 2\n0:1 1:1\n", 2, "expected 'label,label,...' before the first space, got '0:1'"),
            ("1 2 2\n0,,1 1:1\n", 2, "expected 'label,label,...' before the first space, got '0,,1'"),
            ("1 2 2\n2 1:1\n", 2, "expected label ids below 2, as the header says, got 2"),
            ("1 2 2\n0 0:1 2:1\n", 2, "expected feature ids below 2, as the header says, got 2"),
            ("1 2 2\n0 0:1 1\n", 2, "expected 'feature:value', got '1'"),
            ("1 2 2\n0 1:2:0 1\n", 2, "expected 'feature:value', got '1:2:0'"),
            ("1 2 2\n0 1: 1\n", 2, "expected 'feature:value', got '1:'"),
            ("1 2 2\n0 -1:1\n", 2, "expected 'feature:value', got '-1:1'"),
            ("1 2 2\n0 1:nan\n", 2, "expected 'feature:value', got '1:nan'"),
            ("1 2 2\n0 0:1 1:1e39\n", 2, "expected values that float32 can hold, got '1e39'"),
            ("1 2 2\n0 1:1 0:3 1:2\n", 2, "expected each feature once, got 1 twice"),
        ],
    )
    def test_malformed_files_raise(self, tmp_path, text, line, fault):
        with pytest.raises(ValueError, match=rf"bad\.txt:{line}: {fault}"):
            data.read_xmc_text(write(tmp_path / "bad.txt", text))

    def test_repeated_feature_in_long_line_raises(self, tmp_path):
        # Counting the features one by one takes minutes.
        pairs = " ".join(f"{feature}:1" for feature in [*range(300_000), 299_999])
        with pytest.raises(ValueError, match=r"bad\.txt:2: expected each feature once, got 299999 twice"):
            data.read_xmc_text(write(tmp_path / "bad.txt", f"1 300000 1\n0 {pairs}\n"))

    @pytest.mark.parametrize("suffix", [".gz", ".xz"])
    def test_truncated_file_raises(self, tmp_path, suffix):
        path = write(tmp_path / f"cut{suffix}", self.TEXT)
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(ValueError, match=rf"cut\{suffix}:\d: damaged compressed file"):
            data.read_xmc_text(path)

    @pytest.mark.parametrize("suffix", [".gz", ".xz"])
    def test_uncompressed_file_with_compressed_suffix_raises(self, tmp_path, suffix):
        path = tmp_path / f"plain{suffix}"
        path.write_text(self.TEXT)
        with pytest.raises(ValueError, match=rf"plain\{suffix}:1: damaged compressed file"):
            data.read_xmc_text(path)

    def test_write_of_unreadable_features_raises(self, tmp_path):
        infinite = np.array([[1, 2], [np.inf, 0]], np.float32)
        with pytest.raises(ValueError, match=r"out:3: expected finite features, got inf or nan in row 1"):
            data.write_xmc_text(tmp_path / "out", data.Dataset(infinite, LABELS))
        twice = scipy.sparse.csr_array((np.ones(2, np.float32), [1, 1], [0, 2, 2]))
        with pytest.raises(ValueError, match="features must have sorted indices without duplicates"):
            data.write_xmc_text(tmp_path / "out", data.Dataset(twice, LABELS))


class TestCache:
    def test_second_read_uses_cache(self, tmp_path, monkeypatch):
        path = write(tmp_path / "data.txt", TestXmcText.TEXT)
        parsed = data.read_xmc_text(path)
        first = data.read_xmc_text(path, cache_dir=tmp_path / "cache")
        monkeypatch.delattr(xmc_text, "_parse_xmc_text")
        second = data.read_xmc_text(path, cache_dir=tmp_path / "cache")
        for cached in (first, second):
            assert is_memory_mapped(cached.features.data)
            assert is_memory_mapped(cached.features.indices)
            assert is_memory_mapped(cached.labels.indices)
            np.testing.assert_array_equal(cached.features.toarray(), parsed.features.toarray(), strict=True)
            np.testing.assert_array_equal(cached.labels.toarray(), parsed.labels.toarray(), strict=True)

    @pytest.mark.parametrize(
        ("text", "seconds_later"), [("1 1 1\n0 0:7\n", 5), ("1 1 1\n0 0:70\n", 0)], ids=["time", "size"]
    )
    def test_changed_source_is_parsed_again(self, tmp_path, text, seconds_later):
        path = write(tmp_path / "data.txt", "1 1 1\n0 0:3\n")
        time = path.stat().st_mtime_ns
        data.read_xmc_text(path, cache_dir=tmp_path / "cache")
        write(path, text)
        os.utime(path, ns=(time, time + seconds_later * 10**9))
        dataset = data.read_xmc_text(path, cache_dir=tmp_path / "cache")
        assert dataset.features.toarray() == float(text.split(":")[1])

    def test_source_of_damaged_cache_is_parsed_again(self, tmp_path, caplog, monkeypatch):
        path = write(tmp_path / "data.txt", TestXmcText.TEXT)
        parsed = data.read_xmc_text(path, cache_dir=tmp_path / "cache")
        parts = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
        assert len(parts) == 10

        def flip_a_bit(part):
            content = bytearray(part.read_bytes())
            content[-1] ^= 1
            part.write_bytes(content)

        for damage in (flip_a_bit, lambda part: os.truncate(part, part.stat().st_size - 1), os.remove):
            for part in parts:
                damage(part)
                again = data.read_xmc_text(path, cache_dir=tmp_path / "cache")
                assert caplog.messages[0].startswith(f"parsing {path} again: {part.parent}: not a saved")
                caplog.clear()
                np.testing.assert_array_equal(again.features.toarray(), parsed.features.toarray())
                np.testing.assert_array_equal(again.labels.toarray(), parsed.labels.toarray())
                assert is_memory_mapped(again.features.data)
        monkeypatch.delattr(xmc_text, "_parse_xmc_text")
        data.read_xmc_text(path, cache_dir=tmp_path / "cache")
        assert not caplog.messages

    def test_source_of_mismatched_cache_is_parsed_again(self, tmp_path, caplog):
        for name, text in (("a.txt", TestXmcText.TEXT), ("b.txt", "1 1 1\n0 0:3\n")):
            data.read_xmc_text(write(tmp_path / name, text), cache_dir=tmp_path / name[0])
        ((ours,), (theirs,)) = ((tmp_path / name).iterdir() for name in "ab")
        shutil.rmtree(ours)
        theirs.rename(ours)
        assert len(data.read_xmc_text(tmp_path / "a.txt", cache_dir=tmp_path / "a")) == 4
        assert f"{ours}: has other sizes than {tmp_path / 'a.txt'}" in caplog.text

    def test_damaged_cache_that_cannot_be_replaced_raises(self, tmp_path, monkeypatch):
        path = write(tmp_path / "data.txt", TestXmcText.TEXT)
        data.read_xmc_text(path, cache_dir=tmp_path / "cache")
        (part,) = tmp_path.glob("cache/*/labels/indptr.npy")
        part.unlink()
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(ValueError, match=r"labels: not a saved CSR matrix: indptr\.npy is missing since"):
            data.read_xmc_text(path, cache_dir=tmp_path / "cache")

    def test_malformed_source_leaves_no_cache(self, tmp_path):
        path = write(tmp_path / "bad.txt", "1 1 1\n0 0:1 1:1\n")
        for _ in range(2):
            with pytest.raises(ValueError, match=r"bad\.txt:2"):
                data.read_xmc_text(path, cache_dir=tmp_path / "cache")
        assert not list(tmp_path.glob("cache/*"))

    def test_new_directory_is_discarded_on_failure(self, tmp_path):
        def fail_halfway():
            with files.new_directory(tmp_path / "target") as directory:
                (directory / "half").touch()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail_halfway()
        assert not list(tmp_path.iterdir())

    def test_new_directory_keeps_directory_of_another_process(self, tmp_path):
        with files.new_directory(tmp_path / "target") as directory:
            (directory / "ours").touch()
            (tmp_path / "target").mkdir()
            (tmp_path / "target" / "theirs").touch()
        assert [path.name for path in tmp_path.rglob("*")] == ["target", "theirs"]


class TestXmcLabels:
    def test_read(self, tmp_path):
        path = write(tmp_path / "trn_X_Y.txt", "4 3\n2:1 0:1.0\n\n1 2 1\n0:0 1:0.5\n")
        labels = data.read_xmc_labels(path)
        np.testing.assert_array_equal(
            labels.toarray(), np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1], [0, 1, 0]], bool), strict=True
        )
        assert labels.has_canonical_format

    @hypothesis.given(
        dense=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0)),
        suffix=SUFFIXES,
        value=st.sampled_from(["", ":1", ":0.25"]),
    )
    def test_round_trip(self, tmp_path_factory, dense, suffix, value):
        lines = [" ".join(f"{label}{value}" for label in row.nonzero()[0]) for row in dense]
        text = "".join(f"{line}\n" for line in [f"{dense.shape[0]} {dense.shape[1]}", *lines])
        path = write(tmp_path_factory.mktemp("labels") / f"Y.txt{suffix}", text)
        labels = data.read_xmc_labels(path)
        np.testing.assert_array_equal(labels.toarray(), dense, strict=True)
        again = path.with_name(f"again.txt{suffix}")
        data.write_xmc_labels(again, labels)
        np.testing.assert_array_equal(data.read_xmc_labels(again).toarray(), dense, strict=True)

    def test_write(self, tmp_path):
        data.write_xmc_labels(tmp_path / "Y.txt", csr([[1, 0, 1], [0, 0, 0]], bool))
        assert (tmp_path / "Y.txt").read_text() == "2 3\n0:1 2:1\n\n"

    @pytest.mark.parametrize(
        ("text", "line", "fault"),
        [
            ("1 2 3\n0:1\n", 1, "expected a header 'N L' of whole numbers below 2.31, got '1 2 3'"),
            (f"1 2\n{'9' * 5000}:1\n", 2, "expected 'label' or 'label:value', got '999"),
            ("1 2\n0:1 2:1\n", 2, "expected label ids below 2, as the header says, got 2"),
            ("1 2\n0:1 x:1\n", 2, "expected 'label' or 'label:value', got 'x:1'"),
            ("1 2\n0,1\n", 2, "expected 'label' or 'label:value', got '0,1'"),
            ("2 2\n0:1\n", 2, "expected 2 points, as the header says, got 1"),
            ("1 2\n0:1\n\n", 3, "expected 1 points, as the header says, got more"),
        ],
    )
    def test_malformed_files_raise(self, tmp_path, text, line, fault):
        with pytest.raises(ValueError, match=rf"bad\.txt:{line}: {fault}"):
            data.read_xmc_labels(write(tmp_path / "bad.txt", text))
