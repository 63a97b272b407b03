import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import config_of, make_inputs, make_model, make_positives, make_random_model

from sparse_xmc import ClassifierConfig
from sparse_xmc.heads import HEADS, HeadTraining, StepInputs
from sparse_xmc.losses import LOSSES
from sparse_xmc.modules import in_evaluation, in_training

KINDS = pytest.mark.parametrize("kind", HEADS)
POSITIVES = make_positives(8)


@pytest.mark.parametrize("bag_of_words", [False, True])
@pytest.mark.parametrize("penultimate", [0, 8])
@KINDS
def test_loss_and_top_k_match_logits(kind, penultimate, bag_of_words):
    penultimate = penultimate or int(kind == "bottleneck")
    model = make_random_model(kind, penultimate=penultimate, bag_of_words=bag_of_words)
    inputs = make_inputs(bag_of_words=bag_of_words)
    logits = model(inputs)
    assert logits.shape == (8, 30)
    for name, loss in LOSSES.items():
        np.testing.assert_allclose(model.loss(inputs, POSITIVES, name), loss(logits, POSITIVES), rtol=1e-5)
    for k in (1, 4, 30):
        scores, labels = model.top_k(inputs, k)
        expected_scores, expected_labels = jax.lax.top_k(logits, k)
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(labels, expected_labels)
        assert labels.dtype == jnp.int32


def test_logits_match_numpy_forward_pass():
    model, inputs = make_random_model(bag_of_words=True), make_inputs(bag_of_words=True)
    words = np.zeros((8, 12), np.float32)
    for row, word, weight in zip(inputs.rows, inputs.words, inputs.weights, strict=True):
        if row < 8:
            words[row, word] += weight
    head = model.head
    embedded = np.maximum(0, words @ np.asarray(model.encoder.embedding.embedding[...]))
    hidden = np.maximum(
        0, embedded @ np.asarray(head.penultimate.kernel[...]) + np.asarray(head.penultimate.bias[...])
    )
    kernel, indices = np.asarray(head.output.kernel[...]), np.asarray(head.output.indices[...])
    logits = (hidden[:, indices] * kernel).sum(axis=2) + np.asarray(head.output.bias[...])
    np.testing.assert_allclose(model(inputs), logits, rtol=1e-4, atol=1e-5)


@KINDS
def test_loss_gradients_match_loss_of_logits(kind):
    model, inputs = make_random_model(kind), make_inputs()
    ours = nnx.grad(lambda model: model.loss(inputs, POSITIVES))(model)
    theirs = nnx.grad(lambda model: LOSSES["squared_hinge"](model(inputs), POSITIVES))(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


@KINDS
def test_positives_beyond_last_label_are_ignored(kind):
    model, inputs = make_random_model(kind), make_inputs()
    beyond = np.concatenate([POSITIVES, np.full((8, 1), 30, np.int32), np.full((8, 1), 2**31 - 1)], axis=1)
    for loss in LOSSES:
        expected = model.loss(inputs, POSITIVES, loss)
        np.testing.assert_array_equal(model.loss(inputs, beyond.astype(np.int32), loss), expected)


def test_dropout_is_applied_only_in_training():
    model, inputs = make_model(dropout=0.5), np.ones((1000, 12), np.float32)
    first, second = model.encoder(inputs), model.encoder(inputs)
    assert np.any(first != second)
    assert set(np.unique(first)) == {0, 2}  # kept features are scaled by 2
    assert abs(np.mean(first == 0) - 0.5) < 0.03
    np.testing.assert_array_equal(in_evaluation(model).encoder(inputs), inputs)
    model.eval()
    np.testing.assert_array_equal(model.encoder(inputs), inputs)
    assert np.any(in_training(model).encoder(inputs) == 0)
    assert in_training(model).head.output.kernel[...] is model.head.output.kernel[...]


@KINDS
def test_output_bias_is_initial_bias(kind):
    model = config_of(kind, output_bias=-1.0).make(rngs=nnx.Rngs(0))
    # The features are 0 and stay 0 after the penultimate layer, whose bias is 0.
    np.testing.assert_array_equal(model(np.zeros((2, 12), np.float32)), np.full((2, 30), -1))


def test_parameter_shapes():
    def sizes(*arguments, **options):
        model = make_model(*arguments, **options)
        return {
            ".".join(map(str, path)): node.shape
            for path, node in nnx.iter_graph(model)
            if isinstance(node, nnx.Param)
        }

    assert sizes(bag_of_words=True) == {
        "encoder.embedding.embedding": (12, 6),
        "head.penultimate.kernel": (6, 8),
        "head.penultimate.bias": (8,),
        "head.output.kernel": (30, 3),
        "head.output.bias": (30,),
    }
    assert sizes("dense") == {"head.output.kernel": (12, 30), "head.output.bias": (30,)}
    assert sizes("head_and_tail", penultimate=0) == {
        "head.heads.0.output.kernel": (12, 3),
        "head.heads.0.output.bias": (3,),
        "head.heads.1.output.kernel": (27, 3),
        "head.heads.1.output.bias": (27,),
    }


@KINDS
@pytest.mark.parametrize("bag_of_words", [False, True])
def test_config_json_round_trip(kind, bag_of_words):
    config = config_of(kind, bag_of_words=bag_of_words, dropout=0.25)
    assert ClassifierConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    "change", [{"head": {"kind": "sparse"}}, {"head": {}}, {"width": 3}, {"encoder": {"embeding": 3}}]
)
def test_invalid_config_json_raises(change):
    with pytest.raises(ValueError, match="not the configuration of a classifier"):
        ClassifierConfig.from_json(config_of().to_json() | change)


def test_invalid_settings_and_inputs_raise():
    with pytest.raises(ValueError, match="fan_in must be between 1 and in_features = 8, got 9"):
        make_model(fan_in=9)
    with pytest.raises(ValueError, match="loss must be one of squared_hinge, bce, got 'hinge'"):
        make_model().loss(make_inputs(), POSITIVES, "hinge")
    with pytest.raises(ValueError, match="loss must be one of squared_hinge, bce, got 'hinge'"):
        make_model("dense").loss(make_inputs(), POSITIVES, "hinge")
    with pytest.raises(ValueError, match=r"DenseFeatures: features must have .* \[B, 12\], got \[8, 11\]"):
        make_model()(make_inputs()[:, 1:])
    with pytest.raises(ValueError, match="head_and_tail needs at least 2 labels, got 1"):
        make_model("head_and_tail", labels=1)


@KINDS
def test_features_of_wrong_width_raise(kind):
    head, training = make_model(kind, penultimate=int(kind == "bottleneck")).head, HeadTraining()
    name = "|".join(type(part).__name__ for part in getattr(head, "heads", [head]))
    for width in (11, 13):
        features = jnp.ones((8, width))
        inputs = StepInputs(features, POSITIVES, jnp.float32(0.1), 0, jnp.int32(0))
        for use in (
            head,
            lambda x: head.loss(x, POSITIVES),
            lambda x: head.top_k(x, 2),
            lambda x: next(head.logits_in_blocks(x)),
            lambda x, inputs=inputs: head.step_fused(inputs, head.init_moments(training), training),
            lambda x, inputs=inputs: head.step_by_optax(inputs, head.init_moments(training), training),
        ):
            with pytest.raises(ValueError, match=rf"({name}): .* \[B, 12\], got \[8, {width}\]"):
                use(features)


@pytest.mark.parametrize("shorter", ["rows", "words", "weights"])
def test_bags_with_arrays_of_different_lengths_raise(shorter):
    bags = make_inputs(bag_of_words=True)
    bags = dataclasses.replace(bags, **{shorter: getattr(bags, shorter)[:1]})
    with pytest.raises(ValueError, match=r"EmbeddingBag: rows, words, weights must have shape \[N\], got"):
        make_model(bag_of_words=True)(bags)


def test_config_with_old_setting_names_loads():
    config = config_of("head_and_tail", bag_of_words=True)
    fields = json.loads(json.dumps(config.to_json()))
    old = {"direct_inputs": "direct", "head_lr_multiplier": "head_rate"}
    fields["head"] = {old.get(name, name): value for name, value in fields["head"].items()}
    assert old.items() <= {(new, name) for name in fields["head"] for new in old if old[new] == name}
    assert ClassifierConfig.from_json(fields) == config
