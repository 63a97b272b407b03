"""A pretrained encoder that stays as it is: all texts are embedded once, and later runs read the result."""

import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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

_SHORT = 32  # tokens
_EMBEDDINGS = "embeddings.npy"
_VERSION = 1  # of what is computed: a higher one leaves older files behind


def embed(
    encoder: nnx.Module, token_lists: TokenLists, *, batch_size: int = 64, out: np.ndarray | None = None
) -> np.ndarray:
    """The features of N texts, without dropout. Batches hold texts of like length, so that padding is small.

    Args:
      encoder: maps `Tokens` of B texts to float32 [B, E].
      token_lists: the texts.
      batch_size: B, for texts of up to 32 tokens; of longer ones fewer, lest batches outgrow caches. Of
        fewer texts, it is the next power of two.
      out: float32 [N, E], where the result goes; None for a new array.

    Returns:
      float32 [N, E], in the order of the texts.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    graphdef, state = nnx.split(in_evaluation(encoder))
    lengths = token_lists.lengths
    order = np.argsort(lengths, kind="stable")[::-1]  # what takes most memory comes first
    if out is None:
        tokens = jax.eval_shape(lambda: _batch(token_lists, order[:1], 1))
        features = jax.eval_shape(functools.partial(_encode, graphdef), state, tokens).shape[1]
        out = np.empty((len(order), features), np.float32)
    hidden = not sys.stderr.isatty()
    batch_size = min(batch_size, 1 << max(0, len(order) - 1).bit_length())  # batches are filled up
    waiting: list[tuple[np.ndarray, jax.Array]] = []
    with tqdm(total=len(order), desc="embedding", unit=" texts", leave=False, disable=hidden) as bar:
        start = 0
        while start < len(order) or waiting:
            if start < len(order):
                width = token_lists.width(lengths[order[start]])
                size = max(1, batch_size * _SHORT // max(_SHORT, width))
                rows = order[start : start + size]
                waiting.append((rows, _encode(graphdef, state, _batch(token_lists, rows, size))))
                start += size
            if start >= len(order) or len(waiting) == 2:  # while the device is at work on the next
                done, features = waiting.pop(0)
                out[done] = np.asarray(features)[: len(done)]
                bar.update(len(done))
    return out


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def _batch(token_lists: TokenLists, rows: np.ndarray, size: int) -> Tokens:
    """The texts as a batch of that size: the last is filled up, as another size would be compiled again."""
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
    dtype=jnp.float32,
    batch_size: int = 64,
) -> np.ndarray:
    """The features of N texts by the encoder of a directory, computed unless they are in `cache_dir` already.

    They are known there by `fingerprint`. What is computed appears whole or not at all.

    Args:
      directory: see `PretrainedEncoder.from_directory`, as for `pooling`, `normalize` and `dtype`; and
        `FrozenEncoder`, as for `max_length`.
      texts: the texts.
      cache_dir: made where it is missing.
      batch_size: how many texts are encoded at once.

    Returns:
      float32 [N, E], memory-mapped, read-only.

    Raises:
      ValueError: there are no texts, or what is in the cache is not as it was written.
    """
    if not len(texts):
        raise ValueError("there are no texts to embed")
    config = PretrainedConfig.from_file(Path(directory) / "config.json")
    max_length = resolve_length(Path(directory), max_length, config)
    pooling, normalize = resolve_pooling(Path(directory), pooling, normalize)
    settings = {"pooling": pooling, "normalize": normalize, "dtype": dtype}
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
        raise ValueError(f"{target}: not the embeddings that were kept there; delete it: {error}") from error
    return storage.open_npy(target / _EMBEDDINGS)


def fingerprint(
    directory: str | os.PathLike,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    dtype=jnp.float32,
) -> str:
    """A name for the features of texts: 64 hexadecimal digits that change with whatever changes the features.

    That is the content of the encoder's files, the texts and their order, and the settings, which are those
    of `cached_embeddings`. Without texts it is a name for the encoder.
    """
    directory = Path(directory)
    digest = hashlib.sha256()

    def add(content: bytes) -> None:
        digest.update(f"{len(content)}:".encode())  # so that nothing runs into what follows
        digest.update(content)

    how = (_VERSION, max_length, *resolve_pooling(directory, pooling, normalize), jnp.dtype(dtype).name)
    add(repr(how).encode())
    for file in (directory / "config.json", directory / "tokenizer.json", *weight_files(directory)):
        if file.is_file():
            with open(file, "rb") as opened:
                add(hashlib.file_digest(opened, "sha256").digest())
    for text in texts:
        add(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
