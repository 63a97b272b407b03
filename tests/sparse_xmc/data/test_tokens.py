"""Tests of the tokenizer, and of token lists in padded batches."""

import json
import sys

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from sparse_xmc.data.tokens import Tokenizer, TokenLists

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog", "##s", "run", "a", "the"]
TEXTS = ["the dogs run", "", "a dog", "cats " * 50]


def write_tokenizer(directory, words=WORDS):
    """Write a WordPiece tokenizer with BERT's special tokens; return the directory."""
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=100)  # some published files set this; it must have no effect
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


class TestTokenizer:
    def test_ids_of_known_texts(self, tmp_path):
        lists = Tokenizer.from_directory(write_tokenizer(tmp_path), max_length=6)(TEXTS)
        assert (len(lists), lists.max_length) == (4, 6)
        assert (lists.ids.dtype, lists.indptr.dtype) == (np.int32, np.int64)
        expected = [[2, 8, 4, 5, 6, 3], [2, 3], [2, 7, 4, 3], [2, 1, 1, 1, 1, 3]]  # the last is truncated
        np.testing.assert_array_equal(lists.ids, np.concatenate(expected))
        np.testing.assert_array_equal(lists.lengths, [6, 2, 4, 6])

    def test_no_texts(self, tmp_path):
        lists = Tokenizer.from_directory(write_tokenizer(tmp_path))([])
        assert (len(lists), lists.ids.shape, lists.max_length) == (0, (0,), 512)

    def test_tokenizing_in_chunks_matches_one_call(self, tmp_path, monkeypatch):
        tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path))
        whole = tokenizer(TEXTS * 3)
        monkeypatch.setattr("sparse_xmc.data.tokens._TEXTS_AT_ONCE", 5)
        pieces = tokenizer(tuple(TEXTS * 3))
        np.testing.assert_array_equal(pieces.ids, whole.ids)
        np.testing.assert_array_equal(pieces.indptr, whole.indptr)

    def test_save_and_load_round_trip(self, tmp_path):
        tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path / "a"), max_length=5)
        tokenizer.save(tmp_path / "b")
        again = Tokenizer.from_directory(tmp_path / "b")
        assert again.max_length == 5
        np.testing.assert_array_equal(again(TEXTS).ids, tokenizer(TEXTS).ids)

    def test_invalid_tokenizer_raises(self, tmp_path):
        with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
            Tokenizer.from_directory(tmp_path)
        (tmp_path / "tokenizer.json").write_text(json.dumps({"words": WORDS}))
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
            Tokenizer.from_directory(tmp_path)
        with pytest.raises(ValueError, match=r"max_length must be above 2, .* got 2"):
            Tokenizer.from_directory(write_tokenizer(tmp_path), max_length=2)

    def test_missing_tokenizers_package_raises(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match=r"pip install 'sparse-xmc\[text\]'"):
            Tokenizer.from_directory(tmp_path)


def make_lists(lengths, max_length):
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return TokenLists(np.arange(1, indptr[-1] + 1, dtype=np.int32), indptr, max_length)


class TestTokenLists:
    @hypothesis.given(st.data())
    def test_take_pads_rows(self, data):
        lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=8))
        lists = make_lists(lengths, max(1, *lengths, data.draw(st.integers(1, 100))))
        rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9))
        batch = lists.take(rows)
        assert (batch.ids.dtype, batch.lengths.dtype) == (np.int32, np.int32)
        assert batch.ids.shape == (len(rows), lists.width(max([lengths[row] for row in rows], default=0)))
        for row, ids, length in zip(rows, batch.ids, batch.lengths, strict=True):
            expected = lists.ids[lists.indptr[row] : lists.indptr[row + 1]]
            np.testing.assert_array_equal(ids, np.pad(expected, (0, batch.ids.shape[1] - length)))

    def test_width_has_few_values(self):
        lists = make_lists([1], 512)
        widths = [lists.width(length) for length in range(513)]
        assert sorted(set(widths)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
        assert all(width >= length for length, width in enumerate(widths))
        assert make_lists([1], 20).width(17) == make_lists([1], 20).width(20) == 20

    def test_take_from_memory_map(self, tmp_path):
        lists = make_lists([3, 0, 20], 32)
        np.save(tmp_path / "ids.npy", lists.ids)
        mapped = TokenLists(np.load(tmp_path / "ids.npy", mmap_mode="r"), lists.indptr, 32)
        batch = mapped.take(np.array([2, 0]))
        assert type(batch.ids) is np.ndarray
        np.testing.assert_array_equal(batch.ids, lists.take([2, 0]).ids)
