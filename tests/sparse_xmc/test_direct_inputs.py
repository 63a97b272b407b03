"""Tests of direct inputs, which labels read in addition to hidden units, and of their selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax import nnx
from small_models import FEATURES, LABELS, make_batches, make_model, points_with_counts

from sparse_xmc import BagOfWordsEncoder, RewireConfig, Trainer, TrainingConfig
from sparse_xmc.encoders import EncoderOutput
from sparse_xmc.heads import FixedFanInConfig, HeadSpec, StepInputs, feature_selection
from sparse_xmc.heads.feature_selection import select_direct_inputs
from sparse_xmc.heads.rewiring import rewire_active
from xla_ops import SparseInputs


def select_for_all_labels(features, labels, count):
    """Return the columns and their excesses that `select_direct_inputs` yields, for all labels."""
    blocks, columns, excess = zip(*select_direct_inputs(features, labels, count), strict=True)
    assert [label for block in blocks for label in range(block.start, block.stop)] == [
        *range(labels.shape[1])
    ]
    return np.concatenate(columns), np.concatenate(excess)


def random_problem(seed=0, points=40, features=25, labels=12):
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((points, features)) < 0.3, rng.random((points, features)), 0).astype(np.float32)
    y = rng.random((points, labels)) < 0.15
    y[:, 3] = False  # a label without points
    return x, y


def select_by_brute_force(x, y, count, dense):
    """Select direct inputs in NumPy, one label at a time."""
    columns = np.full((y.shape[1], count), -1)
    excess = np.zeros((y.shape[1], count))
    for label in np.flatnonzero(y.any(axis=0)):
        difference = x[y[:, label]].mean(axis=0, dtype=np.float64) - x.mean(axis=0, dtype=np.float64)
        candidates = [
            f
            for f in range(x.shape[1])
            if (dense or difference[f] > 0) and (dense or x[y[:, label], f].any())
        ]
        candidates.sort(key=lambda f: -(abs(difference[f]) if dense else difference[f]))
        best = candidates[:count]
        columns[label, : len(best)] = best
        excess[label, : len(best)] = difference[best]
    return columns, excess


@pytest.mark.parametrize("at_once", [1, 60, 1 << 20])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("count", [1, 6, 25])
def test_selected_columns_match_brute_force(monkeypatch, at_once, dense, count):
    monkeypatch.setattr(feature_selection, "_ENTRIES_AT_ONCE", at_once)
    x, y = random_problem()
    x = x - 0.3 * dense  # no zeros, some negative values
    features = x if dense else scipy.sparse.csr_array(x)
    columns, excess = select_for_all_labels(features, scipy.sparse.csr_array(y), count)
    expected_columns, expected = select_by_brute_force(x, y, count, dense)
    np.testing.assert_array_equal(columns, expected_columns)
    np.testing.assert_allclose(excess, expected, atol=1e-6)
    assert (columns[3] == -1).all()


def test_word_of_one_label_is_selected_for_it():
    features = scipy.sparse.csr_array(np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 1, 0.5]], np.float32))
    labels = scipy.sparse.csr_array(np.array([[True, False], [False, True], [False, True]]))
    columns, excess = select_for_all_labels(features, labels, 2)
    np.testing.assert_array_equal(columns, [[0, -1], [1, -1]])  # the word of all points is not selected
    np.testing.assert_allclose(excess, [[2 / 3, 0], [1 / 3, 0]], rtol=1e-6)


def test_head_starts_with_selected_words_and_hidden_units():
    counts = np.arange(LABELS) % 4
    train = points_with_counts(counts, FEATURES, sparse=True)
    config = FixedFanInConfig(penultimate=8, fan_in=5, direct_inputs=3)
    head = config.make(HeadSpec(6, LABELS, FEATURES, train), nnx.Rngs(0))
    columns, excess = select_for_all_labels(train.features, train.labels, 3)
    indices, kernel = np.asarray(head.output.indices[...]), np.asarray(head.output.kernel[...])
    for label in range(LABELS):
        words = columns[label][columns[label] >= 0]
        np.testing.assert_array_equal(indices[label][: len(words)], 8 + words)
        assert (indices[label][len(words) :] < 8).all()
        assert len(set(indices[label])) == 5
        if len(words):
            start = kernel[label, : len(words)]
            np.testing.assert_allclose(np.linalg.norm(start), 0.3, rtol=1e-5)
            np.testing.assert_allclose(
                start * np.linalg.norm(excess[label]), 0.3 * excess[label, : len(words)], rtol=1e-5
            )


@pytest.mark.parametrize("bag_of_words", [True, False])
def test_logits_match_dense_layer_on_concatenated_inputs(bag_of_words):
    model = make_model(
        bag_of_words=bag_of_words, fan_in=5, direct_inputs=3, direct_scale=2.0, output_bound=0.5
    )
    model.eval()
    (batch,) = make_batches(1, bag_of_words=bag_of_words)
    features = model.encoder(batch.inputs)
    x = features.features if bag_of_words else features
    head = model.head
    units = np.maximum(np.asarray(head.penultimate(x)), 0)
    inputs = np.asarray(features.direct.densify(len(x)) if bag_of_words else x)
    both = np.concatenate([units, 2 * inputs], axis=1)
    indices, kernel = np.asarray(head.output.indices[...]), np.asarray(head.output.kernel[...])
    assert (indices >= 8).any()
    assert (indices < 8).any()
    expected = np.einsum("blf,lf->bl", both[:, indices], kernel) + np.asarray(head.output.bias[...])
    np.testing.assert_allclose(model(batch.inputs), expected, rtol=1e-4, atol=1e-5)
    blocks = [logits for logits, _ in head.logits_in_blocks(features)]
    np.testing.assert_allclose(jnp.concatenate(blocks, axis=1), expected, rtol=1e-4, atol=1e-5)
    scores, labels = model.top_k(batch.inputs, 3)
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(expected, np.asarray(labels), 1), scores, rtol=1e-4, atol=1e-5
    )


def test_direct_inputs_are_scaled_like_embedding_inputs():
    (batch,) = make_batches(1, bag_of_words=True)
    encoder = BagOfWordsEncoder(FEATURES, 6, scale=1.5, return_direct_inputs=True, rngs=nnx.Rngs(0))
    x, words = encoder(batch.inputs)
    dense = np.zeros((len(x), FEATURES), np.float32)
    inside = np.asarray(batch.inputs.rows) < len(x)
    at = (np.asarray(batch.inputs.rows)[inside], np.asarray(batch.inputs.words)[inside])
    np.add.at(dense, at, np.asarray(batch.inputs.weights)[inside])
    np.testing.assert_allclose(words.densify(len(x)), 1.5 * dense, rtol=1e-6)
    np.testing.assert_allclose(x, np.maximum(1.5 * dense @ encoder.embedding.embedding[...], 0), atol=1e-5)


def test_gradient_of_features_includes_direct_inputs():
    head = make_model(fan_in=5, direct_inputs=3, direct_scale=2.0, output_bound=0.5).head
    (batch,) = make_batches(1)
    x, positives, training = jnp.asarray(batch.inputs), jnp.asarray(batch.positives), TrainingConfig()
    expected = jax.grad(head.loss)(x, positives)
    inputs = StepInputs(x, positives, jnp.float32(0.1), 0, jnp.int32(0))
    graphdef, state = nnx.split(head)

    @jax.jit
    def d_x_of_step(state):
        head = nnx.merge(graphdef, state, copy=True)
        return head.step_fused(inputs, head.init_moments(training), training)[1]

    d_x = d_x_of_step(state)
    np.testing.assert_allclose(d_x, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_active_growth_to_sparse_inputs_matches_dense_inputs(seed):
    rng = np.random.default_rng(seed)
    batch, units, num_words, labels, fan_in = 6, 5, 40, 9, 6
    x = rng.random((batch, units)).astype(np.float32)
    words = np.where(rng.random((batch, num_words)) < 0.2, rng.random((batch, num_words)), 0).astype(
        np.float32
    )
    rows, columns = np.nonzero(words)
    padding = np.zeros(4, np.int32)
    sparse = SparseInputs(
        jnp.asarray(np.concatenate([rows, padding + batch]), jnp.int32),
        jnp.asarray(np.concatenate([columns, padding]), jnp.int32),
        jnp.asarray(np.concatenate([words[rows, columns], padding + 7.0]), jnp.float32),
        num_words,
    )
    both = np.concatenate([x, words], axis=1)
    kernel = rng.normal(size=(labels, fan_in)).astype(np.float32)
    indices = np.stack([rng.permutation(units + num_words)[:fan_in] for _ in range(labels)]).astype(np.uint16)
    positives = np.array([[0, 3], [3, -1], [5, 1], [-1, -1], [2, 8], [7, 0]], np.int32)
    config = RewireConfig(fraction=0.5, growth="active")

    def rewired(x, words):
        arrays = jnp.asarray(kernel), jnp.asarray(indices), jnp.asarray(x), jnp.asarray(positives)
        return rewire_active(*arrays, config, (), words)

    for actual, expected in zip(rewired(x, sparse)[:3], rewired(both, None)[:3], strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert (np.asarray(rewired(x, sparse)[1]) >= units).any()


@pytest.mark.parametrize("bag_of_words", [True, False])
def test_training_lowers_the_loss_and_moves_connections(bag_of_words):
    with jax.numpy_dtype_promotion("standard"):
        model = make_model(bag_of_words=bag_of_words, fan_in=5, direct_inputs=3, penultimate=16)
        before = np.asarray(model.head.output.indices[...])
        config = TrainingConfig(
            learning_rate=0.01, rewire=RewireConfig(growth="active"), rewire_interval=2, batch_size=8
        )
        trainer = Trainer(model, config)
        batches = list(make_batches(3, bag_of_words=bag_of_words)) * 20
        losses = [float(trainer.train_step(batch, 0.01)) for batch in batches]
    assert losses[-1] < 0.5 * losses[0]
    assert (np.asarray(trainer.model.head.output.indices[...]) != before).any()


def test_invalid_direct_inputs_raise():
    with pytest.raises(ValueError, match="direct_inputs must be at most fan_in, 4, got 5"):
        FixedFanInConfig(fan_in=4, direct_inputs=5).make(HeadSpec(8, 9), nnx.Rngs(0))
    with pytest.raises(ValueError, match="without a penultimate layer labels read the features anyway"):
        FixedFanInConfig(penultimate=0, fan_in=4, direct_inputs=2).make(HeadSpec(8, 9), nnx.Rngs(0))
    model = make_model(bag_of_words=True, fan_in=4, direct_inputs=2)
    with pytest.raises(ValueError, match="growth to 'active' or its fraction to 0, got growth='random'"):
        Trainer(model, TrainingConfig())
    with pytest.raises(ValueError, match=f"must come with direct inputs, {FEATURES} of them, got none"):
        model.head(jnp.zeros((2, 6)))
    nothing = jnp.zeros(0, jnp.int32)
    with pytest.raises(ValueError, match=f"must come with direct inputs, {FEATURES} of them, got 3"):
        model.head(EncoderOutput(jnp.zeros((2, 6)), SparseInputs(nothing, nothing, jnp.zeros(0), 3)))
