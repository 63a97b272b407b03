"""Encoders of texts and label names, such as those read by `read_tsv`, as matrices of a `Dataset`."""

import collections
import functools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from sparse_xmc.data import files


class TextEncoder:
    """An encoder of texts as bags of words: TF-IDF with logarithmic counts, rows scaled to unit length.

    A word is a letter, digit or underscore, and all letters, digits, underscores and combining marks (Unicode
    category M) that follow; texts are normalized to NFC and lower-cased first. Unlike scikit-learn's default,
    a word may be a single character, because `c` and `7` distinguish labels, and combining marks do not end a
    word, because they are vowels in Hindi, Tamil, Thai and vocalised Arabic. Pairs of neighbouring words
    (bigrams), with a space between them, may be features like words. Words not seen in `fit` are ignored.

    Args:
      words: the V distinct words and pairs of words, in NFC; the position of a word is its feature id.
      idf: float32 `[V]`, the weight of each word.

    Attributes:
      words: list of the V words.

    Raises:
      ValueError: there are no words, a word is repeated, or there is not one finite weight for each word.
    """

    def __init__(self, words: Sequence[str], idf: np.ndarray):
        self.words = list(words)
        with np.errstate(over="ignore"):
            idf = np.asarray(idf, np.float32)
        if idf.shape != (len(self.words),):
            raise ValueError(f"expected {len(self.words)} weights, one for each word, got {list(idf.shape)}")
        if not np.isfinite(idf).all():
            word = int(np.isfinite(idf).argmin())
            raise ValueError(f"expected finite weights, got {idf[word]} for {self.words[word]!r}")
        longest = 1 + max((word.count(" ") for word in self.words), default=0)
        self._vectorizer = _new_vectorizer(longest, vocabulary=self.words)
        self._vectorizer.idf_ = idf

    @classmethod
    def fit(
        cls, texts: Iterable[str], *, ngrams: int = 1, min_df: int = 2, max_features: int | None = None
    ) -> "TextEncoder":
        """Make an encoder with the words of training texts and their weights.

        Args:
          texts: the training texts.
          ngrams: 1 for words only, 2 for words and pairs of neighbouring words.
          min_df: minimum number of texts that contain a word.
          max_features: maximum number of words; the words with the highest total counts are kept. None for no
            limit.

        Raises:
          TypeError: `texts` is a single str.
          ValueError: there are no texts, or no word is left.
        """
        texts = _as_list(texts)
        if not texts:
            raise ValueError("expected texts to learn words from, got none")
        vectorizer = _new_vectorizer(ngrams, min_df=min_df, max_features=max_features)
        try:
            vectorizer.fit(texts)
        except ValueError as error:  # The message of scikit-learn names parameters that do not exist here.
            raise ValueError(f"no word is in {min_df} of the {len(texts)} texts") from error
        return cls(vectorizer.get_feature_names_out(), vectorizer.idf_)

    @property
    def vocabulary_size(self) -> int:
        """V, the number of words, which is the number of features."""
        return len(self.words)

    def __call__(self, texts: Iterable[str]) -> scipy.sparse.csr_array:
        """Return the float32 features `[N, V]` of N texts; a text without known words gets an empty row."""
        texts = _as_list(texts)
        if not texts:  # scikit-learn raises an error for an empty list
            return scipy.sparse.csr_array((0, self.vocabulary_size), dtype=np.float32)
        return scipy.sparse.csr_array(self._vectorizer.transform(texts))

    def save(self, path: str | os.PathLike) -> None:
        """Write the encoder as one JSON file."""
        state = {"words": self.words, "idf": self._vectorizer.idf_.tolist()}
        files.write_text(path, json.dumps(state))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TextEncoder":
        """Read an encoder saved by `save`; it gives exactly the same features.

        Raises:
          ValueError: the file is not a saved encoder; the message names the file.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            words, idf = state["words"], state["idf"]
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise TypeError("expected a list of words")
            return cls(words, idf)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: not a saved TextEncoder: {error!r}") from error


class LabelEncoder:
    """A mapping between label names and ids, which count from 0.

    Args:
      names: the L distinct names; the position of a name is its id. `fit` sorts the names.

    Attributes:
      names: list of the L names.

    Raises:
      ValueError: a name appears twice, is empty, or contains a line break or a lone surrogate, so that it
        cannot be a line of a UTF-8 file.
    """

    def __init__(self, names: Iterable[str]):
        self.names = list(names)
        self._ids = {name: label for label, name in enumerate(self.names)}
        if len(self._ids) < len(self.names):
            raise ValueError("a label name appears twice")
        for name in self.names:
            check_label_name(name)

    @classmethod
    def fit(cls, label_lists: Iterable[Iterable[str]], min_count: int = 1) -> "LabelEncoder":
        """Make an encoder of the names that at least `min_count` points have, in sorted order."""
        counts = collections.Counter(name for names in label_lists for name in set(names))
        return cls(sorted(name for name, count in counts.items() if count >= min_count))

    def __call__(self, label_lists: Iterable[Iterable[str]]) -> scipy.sparse.csr_array:
        """Return the labels of N points, for `Dataset.labels`; unknown names are ignored.

        Args:
          label_lists: the names of each point, in any order; repeats count once.

        Returns:
          Bool CSR matrix `[N, L]` with sorted indices without duplicates.
        """
        indices, indptr = [], [0]
        for names in label_lists:
            indices.extend(sorted({self._ids[name] for name in names if name in self._ids}))
            indptr.append(len(indices))
        shape = (len(indptr) - 1, len(self.names))
        return scipy.sparse.csr_array((np.ones(len(indices), bool), indices, indptr), shape=shape)

    def save(self, path: str | os.PathLike) -> None:
        """Write the names as a UTF-8 file, one name per line; the first line is label 0."""
        files.write_text(path, "".join(f"{name}\n" for name in self.names))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LabelEncoder":
        """Read an encoder saved by `save`.

        Raises:
          ValueError: a line is blank, contains a carriage return, repeats another line, or is not UTF-8; the
            message names the line.
        """
        lines: dict[str, int] = {}
        for number, name in files.read_text_lines(path):
            if not name:
                raise ValueError(f"{path}:{number}: expected a label name, got a blank line")
            if "\r" in name:
                raise ValueError(f"{path}:{number}: expected a label name without line breaks, got {name!r}")
            if name in lines:
                raise ValueError(
                    f"{path}:{number}: expected distinct names, got {name!r} as on line {lines[name]}"
                )
            lines[name] = number
        return cls(lines)


def check_label_name(name: str, where: str = "") -> None:
    """Raise ValueError if a label name cannot be a line of a UTF-8 file; the message ends with `where`."""
    if not name or "\n" in name or "\r" in name:
        raise ValueError(f"label names must be non-empty and without line breaks, got {name!r}{where}")
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"label names must be encodable in UTF-8, got {name!r}{where}") from error


def _as_list(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of str, got a single str")
    return list(texts)


def _new_vectorizer(ngrams: int, **options: Any) -> TfidfVectorizer:
    return TfidfVectorizer(
        preprocessor=_normalize,
        tokenizer=_words,
        token_pattern=None,
        ngram_range=(1, ngrams),
        sublinear_tf=True,
        dtype=np.float32,
        **options,
    )


_ASCII_WORD = re.compile(r"\w+")


def _normalize(text: str) -> str:
    """Return a text normalized to NFC and lower-cased."""
    return (text if text.isascii() else unicodedata.normalize("NFC", text)).lower()


def _words(text: str) -> list[str]:
    """Return the words of a text, in order."""
    return (_ASCII_WORD if text.isascii() else _unicode_word()).findall(text)


@functools.cache
def _unicode_word() -> re.Pattern[str]:
    """Return the pattern of words with combining marks, for which `re` has no character class."""
    # All marks are in these ranges: U+0300 to the end of plane 1, and the variation selectors in plane 14.
    points = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))
    marks = "".join(chr(point) for point in points if unicodedata.category(chr(point)).startswith("M"))
    # The lookahead is for speed: it rules out ASCII at once, without a search in the long class of marks.
    return re.compile(rf"\w(?:\w|(?=[\u0300-\U0010ffff])[{marks}])*")
