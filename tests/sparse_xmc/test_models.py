import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_xmc.layers import BagOfWords
from sparse_xmc.losses import LOSSES
from sparse_xmc.models import OUTPUT_LAYERS, Classifier, ClassifierConfig

POSITIVES = np.array([[3, 7], [0, -1], [-1, -1], [19, 2], [7, -1]], np.int32)


def make_model(**options):
    """A small classifier for evaluation, all its parameters random."""
    sizes = {"num_features": 12, "num_labels": 20, "embedding": 6, "fan_in": 3, "penultimate": 8}
    model = Classifier(ClassifierConfig(**sizes | options), rngs=nnx.Rngs(0))
    model.eval()
    for i, (_, param) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        param[...] = jax.random.normal(jax.random.key(i), param.shape)
    return model


def make_inputs(bag_of_words):
    rng = np.random.default_rng(0)
    if not bag_of_words:
        return rng.normal(size=(5, 12)).astype(np.float32)
    return BagOfWords(
        rows=np.array([0, 0, 1, 3, 4, 4, 5, 5], np.int32),  # the third point has no words; two are padding
        words=rng.integers(0, 12, 8).astype(np.int32),
        weights=rng.random(8, np.float32),
        num_examples=5,
    )


@pytest.mark.parametrize("bag_of_words", [False, True])
@pytest.mark.parametrize("penultimate", [0, 8])
@pytest.mark.parametrize("output_layer", OUTPUT_LAYERS)
def test_loss_and_top_k_are_those_of_the_logits(output_layer, penultimate, bag_of_words):
    model = make_model(output_layer=output_layer, penultimate=penultimate, bag_of_words=bag_of_words)
    inputs = make_inputs(bag_of_words)
    logits = model(inputs)
    assert logits.shape == (5, 20)
    for name, loss in LOSSES.items():
        np.testing.assert_allclose(model.loss(inputs, POSITIVES, name), loss(logits, POSITIVES), rtol=1e-5)
    scores, labels = model.top_k(inputs, 4)
    expected_scores, expected_labels = jax.lax.top_k(logits, 4)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    np.testing.assert_array_equal(labels, expected_labels)
    assert labels.dtype == jnp.int32


def test_forward_pass_step_by_step():
    model = make_model(bag_of_words=True)
    inputs = make_inputs(True)
    words = np.zeros((5, 12), np.float32)
    for row, word, weight in zip(inputs.rows, inputs.words, inputs.weights, strict=True):
        if row < 5:
            words[row, word] += weight
    embedded = np.maximum(0, words @ np.asarray(model.embedding.embedding[...]))
    hidden = np.maximum(
        0, embedded @ np.asarray(model.penultimate.kernel[...]) + np.asarray(model.penultimate.bias[...])
    )
    kernel, indices = np.asarray(model.output.kernel[...]), np.asarray(model.output.indices[...])
    logits = (hidden[:, indices] * kernel).sum(axis=2) + np.asarray(model.output.bias[...])
    np.testing.assert_allclose(model(inputs), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_layer", OUTPUT_LAYERS)
def test_gradients_are_those_of_the_logits(output_layer):
    model, inputs = make_model(output_layer=output_layer), make_inputs(False)
    ours = nnx.grad(lambda model: model.loss(inputs, POSITIVES))(model)
    theirs = nnx.grad(lambda model: LOSSES["squared_hinge"](model(inputs), POSITIVES))(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


def test_dropout_is_for_training_only():
    model, inputs = make_model(dropout=0.5), make_inputs(False)
    np.testing.assert_array_equal(model(inputs), model(inputs))
    model.train()
    first, second = model.features(inputs), model.features(inputs)
    assert np.any(first != second)

    model = make_model(dropout=0.5, penultimate=0)
    model.train()
    kept = np.asarray(model.features(np.ones((1000, 12), np.float32)))
    assert set(np.unique(kept)) == {0, 2}  # what is kept is scaled up
    assert abs(np.mean(kept == 0) - 0.5) < 0.03


@pytest.mark.parametrize("output_layer", OUTPUT_LAYERS)
def test_output_bias_is_where_the_bias_starts(output_layer):
    config = ClassifierConfig(12, 20, fan_in=3, penultimate=8, output_layer=output_layer, output_bias=-1)
    model = Classifier(config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.output.bias[...], np.full(20, -1))


def test_sizes_of_the_parameters():
    def sizes(**options):
        model = make_model(**options)
        return {
            "/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
        }

    assert sizes(bag_of_words=True) == {
        "embedding/embedding": (12, 6),
        "penultimate/kernel": (6, 8),
        "penultimate/bias": (8,),
        "output/kernel": (20, 3),
        "output/bias": (20,),
    }
    assert sizes(output_layer="dense", penultimate=0) == {"output/kernel": (12, 20), "output/bias": (20,)}


def test_an_unknown_output_layer_is_an_error():
    with pytest.raises(ValueError, match="one of fixed_fan_in, unstructured, dense, got 'sparse'"):
        ClassifierConfig(12, 20, output_layer="sparse")


def test_a_fan_in_above_the_width_before_it_is_an_error():
    with pytest.raises(ValueError, match="fan_in must be between 1 and in_features = 8, got 9"):
        make_model(fan_in=9)


def test_an_unknown_loss_is_an_error():
    with pytest.raises(ValueError, match="loss must be one of squared_hinge, bce, got 'hinge'"):
        make_model().loss(make_inputs(False), POSITIVES, "hinge")
