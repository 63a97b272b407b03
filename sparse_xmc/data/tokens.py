"""Tokenized texts for pretrained encoders: stored flat, and padded when batches are made."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparse_xmc.data import files

Array = np.ndarray | jax.Array

_MIN_WIDTH = 16
_TEXTS_AT_ONCE = 16_384  # bounds memory: results of the tokenizers library are far larger than the tokens
_DEFAULT_MAX_LENGTH = 512  # in tokens; encoders of the BERT family support it


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tokens:
    """A batch of B tokenized texts.

    Attributes:
      ids: int32 [B, T], the tokens of each text, followed by padding of any value.
      lengths: int32 [B], the number of tokens of each text.
    """

    ids: Array
    lengths: Array


@dataclasses.dataclass(frozen=True)
class TokenLists:
    """The tokens of N texts. The arrays may be memory-mapped.

    Attributes:
      ids: int32 [M], the tokens of all texts, one text after another.
      indptr: int64 [N + 1], the position in `ids` where each text begins, and finally M.
      max_length: maximum number of tokens of a text, and maximum width of a batch.
    """

    ids: np.ndarray
    indptr: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], the number of tokens of each text."""
        return np.diff(self.indptr)

    def width(self, length: int) -> int:
        """Return T, the width of a batch whose longest text has `length` tokens.

        Widths are 16, 24, 32, 48, 64, ... or `max_length`: so few that jit compiles only a handful of times.
        """
        power = 1 << max(0, int(length) - 1).bit_length()
        smaller = 3 * power // 4
        return min(self.max_length, max(_MIN_WIDTH, smaller if length <= smaller else power))

    def __getitem__(self, rows: np.ndarray | slice) -> "TokenLists":
        """Return the texts selected by integers, by a bool for each text, or by a slice."""
        rows = np.arange(len(self))[rows]
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        shifts = np.asarray(self.indptr)[rows] - (ends - lengths)  # from new to old positions
        positions = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
        return TokenLists(np.asarray(self.ids[positions]), np.append(0, ends), self.max_length)

    def take(self, rows: Sequence[int] | np.ndarray) -> Tokens:
        """Return the texts with these numbers as a batch, padded to the next `width`."""
        rows = np.asarray(rows, np.int64)
        starts = np.asarray(self.indptr[rows])
        lengths = np.asarray(self.indptr[rows + 1]) - starts
        positions = np.arange(self.width(lengths.max(initial=0)))
        used = positions < lengths[:, None]
        ids = np.zeros(used.shape, np.int32)
        ids[used] = self.ids[(starts[:, None] + positions)[used]]
        return Tokens(ids, lengths.astype(np.int32))


class Tokenizer:
    """A tokenizer of texts, given by a `tokenizer.json` of the tokenizers library, with special tokens.

    Args:
      tokenizer: a `tokenizers.Tokenizer`. It is modified: it truncates to `max_length`, and does not pad.
      max_length: maximum number of tokens of a text, special tokens included; longer texts are truncated.
        None for the setting of `tokenizer`, or else 512.

    Attributes:
      max_length: maximum number of tokens of a text.

    Raises:
      ValueError: `max_length` leaves no room for a token of the text.
    """

    def __init__(self, tokenizer: Any, *, max_length: int | None = None):
        if max_length is None:
            max_length = (tokenizer.truncation or {"max_length": _DEFAULT_MAX_LENGTH})["max_length"]
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length <= special:
            raise ValueError(
                f"max_length must be above {special}, the number of special tokens, got {max_length}"
            )
        tokenizer.enable_truncation(max_length)
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def from_directory(cls, path: str | os.PathLike, *, max_length: int | None = None) -> "Tokenizer":
        """Read the `tokenizer.json` of a directory, written by Hugging Face or by `save`.

        Args:
          path: the directory.
          max_length: maximum number of tokens of a text, as for the class.

        Raises:
          ImportError: the tokenizers library is not installed.
          ValueError: the file is missing, or is not a tokenizer; the message names it.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "tokenizers is not installed, which texts need: pip install 'sparse-xmc[text]'"
            ) from error
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{file}: no such file; a directory with a fast tokenizer has one")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
            tokenizer.no_padding()
            ids = tokenizer.encode("a \u2603").ids  # fails if there is no token for unknown characters
            if (largest := max([0, *ids, *tokenizer.get_vocab().values()])) > np.iinfo(np.int32).max:
                raise ValueError(f"expected ids below 2^31, got {largest}")
        except Exception as error:  # The library raises exceptions of class Exception only.
            raise ValueError(f"{file}: not a tokenizer: {error}") from error
        return cls(tokenizer, max_length=max_length)

    def __call__(self, texts: Sequence[str]) -> TokenLists:
        """Tokenize N texts, in parallel."""
        pieces, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            encodings = self._tokenizer.encode_batch_fast(list(texts[start : start + _TEXTS_AT_ONCE]))
            ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
            lengths.append(np.array([len(text_ids) for text_ids in ids], np.int64))
            pieces.append(np.concatenate(ids))
        return TokenLists(np.concatenate(pieces), np.cumsum(np.concatenate(lengths)), self.max_length)

    def save(self, directory: str | os.PathLike) -> None:
        """Write `tokenizer.json`, including `max_length`, for `from_directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files.write_text(directory / "tokenizer.json", self._tokenizer.to_str(pretty=True))
