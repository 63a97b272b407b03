"""Tests of embedding bags, and of the training of embedding tables by rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax import nnx
from small_models import make_batches, make_positives

from sparse_xmc import (
    BagOfWords,
    BagOfWordsEncoder,
    Batch,
    Classifier,
    EmbeddingBag,
    EmbeddingTable,
    RewireConfig,
    Trainer,
    TrainingConfig,
)
from sparse_xmc.encoders.table import tables_of, used_rows
from sparse_xmc.heads import FixedFanInConfig, HeadSpec


def make_bags(matrix, padding):
    """Return the rows of a sparse matrix as bags with `padding` entries of padding."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    return BagOfWords(
        rows=np.pad(rows, (0, padding), constant_values=matrix.shape[0]).astype(np.int32),
        words=np.pad(matrix.indices, (0, padding)).astype(np.int32),
        weights=np.pad(matrix.data, (0, padding), constant_values=7),  # padding, whose weights have no effect
        num_examples=matrix.shape[0],
    )


@pytest.mark.parametrize("padding", [0, 9])
def test_embedding_bag_matches_matrix_product(padding):
    rng = np.random.default_rng(0)
    matrix = scipy.sparse.random_array((12, 30), density=0.2, rng=rng, dtype=np.float32, format="csr")
    dense = matrix.toarray()
    dense[[0, 5, 11]] = 0  # empty rows: the first, the last, and one between
    matrix = scipy.sparse.csr_array(dense)
    layer = EmbeddingBag(30, 4, rngs=nnx.Rngs(0))
    bags = make_bags(matrix, padding)
    embedding = np.asarray(layer.embedding[...], np.float64)
    np.testing.assert_allclose(jax.jit(layer)(bags), dense @ embedding, rtol=1e-5, atol=1e-6)

    cotangent = rng.normal(size=(12, 4)).astype(np.float32)
    grads = nnx.grad(lambda layer: jnp.sum(layer(bags) * cotangent))(layer)
    np.testing.assert_allclose(grads["embedding"][...], dense.T @ cotangent, rtol=1e-5, atol=1e-6)


def test_embedding_bag_of_padding_is_zero():
    layer = EmbeddingBag(30, 4, rngs=nnx.Rngs(0))
    empty = scipy.sparse.csr_array((3, 30), dtype=np.float32)
    np.testing.assert_array_equal(layer(make_bags(empty, 16)), np.zeros((3, 4)))


def test_embedding_bag_in_bfloat16():
    layer = EmbeddingBag(30, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    matrix = scipy.sparse.csr_array(np.eye(30, dtype=np.float32)[:5])
    assert layer.embedding.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        layer(make_bags(matrix, 3)).astype(jnp.float32), layer.embedding[:5].astype(jnp.float32)
    )


def make_trainer(encoder, features, **options):
    head = FixedFanInConfig(penultimate=0, fan_in=3, output_bound=0.5).make(
        HeadSpec(features, 30), nnx.Rngs(1)
    )
    training = TrainingConfig(batch_size=4, rewire=RewireConfig(fraction=0), **options)
    return Trainer(Classifier(encoder, head), training)


def embedding_of(trainer):
    """Return the only embedding table of a trainer's encoder."""
    ((_, table),) = tables_of(trainer.model.encoder)
    return np.asarray(table.embedding[...])


def adagrad_step(trainer, batch, squares, rate):
    """Return the table after a step of row-wise Adagrad in NumPy; add the gradient's squares to `squares`."""
    graphdef, params, rest = nnx.split(trainer.model, nnx.Param, ...)

    def loss_of(params):
        return nnx.merge(graphdef, params, rest, copy=True).loss(batch.inputs, batch.positives)

    (gradient,) = (
        np.asarray(leaf, np.float64) * 30  # the loss summed over labels
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.grad(loss_of)(params))
        if "embedding" in jax.tree_util.keystr(path)
    )
    squares += np.square(gradient).mean(axis=1)
    expected = embedding_of(trainer).copy()
    used = squares > 0
    expected[used] -= rate * gradient[used] / np.sqrt(squares[used])[:, None]
    return expected


def test_table_is_trained_by_row_wise_adagrad():
    trainer = make_trainer(BagOfWordsEncoder(12, 6, rngs=nnx.Rngs(0)), 6, embedding_lr_multiplier=2.0)
    # Words repeat within and between points. The last entries are padding. Words 0 and 11 are never used.
    rows = np.asarray([0, 0, 0, 1, 1, 2, 3, 3, 4, 4], np.int32)
    squares = np.zeros(12)
    for words in ([3, 5, 3, 5, 7, 7, 1, 2, 0, 0], [3, 4, 6, 8, 9, 10, 10, 3, 0, 0]):
        bags = BagOfWords(rows, np.asarray(words, np.int32), np.linspace(1, 2, 10, dtype=np.float32), 4)
        bags.weights[8:] = 0
        batch = Batch(bags, make_positives(4))
        before = embedding_of(trainer)
        expected = adagrad_step(trainer, batch, squares, rate=0.2)
        trainer.train_step(batch, 0.1)
        after = embedding_of(trainer)
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(after[[0, 11]], before[[0, 11]])
        np.testing.assert_allclose(trainer.state["squares"]["embedding.embedding"], squares, rtol=1e-5)
        assert np.abs(after - before).max() > 0.1


class Sequence(nnx.Module):
    """An encoder with a nested table, used twice with different ids, and a layer that Optax trains."""

    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(5, 6, rngs=rngs), EmbeddingTable(40, 5, rngs=rngs)])

    def __call__(self, ids):
        layer, table = self.blocks
        last = table.lookup(ids[:, -1] // 2)
        return nnx.gelu(layer(table.lookup(ids).mean(axis=1) + last))


def test_nested_table_is_trained_by_rows():
    with jax.numpy_dtype_promotion("standard"):
        trainer = make_trainer(Sequence(nnx.Rngs(0)), 6)
        squares = np.zeros(40)
        for seed in range(3):
            ids = np.random.default_rng(seed).integers(0, 36, (4, 3)).astype(np.int32)
            batch = Batch(ids, make_positives(4, seed=seed))
            expected = adagrad_step(trainer, batch, squares, rate=0.1)
            kernel = np.array(trainer.model.encoder.blocks[0].kernel[...])
            trainer.train_step(batch, 0.1)
            np.testing.assert_allclose(embedding_of(trainer), expected, rtol=1e-4, atol=1e-5)
            assert np.any(kernel != trainer.model.encoder.blocks[0].kernel[...])
        unused = sorted(set(range(40)) - set(np.flatnonzero(squares)))
        assert len(unused) > 10
        start = np.asarray(Sequence(nnx.Rngs(0)).blocks[1].embedding[...])
        np.testing.assert_array_equal(embedding_of(trainer)[unused], start[unused])


def test_used_rows_include_all_lookups():
    ids = np.asarray([[7, 3], [30, 7]], np.int32)
    (rows,) = used_rows(Sequence(nnx.Rngs(0)), ids).values()
    # The last ids are also halved: 3 to 1, and 7 to 3. Padding is 40.
    np.testing.assert_array_equal(rows, [1, 3, 7, 30, 40, 40])


@pytest.mark.parametrize("wrong", [-1, 40, 41, 2**31 - 1])
def test_ids_out_of_range_give_nan_and_train_no_rows(wrong):
    table = EmbeddingTable(40, 5, rngs=nnx.Rngs(0))
    rows = np.asarray(table.lookup(np.asarray([3, wrong, 39], np.int32)))
    assert np.isfinite(rows[[0, 2]]).all()
    assert np.isnan(rows[1]).all()
    with jax.numpy_dtype_promotion("standard"):
        trainer = make_trainer(Sequence(nnx.Rngs(0)), 6)
        ids = np.asarray([[39, 2, 4], [wrong, 3, 4], [1, 1, 1], [0, 0, 0]], np.int32)
        before = embedding_of(trainer)
        loss = trainer.train_step(Batch(ids, make_positives(4)), 0.1)
    assert np.isnan(loss)
    unused = np.setdiff1d(np.arange(40), np.append(ids[:, -1] // 2, ids))
    np.testing.assert_array_equal(embedding_of(trainer)[unused], before[unused])


def test_step_updates_table_in_place():
    encoder = BagOfWordsEncoder(200_000, 16, rngs=nnx.Rngs(0))
    (batch,) = make_batches(1, bag_of_words=True)
    trainer = make_trainer(encoder, 16)
    compiled = trainer.trace(batch)["step"].lower().compile().memory_analysis()
    assert compiled.temp_size_in_bytes < 200_000 * 16 * 4 / 10
    pointer = trainer.state["params"]["encoder"]["embedding"]["embedding"][...].unsafe_buffer_pointer()
    trainer.train_step(batch, 0.1)
    after = trainer.state["params"]["encoder"]["embedding"]["embedding"][...]
    assert after.unsafe_buffer_pointer() == pointer
