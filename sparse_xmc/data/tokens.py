"""Texts as the tokens of a pretrained encoder: tokenised once, kept flat, cut into padded batches."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sparse_xmc.data import files

Array = np.ndarray | jax.Array

_NARROWEST = 16
_TEXTS_AT_ONCE = 16_384  # what the tokenizers library returns takes far more memory than the tokens
_LONGEST = 512  # if nobody says how long texts may be: as long as encoders of this family take


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tokens:
    """A batch of B texts.

    Attributes:
      ids: int32 [B, T], the tokens of each text, then padding, whose values do not matter.
      lengths: int32 [B], how many tokens of each row are its text's.
    """

    ids: Array
    lengths: Array


@dataclasses.dataclass(frozen=True)
class TokenLists:
    """The tokens of N texts. The arrays may be memory-mapped.

    Attributes:
      ids: int32 [M], the tokens of all texts, one text after another.
      indptr: int64 [N + 1], where each text begins, then M.
      max_length: no text has more tokens, and no batch is wider.
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
        """The T of a batch whose longest text has so many tokens: 16, 24, 32, 48, 64, ... or `max_length`.

        There are few such widths, so that jit compiles a handful of times.
        """
        power = 1 << max(0, int(length) - 1).bit_length()
        between = 3 * power // 4
        return min(self.max_length, max(_NARROWEST, between if length <= between else power))

    def __getitem__(self, rows: np.ndarray | slice) -> "TokenLists":
        """The texts with these numbers, a bool for each, or a slice."""
        rows = np.arange(len(self))[rows]
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        at = np.arange(lengths.sum()) + np.repeat(np.asarray(self.indptr)[rows] - (ends - lengths), lengths)
        return TokenLists(np.asarray(self.ids[at]), np.append(0, ends), self.max_length)

    def take(self, rows: Sequence[int] | np.ndarray) -> Tokens:
        """The texts with these numbers as a batch, padded to the next `width`."""
        rows = np.asarray(rows, np.int64)
        starts = np.asarray(self.indptr[rows])
        lengths = np.asarray(self.indptr[rows + 1]) - starts
        positions = np.arange(self.width(lengths.max(initial=0)))
        used = positions < lengths[:, None]
        ids = np.zeros(used.shape, np.int32)
        ids[used] = self.ids[(starts[:, None] + positions)[used]]
        return Tokens(ids, lengths.astype(np.int32))


class Tokenizer:
    """Turns texts into tokens as a `tokenizer.json` of the tokenizers library says, with its special tokens.

    Args:
      tokenizer: a `tokenizers.Tokenizer`, which is changed: it truncates to `max_length`, and does not pad.
      max_length: how many tokens of a text are kept, special tokens included; None for as many as
        `tokenizer` is set to, or else 512.

    Attributes:
      max_length: see above.

    Raises:
      ValueError: `max_length` leaves no room for a token of the text.
    """

    def __init__(self, tokenizer, *, max_length: int | None = None):
        if max_length is None:
            max_length = (tokenizer.truncation or {"max_length": _LONGEST})["max_length"]
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
        """Reads the `tokenizer.json` of a directory as Hugging Face or `save` writes it.

        Raises:
          ImportError: the tokenizers library is not installed.
          ValueError: there is no such file, or it is not one of a tokenizer; the message names it.
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
            ids = tokenizer.encode("a \u2603").ids  # fails where there is no token for what is unknown
            if (largest := max([0, *ids, *tokenizer.get_vocab().values()])) > np.iinfo(np.int32).max:
                raise ValueError(f"expected ids below 2^31, got {largest}")
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{file}: not a tokenizer: {error}") from error
        return cls(tokenizer, max_length=max_length)

    def __call__(self, texts: Sequence[str]) -> TokenLists:
        """Tokenises N texts, in parallel."""
        pieces, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            encodings = self._tokenizer.encode_batch_fast(list(texts[start : start + _TEXTS_AT_ONCE]))
            of_texts = [encoding.ids for encoding in encodings]
            lengths.append(np.array([len(ids) for ids in of_texts], np.int64))
            pieces.append(np.concatenate([np.array(ids, np.int32) for ids in of_texts]))
        return TokenLists(np.concatenate(pieces), np.cumsum(np.concatenate(lengths)), self.max_length)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json`, which `from_directory` reads again, with `max_length`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files.write_text(directory / "tokenizer.json", self._tokenizer.to_str(pretty=True))
