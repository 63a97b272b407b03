"""Frozen encoders, which turn texts into embeddings; a pretrained encoder as the inputs of a classifier."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from sparse_xmc.data.files import write_text
from sparse_xmc.data.tokens import Tokenizer
from sparse_xmc.encoders.embedding_cache import cached_embeddings, embed, fingerprint
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

    Attributes:
      features: E, the number of features.

    Raises:
      ValueError: the directory has no encoder of a supported architecture.
    """

    def __init__(self, directory: str | os.PathLike, *, max_length: int | None = None):
        self._directory = Path(directory)
        warn_of_unused_settings(self._directory, max_length)
        config = PretrainedConfig.from_file(self._directory / "config.json")
        self._max_length = resolve_length(self._directory, max_length, config)
        self.features = config.hidden_size
        self._fingerprint = fingerprint(self._directory, [])

    def __call__(self, texts: Sequence[str], *, cache_dir: str | os.PathLike | None = None) -> np.ndarray:
        """Return the embeddings float32 [N, E] of N texts.

        Args:
          texts: the texts.
          cache_dir: directory in which embeddings are cached for later calls with the same texts; the result
            is then memory-mapped. None for no cache.
        """
        if not len(texts):
            return np.zeros((0, self.features), np.float32)
        if cache_dir is not None:
            return cached_embeddings(self._directory, texts, cache_dir, max_length=self._max_length)
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
            saved, max_length, expected = state["directory"], state["max_length"], state["fingerprint"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: not a saved FrozenEncoder: {error!r}") from error
        directory = saved if directory is None else directory
        try:
            encoder = cls(directory, max_length=max_length)
        except ValueError as error:
            raise ValueError(
                f"{path}: the encoder that the model was trained on is not in {directory}: {error}; "
                "if it moved, say where: load(..., encoder=DIRECTORY)"
            ) from error
        if encoder._fingerprint != expected:
            raise ValueError(f"{path}: the encoder in {directory} is not the one the model was trained on")
        return encoder


# Turns texts into the inputs of a classifier: embeddings if the encoder is frozen, else tokens.
PretrainedInput: TypeAlias = FrozenEncoder | Tokenizer


def open_pretrained(
    directory: str | os.PathLike, *, trainable: bool = False, max_length: int | None = None
) -> PretrainedInput:
    """Return the object that turns texts into the inputs of a classifier.

    The inputs are embeddings if the encoder is frozen, else tokens.

    Args:
      directory: directory of the encoder, see `PretrainedEncoder.from_directory`.
      trainable: whether the encoder is to be fine-tuned.
      max_length: maximum number of tokens of a text, as for `FrozenEncoder`.

    Returns:
      A `FrozenEncoder`; or if the encoder is to be fine-tuned its `Tokenizer`.
    """
    if not trainable:
        return FrozenEncoder(directory, max_length=max_length)
    directory = Path(directory)
    warn_of_unused_settings(directory, max_length)
    config = PretrainedConfig.from_file(directory / "config.json")
    length = resolve_length(directory, max_length, config)
    tokenizer = Tokenizer.from_directory(directory, max_length=length)
    resolve_length(directory, tokenizer.max_length, config)  # checks the limit set in tokenizer.json
    return tokenizer
