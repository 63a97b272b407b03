import os

import hypothesis
import pytest
from hypothesis import strategies as st
from small_files import SUFFIXES, write

from sparse_xmc import data


class TestTsv:
    TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))
    NAMES = st.text(st.characters(codec="utf-8", exclude_characters="|\t\r\n"), min_size=1).filter(
        lambda name: name == name.strip(" \u00a0\u3000\ufeff")
    )

    @hypothesis.given(points=st.lists(st.tuples(st.lists(NAMES), TEXTS)), suffix=SUFFIXES)
    def test_round_trip(self, tmp_path_factory, points, suffix):
        labels, texts = [names for names, _ in points], [text for _, text in points]
        path = tmp_path_factory.mktemp("tsv") / f"data.tsv{suffix}"
        data.write_tsv(path, labels, texts)
        assert data.read_tsv(path) == (labels, texts)

    def test_read_tsv(self, tmp_path):
        path = write(tmp_path / "data.tsv", "big cat|Löwe\ta\tlion\r\n\tno labels\nx\t\n")
        labels, texts = data.read_tsv(path)
        assert labels == [["big cat", "Löwe"], [], ["x"]]
        assert texts == ["a\tlion", "no labels", ""]

    def test_blanks_around_labels_and_byte_order_mark_are_stripped(self, tmp_path):
        path = write(tmp_path / "data.tsv", "\ufeffbig cat | lion\t text \n \tnone\n\u00a0x\t\n")
        assert data.read_tsv(path) == ([["big cat", "lion"], [], ["x"]], [" text ", "none", ""])

    @pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
    def test_written_files_are_reproducible(self, tmp_path, suffix):
        paths = [tmp_path / f"{name}.tsv{suffix}" for name in "ab"]
        for time, path in enumerate(paths):
            data.write_tsv(path, [["x"]], ["text"])
            os.utime(path, (time, time))
        assert paths[0].read_bytes() == paths[1].read_bytes()
        if suffix == ".gz":
            assert paths[0].read_bytes()[4:8] == bytes(4)  # the time stamp in a gzip header

    @pytest.mark.parametrize(
        ("text", "line", "fault"),
        [
            (
                b"a\tx\nno tab here\n",
                2,
                r"expected 'label\|label\|...<TAB>text', got no tab in 'no tab here'",
            ),
            (b"a\tx\n\nb\ty\n", 2, r"expected 'label\|label\|...<TAB>text', got a blank line"),
            (b"a\tx\n \n", 2, "expected .*, got a blank line"),
            (b"a||b\tx\n", 1, r"expected a label on each side of a bar, got 'a\|\|b'"),
            (b"a\tx\nb|\tx\n", 2, r"expected a label on each side of a bar, got 'b\|'"),
            (b"a\tx\nb\t\xff\n", 2, "not UTF-8"),
            (b"Label\tText\na\tx\n", 1, r"expected no headings, got 'Label\\tText': remove that line"),
            (b"a| \tx\n", 1, r"expected a label on each side of a bar, got 'a\|'"),
            (b"a\tx\rb\ty\r", 1, r"expected lines that end in .*, got \\r within one"),
        ],
    )
    def test_malformed_lines_raise(self, tmp_path, text, line, fault):
        with pytest.raises(ValueError, match=rf"bad\.tsv:{line}: {fault}"):
            data.read_tsv(write(tmp_path / "bad.tsv", text))

    @pytest.mark.parametrize(
        ("labels", "texts", "fault"),
        [
            ([["a"], ["b|c"]], ["x", "y"], r"out\.tsv:2: a label must be .*, got 'b\|c'"),
            ([["a"], ["b\tc"]], ["x", "y"], r"out\.tsv:2: a label must be .*, got 'b\\tc'"),
            ([["a\n"]], ["x"], r"out\.tsv:1: a label must be .*, got 'a\\n'"),
            ([["a", ""]], ["x"], r"out\.tsv:1: a label must be non-empty"),
            ([["a "]], ["x"], r"out\.tsv:1: a label must be .* without .* blanks around it, got 'a '"),
            ([["\ufeffa"]], ["x"], r"out\.tsv:1: a label must be .* blanks around it"),
            ([["a"]], ["x\ny"], r"out\.tsv:1: a text must not contain a line break, got 'x\\ny'"),
            ([["a"]], ["x\r"], r"out\.tsv:1: a text must not contain a line break"),
            ([["a"]], ["x", "y"], r"out\.tsv: 1 lists of labels but 2 texts"),
        ],
    )
    def test_write_of_invalid_points_raises(self, tmp_path, labels, texts, fault):
        with pytest.raises(ValueError, match=fault):
            data.write_tsv(tmp_path / "out.tsv", labels, texts)
        assert not (tmp_path / "out.tsv").exists()
