"""Pretrained encoders given by a directory: a frozen encoder of texts, or one to be fine-tuned."""

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
    """A frozen pretrained encoder of texts, read from a directory, with the pooling set by its files.

    Args:
      directory: directory of the encoder, see `PretrainedEncoder.from_directory`.
      max_length: maximum number of tokens of a text; longer texts are truncated. None for the
        `max_seq_length` of `sentence_bert_config.json`, or without this file for the setting of the
        tokenizer.
      cache_dir: directory in which embeddings are cached for later runs; None for no cache.

    Attributes:
      features: E, the number of features.

    Raises:
      ValueError: the directory has no encoder of a supported architecture.
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
        """Return the embeddings float32 [N, E] of N texts; memory-mapped if they are cached."""
        if self._cache_dir is not None and len(texts):
            return cached_embeddings(self._directory, texts, self._cache_dir, max_length=self._max_length)
        return self.embed(texts)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Compute the embeddings float32 [N, E] of N texts without the cache."""
        if not len(texts):
            return np.zeros((0, self.features), np.float32)
        encoder, tokenizer = self._loaded
        return embed(encoder, tokenizer(texts))

    @functools.cached_property
    def _loaded(self) -> tuple[PretrainedEncoder, Tokenizer]:
        encoder = PretrainedEncoder.from_directory(self._directory)
        return encoder, Tokenizer.from_directory(self._directory, max_length=self._max_length)

    def save(self, path: str | os.PathLike) -> None:
        """Write the directory, `max_length` and fingerprint of the encoder as JSON, but not its weights."""
        state = {
            "directory": str(self._directory.absolute()),
            "max_length": self._max_length,
            "fingerprint": self._fingerprint,
        }
        write_text(path, json.dumps(state, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike, directory: str | os.PathLike | None = None) -> "FrozenEncoder":
        """Read an encoder saved by `save`.

        Args:
          path: the file written by `save`.
          directory: current directory of the encoder; None for the saved one.

        Raises:
          ValueError: the file was not written by `save`, the directory has no encoder, or a different one.
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
    """Open a pretrained encoder, either frozen or to be fine-tuned.

    Args:
      directory: directory of the encoder, see `PretrainedEncoder.from_directory`.
      trainable: whether the encoder is to be fine-tuned.
      max_length: maximum number of tokens of a text, as for `FrozenEncoder`.
      cache_dir: directory of cached embeddings, for a frozen encoder only.
      dtype: dtype of the computation, for a fine-tuned encoder only; see `PretrainedEncoder`.
      remat: whether a backward pass recomputes the activations, for a fine-tuned encoder only.

    Returns:
      The preprocessing of texts, and the encoder to fine-tune: a `FrozenEncoder` and None, or a `Tokenizer`
      and a `PretrainedEncoder`.
    """
    if not trainable:
        return FrozenEncoder(directory, max_length=max_length, cache_dir=cache_dir), None
    warn_of_unused_settings(Path(directory), max_length)
    encoder = PretrainedEncoder.from_directory(directory, dtype=jnp.dtype(dtype), remat=remat)
    length = resolve_length(Path(directory), max_length, encoder.config)
    tokenizer = Tokenizer.from_directory(directory, max_length=length)
    resolve_length(
        Path(directory), tokenizer.max_length, encoder.config
    )  # checks the limit set in tokenizer.json
    return tokenizer, encoder
