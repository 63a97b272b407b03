"""Tests of embeddings by a frozen encoder, and of their cache."""

import jax.numpy as jnp
import numpy as np
import pytest
import small_encoders
from flax import nnx
from test_pretrained import load

from sparse_xmc.data.tokens import Tokenizer, TokenLists
from sparse_xmc.encoders import PretrainedEncoder, cached_embeddings, embed
from sparse_xmc.encoders.embedding_cache import fingerprint

WORDS = ["dog", "cat", "runs", "sleeps", "the", "a"]
TEXTS = ["the dog runs", "a cat", "the cat sleeps the dog sleeps a dog runs", "dog", "cat cat cat"]


@pytest.fixture
def directory(tmp_path):
    return small_encoders.add_tokenizer(small_encoders.make_directory(tmp_path / "encoder"), WORDS)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_embeddings_are_in_order_of_texts(tmp_path, batch_size):
    encoder = PretrainedEncoder.from_directory(small_encoders.make_directory(tmp_path))  # with dropout
    lengths = np.random.default_rng(0).integers(1, 23, 10)
    ids = np.random.default_rng(1).integers(0, small_encoders.VOCABULARY, lengths.sum()).astype(np.int32)
    lists = TokenLists(ids, np.concatenate([[0], np.cumsum(lengths)]), 24)
    embedded = embed(encoder, lists, batch_size=batch_size)
    assert (embedded.dtype, embedded.shape) == (np.float32, (10, encoder.features))
    expected = [
        small_encoders.reference("bert", small_encoders.make_tensors("bert"), lists.take([i]), "mean")[0]
        for i in range(10)
    ]
    np.testing.assert_allclose(embedded, expected, rtol=1e-4, atol=1e-5)
    assert encoder.dropout.deterministic is False  # embed does not change the encoder's mode


SHAPES = []


class _Recorder(nnx.Module):
    """An encoder that returns the first token of each text and records the shapes it is traced with."""

    def __call__(self, tokens):
        SHAPES.append(tokens.ids.shape)
        return tokens.ids[:, :1].astype(jnp.float32)


def test_long_texts_are_embedded_in_smaller_batches():
    lengths = np.random.default_rng(0).permutation(np.repeat([200, 100, 20, 3], 20))
    lists = TokenLists(
        np.arange(lengths.sum(), dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)]), 256
    )
    SHAPES.clear()
    embedded = embed(_Recorder(), lists, batch_size=8)
    np.testing.assert_array_equal(embedded[:, 0], lists.indptr[:-1])
    assert sorted(set(SHAPES)) == [(1, 256), (2, 128), (8, 16), (8, 24)]


def test_embed_without_texts(tmp_path):
    encoder = load(small_encoders.make_directory(tmp_path))
    assert embed(encoder, TokenLists(np.zeros(0, np.int32), np.zeros(1, np.int64), 24)).shape == (0, 12)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        embed(encoder, TokenLists(np.zeros(0, np.int32), np.zeros(1, np.int64), 24), batch_size=0)


def test_cache_is_reused(directory, tmp_path, monkeypatch):
    first = cached_embeddings(directory, TEXTS, tmp_path / "cache", max_length=8, batch_size=2)
    assert isinstance(first, np.memmap)
    assert first.dtype == np.float32
    assert not first.flags.writeable
    tokens = Tokenizer.from_directory(directory, max_length=8)(TEXTS).take(range(5))
    np.testing.assert_allclose(first, load(directory)(tokens), rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no temporary files are left

    def fail(*_, **__):
        raise AssertionError("the encoder is used")

    monkeypatch.setattr(PretrainedEncoder, "__call__", fail)
    monkeypatch.setattr(PretrainedEncoder, "from_directory", fail)
    again = cached_embeddings(directory, tuple(TEXTS), tmp_path / "cache", max_length=8, pooling="mean")
    np.testing.assert_array_equal(again, first)
    with pytest.raises(AssertionError, match="the encoder is used"):
        cached_embeddings(directory, TEXTS[::-1], tmp_path / "cache", max_length=8)


@pytest.mark.parametrize("name", ["embeddings.npy", "checksums.json"])
def test_damaged_cache_raises(directory, tmp_path, name):
    cached_embeddings(directory, TEXTS, tmp_path / "cache", max_length=8)
    (entry,) = (tmp_path / "cache").iterdir()
    content = (entry / name).read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[: len(content) // 2], None):
        if damaged is None:
            (entry / name).unlink()
        else:
            (entry / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{entry}: damaged embeddings; delete this directory"):
            cached_embeddings(directory, TEXTS, tmp_path / "cache", max_length=8)


def test_failed_embedding_leaves_no_cache(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_xmc.encoders.embedding_cache.embed", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cached_embeddings(directory, TEXTS, tmp_path / "cache", max_length=8)
    assert list((tmp_path / "cache").iterdir()) == []


def test_fingerprint_depends_on_texts_options_and_files(directory):
    names = [
        fingerprint(directory, TEXTS),
        fingerprint(directory, TEXTS[::-1]),
        fingerprint(directory, ["".join(TEXTS)]),
        fingerprint(directory, []),
        fingerprint(directory, TEXTS, max_length=8),
        fingerprint(directory, TEXTS, pooling="cls"),
        fingerprint(directory, TEXTS, normalize=True),
        fingerprint(directory, TEXTS, dtype=jnp.bfloat16),
    ]
    assert fingerprint(directory, TEXTS, pooling="mean", normalize=False) == names[0]
    small_encoders.make_directory(directory, seed=1)  # other weights
    names.append(fingerprint(directory, TEXTS))
    for file in ("tokenizer.json", "config.json"):
        with open(directory / file, "a") as opened:
            opened.write("\n")
        names.append(fingerprint(directory, TEXTS))
    assert len({*names}) == len(names)


def test_cached_embeddings_without_texts_raise(directory, tmp_path):
    with pytest.raises(ValueError, match="no texts"):
        cached_embeddings(directory, [], tmp_path / "cache")
