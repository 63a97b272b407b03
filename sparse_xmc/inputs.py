"""The encoder of texts as the points of a classifier."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparse_xmc.data.dataset import Points
from sparse_xmc.data.text import TextEncoder
from sparse_xmc.data.tokens import Tokenizer, TokenLists
from sparse_xmc.encoders.frozen_encoder import FrozenEncoder, PretrainedInput

# The files in which an encoder is saved.
WORDS_FILE, FROZEN_FILE, TOKENIZER_FILE = "text_encoder.json", "frozen_encoder.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class InputEncoder:
    """An encoder of texts as points: bags of words and, optionally, the input of a pretrained encoder.

    Attributes:
      words: encoder of texts as bags of words.
      pretrained: how a text is encoded in addition to its bag of words, from `open_pretrained`: as an
        embedding by a `FrozenEncoder`; as tokens by a `Tokenizer`, if the classifier contains the encoder,
        which is fine-tuned; or not at all (None).
    """

    words: TextEncoder
    pretrained: PretrainedInput | None = None

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        *,
        ngrams: int = 1,
        min_df: int = 2,
        pretrained: PretrainedInput | None = None,
    ) -> "InputEncoder":
        """Make an encoder with the words of training texts.

        Args:
          texts: the training texts.
          ngrams, min_df: as for `TextEncoder.fit`.
          pretrained: as for the class.

        Raises:
          ValueError: no word is left.
        """
        return cls(TextEncoder.fit(texts, ngrams=ngrams, min_df=min_df), pretrained)

    def __call__(self, texts: Sequence[str], *, cache_dir: str | os.PathLike | None = None) -> Points:
        """Encode N texts.

        Args:
          texts: the texts.
          cache_dir: directory in which embeddings of a frozen encoder are cached for later calls with the
            same texts; None for no cache.
        """
        encoded: np.ndarray | TokenLists | None = None
        if isinstance(self.pretrained, FrozenEncoder):
            encoded = self.pretrained(texts, cache_dir=cache_dir)
        elif self.pretrained is not None:
            encoded = self.pretrained(texts)
        return Points(self.words(texts), encoded=encoded)

    def save(self, directory: Path) -> None:
        """Write the encoder to files in a directory; the weights of a frozen encoder are not saved."""
        self.words.save(directory / WORDS_FILE)
        if isinstance(self.pretrained, FrozenEncoder):
            self.pretrained.save(directory / FROZEN_FILE)
        elif self.pretrained is not None:
            self.pretrained.save(directory)

    @classmethod
    def load(cls, files: Mapping[str, Path], encoder: str | os.PathLike | None = None) -> "InputEncoder":
        """Read an encoder saved by `save`.

        Args:
          files: paths of the saved files, by their names.
          encoder: current directory of the frozen encoder; None for the saved one.

        Raises:
          ValueError: a file is malformed, or the frozen encoder is not in its directory.
        """
        words = TextEncoder.load(files[WORDS_FILE])
        if FROZEN_FILE in files:
            return cls(words, FrozenEncoder.load(files[FROZEN_FILE], encoder))
        if TOKENIZER_FILE in files:
            return cls(words, Tokenizer.from_directory(files[TOKENIZER_FILE].parent))
        return cls(words)
