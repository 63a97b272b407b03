"""Embeddings of texts by a frozen pretrained encoder, computed once and cached on disk."""

import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from tqdm import tqdm

from sparse_xmc.data import files, storage
from sparse_xmc.data.tokens import Tokenizer, TokenLists, Tokens
from sparse_xmc.encoders.pretrained import PretrainedEncoder
from sparse_xmc.encoders.pretrained_files import (
    PretrainedConfig,
    resolve_length,
    resolve_pooling,
    weight_files,
)
from sparse_xmc.modules import in_evaluation

_SHORT = 32  # maximum number of tokens of a text that counts as short
_EMBEDDINGS = "embeddings.npy"
_VERSION = 1  # version of the computation; increase it to invalidate cached embeddings


def embed(
    encoder: nnx.Module, token_lists: TokenLists, *, batch_size: int = 64, out: np.ndarray | None = None
) -> np.ndarray:
    """Compute the features of N texts, without dropout. Texts of similar length share a batch.

    Args:
      encoder: maps `Tokens` of B texts to float32 [B, E].
      token_lists: the texts.
      batch_size: B for texts of up to 32 tokens. Longer texts use smaller batches, which fit into caches. Few
        texts use a batch of their number, rounded up to a power of two.
      out: float32 [N, E], array for the result; None for a new array.

    Returns:
      float32 [N, E], in the order of the texts.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    graphdef, state = nnx.split(in_evaluation(encoder))
    lengths = token_lists.lengths
    order = np.argsort(lengths, kind="stable")[::-1]  # The longest texts come first: they take most memory.
    if out is None:
        tokens = jax.eval_shape(lambda: _batch(token_lists, order[:1], 1))
        features = jax.eval_shape(functools.partial(_encode, graphdef), state, tokens).shape[1]
        out = np.empty((len(order), features), np.float32)
    hidden = not sys.stderr.isatty()
    batch_size = min(batch_size, 1 << max(0, len(order) - 1).bit_length())  # Batches are padded to full size.
    waiting: list[tuple[np.ndarray, Array]] = []
    with tqdm(total=len(order), desc="embedding", unit=" texts", leave=False, disable=hidden) as bar:
        start = 0
        while start < len(order) or waiting:
            if start < len(order):
                width = token_lists.width(lengths[order[start]])
                size = max(1, batch_size * _SHORT // max(_SHORT, width))
                rows = order[start : start + size]
                waiting.append((rows, _encode(graphdef, state, _batch(token_lists, rows, size))))
                start += size
            if start >= len(order) or len(waiting) == 2:  # The device computes the next batch meanwhile.
                done, features = waiting.pop(0)
                out[done] = np.asarray(features)[: len(done)]
                bar.update(len(done))
    return out


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, state: nnx.State, tokens: Tokens) -> Array:
    return nnx.merge(graphdef, state)(tokens)


def _batch(token_lists: TokenLists, rows: np.ndarray, size: int) -> Tokens:
    """Return the texts as a batch padded to `size` texts, because another size would be compiled again."""
    tokens = token_lists.take(rows)
    padding = size - len(rows)
    return Tokens(np.pad(tokens.ids, ((0, padding), (0, 0))), np.pad(tokens.lengths, (0, padding)))


def cached_embeddings(
    directory: str | os.PathLike,
    texts: Sequence[str],
    cache_dir: str | os.PathLike,
    *,
    max_length: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    dtype: DTypeLike = jnp.float32,
    batch_size: int = 64,
) -> np.ndarray:
    """Return the features of N texts from the cache, or compute and cache them.

    Cache entries are named by `fingerprint` and are written atomically.

    Args:
      directory: directory of the encoder, see `PretrainedEncoder.from_directory`.
      texts: the texts.
      cache_dir: directory of the cache; created if missing.
      max_length: maximum number of tokens of a text, as for `FrozenEncoder`.
      pooling, normalize, dtype: as for `PretrainedEncoder.from_directory`.
      batch_size: number of texts in a batch, as for `embed`.

    Returns:
      float32 [N, E], memory-mapped, read-only.

    Raises:
      ValueError: there are no texts, or the cache entry is damaged.
    """
    if not len(texts):
        raise ValueError("there are no texts to embed")
    config = PretrainedConfig.from_file(Path(directory) / "config.json")
    max_length = resolve_length(Path(directory), max_length, config)
    pooling, normalize = resolve_pooling(Path(directory), pooling, normalize)
    settings: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "dtype": dtype}
    target = Path(cache_dir) / fingerprint(directory, texts, max_length=max_length, **settings)
    if not target.is_dir():
        encoder = PretrainedEncoder.from_directory(directory, **settings)
        token_lists = Tokenizer.from_directory(directory, max_length=max_length)(texts)
        with files.new_directory(target) as scratch:
            shape = (len(texts), encoder.features)
            out = np.lib.format.open_memmap(scratch / _EMBEDDINGS, "w+", np.float32, shape)
            embed(encoder, token_lists, batch_size=batch_size, out=out)
            out.flush()
            storage.seal(scratch, [_EMBEDDINGS])
    try:
        storage.check_sealed(target, [_EMBEDDINGS])
    except ValueError as error:
        raise ValueError(f"{target}: damaged embeddings; delete this directory: {error}") from error
    return storage.open_npy(target / _EMBEDDINGS)


def fingerprint(
    directory: str | os.PathLike,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    dtype: DTypeLike = jnp.float32,
) -> str:
    """Return a hash of everything that determines the features of texts, 64 hexadecimal digits.

    It covers the content of the encoder's files, the texts in their order, and the settings. Arguments are as
    for `cached_embeddings`. With an empty list of texts, it identifies the encoder.
    """
    directory = Path(directory)
    digest = hashlib.sha256()

    def add(content: bytes) -> None:
        digest.update(f"{len(content)}:".encode())  # marks the boundaries between parts
        digest.update(content)

    settings = (_VERSION, max_length, *resolve_pooling(directory, pooling, normalize), jnp.dtype(dtype).name)
    add(repr(settings).encode())
    for file in (directory / "config.json", directory / "tokenizer.json", *weight_files(directory)):
        if file.is_file():
            with open(file, "rb") as opened:
                add(hashlib.file_digest(opened, "sha256").digest())
    for text in texts:
        add(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
