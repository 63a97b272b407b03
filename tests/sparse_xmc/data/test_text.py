import json
import math
import sys
import unicodedata
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

import sparse_xmc
from sparse_xmc.data import read_tsv, text

ROOT = Path(sparse_xmc.__file__).parents[1]

TEXTS = ["a B b", "A c, 7!"]


class TestTextEncoder:
    def test_features_match_manual_tf_idf(self):
        # The words are 7, a, b, c. a is in both texts, so its idf is 1; the idf of the others is ln(3/2) + 1.
        rare = math.log(3 / 2) + 1
        twice = (1 + math.log(2)) * rare  # b occurs twice in the first text
        expected = [
            [0, 1 / math.hypot(1, twice), twice / math.hypot(1, twice), 0],
            [
                rare / math.hypot(1, rare, rare),
                1 / math.hypot(1, rare, rare),
                0,
                rare / math.hypot(1, rare, rare),
            ],
        ]
        encoder = text.TextEncoder.fit(TEXTS, min_df=1)
        features = encoder(TEXTS)
        assert encoder.vocabulary_size == 4
        assert features.dtype == np.float32
        assert features.has_canonical_format
        np.testing.assert_allclose(features.toarray(), expected, rtol=1e-6)

    def test_unknown_words_are_ignored(self):
        features = text.TextEncoder.fit(TEXTS, min_df=1)(["unknown", "c unknown", ""])
        np.testing.assert_array_equal(features.toarray(), [[0] * 4, [0, 0, 0, 1], [0] * 4])

    def test_min_df_counts_texts(self):
        assert text.TextEncoder.fit(["b b", "a", "a"]).vocabulary_size == 1  # a; the default is 2
        assert text.TextEncoder.fit(["b b", "a", "a"], min_df=1).vocabulary_size == 2

    def test_max_features_keeps_the_most_frequent(self):
        encoder = text.TextEncoder.fit(["c b b", "a b a"], min_df=1, max_features=1)
        assert encoder(["a", "b", "c"]).toarray().tolist() == [[0], [1], [0]]

    def test_bigram_features_match_manual_tf_idf(self, tmp_path):
        encoder = text.TextEncoder.fit(["a b", "a b c"], ngrams=2, min_df=1)
        assert encoder.vocabulary_size == 5  # a, "a b", b, "b c", c
        rare = math.log(3 / 2) + 1
        encoder.save(tmp_path / "words.json")
        for fitted_or_loaded in (encoder, text.TextEncoder.load(tmp_path / "words.json")):
            features = fitted_or_loaded(["b c", "b, A"]).toarray()  # "b a" is not a known pair
            expected = np.array([[0, 0, 1, rare, rare], [1, 0, 1, 0, 0]])
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(features, expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("sample", "words"),
        [
            ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
            ("สวัสดี ชาวโลก", ["สวัสดี", "ชาวโลก"]),
            ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
            ("مَرْحَبًا بِكَ", ["مَرْحَبًا", "بِكَ"]),
            ("Crème, brûlée!", ["crème", "brûlée"]),
            ("İstanbul'da q\u0307x_7", ["i\u0307stanbul", "da", "q\u0307x_7"]),
            ("\u0301 a \u0301b", ["a", "b"]),  # a mark needs a letter before it
        ],
    )
    @pytest.mark.parametrize("form", ["NFC", "NFD"])
    def test_combining_marks_are_part_of_words_in_nfc_and_nfd(self, sample, words, form):
        encoder = text.TextEncoder.fit([unicodedata.normalize(form, sample)] * 2)
        assert sorted(encoder.words) == sorted(unicodedata.normalize("NFC", word) for word in words)
        composed, decomposed = (encoder([unicodedata.normalize(f, sample)]) for f in ("NFC", "NFD"))
        assert composed.nnz == len(words)
        np.testing.assert_array_equal(composed.toarray(), decomposed.toarray())

    def test_all_unicode_marks_are_part_of_words(self):
        every = [chr(point) for point in range(sys.maxunicode + 1)]
        marks = "".join(c for c in every if unicodedata.category(c).startswith("M"))
        assert len(marks) > 2000
        assert text._words(f"a{marks}b c") == [f"a{marks}b", "c"]
        known = {*marks, "_"}
        others = "".join(c for c in every if not c.isalnum() and c not in known)
        assert text._words(f"a{others}b") == ["a", "b"]

    @pytest.mark.parametrize("ngrams", [1, 2])
    def test_english_features_match_scikit_learn(self, ngrams):
        _, texts = read_tsv(ROOT / "sparse_xmc" / "cli" / "data" / "wordnet" / "test.tsv.xz")
        texts = texts[:3000]
        encoder = text.TextEncoder.fit(texts, ngrams=ngrams)
        theirs = TfidfVectorizer(
            token_pattern=r"\b\w+\b", ngram_range=(1, ngrams), sublinear_tf=True, dtype=np.float32, min_df=2
        )
        expected = theirs.fit_transform(texts)
        assert encoder.words == theirs.get_feature_names_out().tolist()
        np.testing.assert_array_equal((encoder(texts) - expected).toarray(), 0)

    def test_encoder_of_older_version_loads(self, tmp_path):
        state = {"words": ["cat", "न", "caf"], "idf": [1.0, 2.0, 3.0]}  # words cut at combining marks
        (tmp_path / "words.json").write_text(json.dumps(state))
        encoder = text.TextEncoder.load(tmp_path / "words.json")
        assert encoder(["the Cat, cat", "नमस्ते"]).toarray().tolist() == [[1, 0, 0], [0, 0, 0]]

    def test_fit_without_frequent_words_raises(self):
        with pytest.raises(ValueError, match="no word is in 2 of the 2 texts"):
            text.TextEncoder.fit(["a", "b"])

    @hypothesis.given(texts=st.lists(st.text("aBcé \u2028x0_", max_size=20), min_size=1))
    def test_save_and_load_round_trip(self, tmp_path_factory, texts):
        path = tmp_path_factory.mktemp("encoder") / "words.json"
        encoder = text.TextEncoder.fit([*texts, "a b é"], min_df=1)
        encoder.save(path)
        loaded = text.TextEncoder.load(path)
        assert loaded.vocabulary_size == encoder.vocabulary_size
        np.testing.assert_array_equal(loaded(texts).toarray(), encoder(texts).toarray(), strict=True)

    @pytest.mark.parametrize(
        "state",
        [
            "{",
            "[]",
            '{"words": ["a"]}',
            '{"words": ["a"], "idf": [1, 2]}',
            '{"words": ["a", "a"], "idf": [1, 1]}',
            '{"words": "ab", "idf": [1, 1]}',
            '{"words": [1], "idf": [1]}',
            '{"words": ["a"], "idf": [Infinity]}',
            '{"words": ["a"], "idf": [NaN]}',
            '{"words": ["a"], "idf": [1e39]}',
            f'{{"words": ["a"], "idf": [{"9" * 400}]}}',
            "[" * 100_000,
        ],
        ids=lambda state: state[:40],
    )
    def test_malformed_file_raises(self, tmp_path, state):
        (tmp_path / "bad.json").write_text(state)
        with pytest.raises(ValueError, match=r"bad\.json: not a saved TextEncoder"):
            text.TextEncoder.load(tmp_path / "bad.json")

    def test_invalid_weights_raise(self):
        with pytest.raises(ValueError, match="expected finite weights, got nan for 'b'"):
            text.TextEncoder(["a", "b"], [1, np.nan])
        with pytest.raises(ValueError, match=r"expected 2 weights, one for each word, got \[1, 2\]"):
            text.TextEncoder(["a", "b"], [[1, 2]])

    def test_file_is_plain_json(self, tmp_path):
        text.TextEncoder.fit(TEXTS, min_df=1).save(tmp_path / "words.json")
        assert json.loads((tmp_path / "words.json").read_text())["words"] == ["7", "a", "b", "c"]


class TestLabelEncoder:
    def test_names_are_sorted(self):
        encoder = text.LabelEncoder.fit([["dog", "big cat"], [], ["Ape", "dog"]])
        assert encoder.names == ["Ape", "big cat", "dog"]
        labels = encoder([["dog", "Ape", "dog"], [], ["big cat", "unknown"]])
        np.testing.assert_array_equal(
            labels.toarray(), np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], bool), strict=True
        )
        assert labels.has_canonical_format

    def test_indices_of_a_point_are_sorted(self):
        # Python iterates over the set {8, 1} in the order 8, 1.
        assert text.LabelEncoder(list("abcdefghi"))([["b", "i"]]).indices.tolist() == [1, 8]

    def test_min_count_counts_points(self):
        assert text.LabelEncoder.fit([["a", "b", "b"], ["a"]], min_count=2).names == ["a"]

    def test_no_points(self):
        assert text.LabelEncoder.fit([])([]).shape == (0, 0)
        assert text.LabelEncoder(["a", "b"])([]).shape == (0, 2)

    @hypothesis.given(
        label_lists=st.lists(
            st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1))
        )
    )
    def test_loaded_names_decode_labels(self, tmp_path_factory, label_lists):
        path = tmp_path_factory.mktemp("labels") / "labels.txt"
        text.LabelEncoder.fit(label_lists).save(path)
        encoder = text.LabelEncoder.load(path)
        matrix = encoder(label_lists)
        decoded = [{encoder.names[label] for label in row.nonzero()[0]} for row in matrix.toarray()]
        assert decoded == [set(names) for names in label_lists]

    def test_file_has_one_name_per_line(self, tmp_path):
        text.LabelEncoder(["dog", "Löwe"]).save(tmp_path / "labels.txt")
        assert (tmp_path / "labels.txt").read_bytes() == "dog\nLöwe\n".encode()

    def test_repeated_name_raises(self):
        with pytest.raises(ValueError, match="a label name appears twice"):
            text.LabelEncoder(["a", "b", "a"])

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", "must be non-empty and without line breaks, got ''"),
            ("a\nb", r"without line breaks, got 'a\\nb'"),
            ("a\r", "without line breaks"),
            ("a\udc80", r"must be encodable in UTF-8, got 'a\\udc80'"),
        ],
    )
    def test_names_that_cannot_be_saved_raise(self, name, message):
        with pytest.raises(ValueError, match=message):
            text.LabelEncoder(["x", name])

    @pytest.mark.parametrize(
        ("content", "fault"),
        [
            (b"a\n\nb\n", "2: expected a label name, got a blank line"),
            (b"a\nb\rc\n", "2: expected a label name without line breaks, got"),
            (b"a\nb\na\n", "3: expected distinct names, got 'a' as on line 1"),
            (b"a\n\xff\n", "2: not UTF-8"),
        ],
    )
    def test_malformed_file_raises(self, tmp_path, content, fault):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.txt:{fault}"):
            text.LabelEncoder.load(tmp_path / "bad.txt")
