"""A pretrained encoder as users name it, by its directory: frozen, a function of texts, or trained too."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sparse_xmc.data.files import write_text
from sparse_xmc.data.tokens import Tokenizer
from sparse_xmc.encoders.frozen import cached_embeddings, embed, fingerprint
from sparse_xmc.encoders.pretrained import PretrainedEncoder
from sparse_xmc.encoders.pretrained_files import (
    PretrainedConfig,
    resolve_length,
    warn_of_unused_settings,
)


class FrozenEncoder:
    """Embeds texts by the encoder of a directory, pooled as its own files say.

    Args:
      directory: see `PretrainedEncoder.from_directory`.
      max_length: how many tokens of a text are read; None for the `max_seq_length` of
        `sentence_bert_config.json`, or without it as many as the tokenizer is set to.
      cache_dir: where embeddings are kept for later runs; None to compute them each time.

    Attributes:
      features: E.

    Raises:
      ValueError: the directory has no encoder of a kind that is known.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        max_length: int | None = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        self._directory = Path(directory)
        warn_of_unused_settings(self._directory, max_length)
        self._cache_dir = cache_dir
        config = PretrainedConfig.from_file(self._directory / "config.json")
        self._max_length = resolve_length(self._directory, max_length, config)
        self.features = config.hidden_size
        self._fingerprint = fingerprint(self._directory, [])

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings float32 [N, E] of N texts; memory-mapped where they are kept."""
        if self._cache_dir is not None and len(texts):
            return cached_embeddings(self._directory, texts, self._cache_dir, max_length=self._max_length)
        return self.embed(texts)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The same, computed now and kept nowhere."""
        if not len(texts):
            return np.zeros((0, self.features), np.float32)
        encoder, tokenizer = self._loaded
        return embed(encoder, tokenizer(texts))

    @functools.cached_property
    def _loaded(self) -> tuple[PretrainedEncoder, Tokenizer]:
        encoder = PretrainedEncoder.from_directory(self._directory)
        return encoder, Tokenizer.from_directory(self._directory, max_length=self._max_length)

    def save(self, path: str | os.PathLike) -> None:
        """Writes where the encoder is and what it is known by, as JSON; the weights stay where they are."""
        state = {
            "directory": str(self._directory.absolute()),
            "max_length": self._max_length,
            "fingerprint": self._fingerprint,
        }
        write_text(path, json.dumps(state, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike, directory: str | os.PathLike | None = None) -> "FrozenEncoder":
        """Reads what `save` wrote.

        Args:
          path: the file.
          directory: where the encoder is now; None for where it was.

        Raises:
          ValueError: the file is not of an encoder, or the encoder is not where it was, or is another one.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            before, max_length, known = state["directory"], state["max_length"], state["fingerprint"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: not a saved FrozenEncoder: {error!r}") from error
        directory = before if directory is None else directory
        try:
            encoder = cls(directory, max_length=max_length)
        except ValueError as error:
            raise ValueError(
                f"{path}: the encoder that the model was trained on is not in {directory}: {error}; "
                "if it moved, say where: load(..., encoder=DIRECTORY)"
            ) from error
        if encoder._fingerprint != known:
            raise ValueError(f"{path}: the encoder in {directory} is not the one the model was trained on")
        return encoder


def open_pretrained(
    directory: str | os.PathLike,
    *,
    trainable: bool = False,
    max_length: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    dtype: str = "float32",
    remat: bool = False,
) -> tuple[FrozenEncoder | Tokenizer, PretrainedEncoder | None]:
    """What is done to texts before training, and the encoder that is trained, if it is.

    Args are those of `FrozenEncoder`, but for

    Args:
      trainable: whether the encoder is to be trained too: then it is read, and texts become tokens.
      dtype, remat: those of an encoder that is trained; see `PretrainedEncoder`.
    """
    if not trainable:
        return FrozenEncoder(directory, max_length=max_length, cache_dir=cache_dir), None
    warn_of_unused_settings(Path(directory), max_length)
    encoder = PretrainedEncoder.from_directory(directory, dtype=jnp.dtype(dtype), remat=remat)
    length = resolve_length(Path(directory), max_length, encoder.config)
    tokenizer = Tokenizer.from_directory(directory, max_length=length)
    resolve_length(
        Path(directory), tokenizer.max_length, encoder.config
    )  # that of tokenizer.json may be more
    return tokenizer, encoder
