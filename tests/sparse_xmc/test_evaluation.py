import dataclasses
import gc

import jax
import numpy as np
import pytest
import scipy.sparse
from flax import nnx
from small_models import config_of

from sparse_xmc import evaluation
from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import Batches
from sparse_xmc.evaluation import evaluate, evaluate_groups, gradient_density, predict
from sparse_xmc.heads import HEADS, head
from sparse_xmc.losses import LOSSES


def make_dataset(size, *, sparse=False):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(size, 12)).astype(np.float32)
    features = scipy.sparse.csr_array(np.where(features > 0, features, 0)) if sparse else features
    return Dataset(features, scipy.sparse.csr_array(rng.random((size, 20)) < 0.2))


def make_model(kind="fixed_fan_in", **options):
    sizes = {"labels": 20, "penultimate": 16, "fan_in": 4, "dropout": 0.5}
    return config_of(kind, **sizes | options).make(rngs=nnx.Rngs(0))


def all_logits(model, dataset):
    """Return the logits of all points without dropout, computed one point at a time."""
    features = dataset.features if isinstance(dataset.features, np.ndarray) else dataset.features.toarray()
    if dataset.is_sparse:
        features = np.maximum(0, features @ np.asarray(model.encoder.embedding.embedding[...]))
    return np.concatenate([np.asarray(model.head(x[None])) for x in features])


@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
@pytest.mark.parametrize(
    ("kind", "bag_of_words"), [*((kind, False) for kind in HEADS), ("fixed_fan_in", True)]
)
def test_predict_returns_best_labels_in_order(kind, bag_of_words, batch_size):
    model, dataset = make_model(kind, bag_of_words=bag_of_words), make_dataset(23, sparse=bag_of_words)
    logits = all_logits(model, dataset)
    seen = []
    for points, scores, labels in predict(model, dataset, 6, batch_size=batch_size):
        seen += range(points.start, points.stop)
        assert scores.shape == labels.shape == (points.stop - points.start, 6)
        expected = np.argsort(-logits[points], axis=1, kind="stable")[:, :6]
        np.testing.assert_array_equal(labels, expected)
        np.testing.assert_allclose(scores, np.take_along_axis(logits[points], expected, axis=1), rtol=1e-4)
    assert seen == list(range(23))


@pytest.mark.parametrize("batch_size", [7, 256])
def test_metrics_match_manual_computation(batch_size):
    model, dataset = make_model(), make_dataset(23)
    ranked = np.argsort(-all_logits(model, dataset), axis=1)
    positives = dataset.labels.toarray()
    weights = np.linspace(1, 3, 20)
    metrics = evaluate(model, dataset, ks=(1, 4), inv_propensities=weights, batch_size=batch_size)
    hits = [[positives[i, label] for label in ranked[i, :4]] for i in range(23)]
    assert metrics["p@1"] == pytest.approx(sum(h[0] for h in hits) / 23)
    assert metrics["p@4"] == pytest.approx(sum(sum(h) for h in hits) / 23 / 4)
    best = sum(weights[positives[i]].max(initial=0) for i in range(23))
    assert metrics["psp@1"] == pytest.approx(
        sum(weights[ranked[i, 0]] * hits[i][0] for i in range(23)) / best
    )
    assert set(metrics) == {
        f"{name}@{k}" for name in ("p", "ndcg", "recall", "psp", "psndcg") for k in (1, 4)
    }
    assert "psp@1" not in evaluate(model, dataset, ks=(1,))


def test_evaluate_does_not_change_model():
    model, dataset = make_model(), make_dataset(10)
    before = jax.tree.map(
        lambda a: np.asarray(a).copy(), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    )
    first, second = (evaluate(model, dataset) for _ in range(2))
    assert first == second
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not model.encoder.dropout.deterministic  # still ready to train


def test_ranks_beyond_the_number_of_labels_are_misses():
    model, points = make_model(), make_dataset(5)
    metrics = evaluate(model, points, ks=(20, 25))
    assert metrics["recall@25"] == metrics["recall@20"] > 0
    assert metrics["p@25"] == pytest.approx(metrics["p@20"] * 20 / 25)


def test_predict_with_k_above_number_of_labels_raises():
    with pytest.raises(ValueError, match=r"k must be in 0..20 \(the number of labels\), got 21"):
        next(predict(make_model(), make_dataset(5), 21))


@pytest.mark.parametrize("kind", HEADS)
def test_predict_with_non_finite_scores_raises(kind):
    dataset = make_dataset(9)
    dataset.features[7] = np.nan
    with pytest.raises(FloatingPointError, match="the scores of point 7 are not finite"):
        list(predict(make_model(kind), dataset, 5, batch_size=4))


def test_models_of_same_structure_share_programs_that_are_freed():
    def programs():
        gc.collect()
        executables = jax.devices()[0].client.live_executables()
        return sum(executable.hlo_modules()[0].name == "jit_top_k" for executable in executables)

    def rank(model, size):
        (*_,) = predict(model, make_dataset(size), 3)

    evaluation._find_ranking.cache_clear()
    before, first, second = programs(), make_model(), make_model()
    for size in range(1, 9):
        rank(first, size)
        rank(second, size)
    assert programs() - before == 4  # for 1, 2, 4 and 8 points
    models = [make_model(penultimate=width) for width in range(20, 26)]
    for model in models:
        rank(model, 1)
    rank(first, 1)
    assert programs() - before == 4 + 6
    del first, second, models, model
    assert programs() - before <= 4 + 1  # the last two structures
    for width in (30, 31):
        rank(make_model(penultimate=width), 1)
    assert programs() - before <= 2


def test_evaluate_without_points_raises():
    with pytest.raises(ValueError, match="expected at least one point"):
        evaluate(make_model(), make_dataset(5).take(slice(0)))


def test_excluded_labels_are_not_ranked():
    model, dataset = make_model(), make_dataset(23)
    # Up to 18 of 20 labels are excluded, so the five best of the others have low ranks among all labels.
    rng = np.random.default_rng(1)
    excluded = rng.random((23, 20)) < np.linspace(0, 0.9, 23)[:, None]
    logits = np.where(excluded, -np.inf, all_logits(model, dataset))
    positives = dataset.labels.toarray()
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    hits = [[positives[i, label] and np.isfinite(logits[i, label]) for label in ranked[i]] for i in range(23)]
    dataset = dataclasses.replace(dataset, excluded=scipy.sparse.csr_array(excluded))
    metrics = evaluate(model, dataset, batch_size=7)
    assert metrics["p@1"] == pytest.approx(np.mean([h[0] for h in hits]))
    assert metrics["p@5"] == pytest.approx(np.mean(hits))
    assert metrics["p@5"] != evaluate(model, make_dataset(23))["p@5"]


@pytest.mark.parametrize("candidates", [20, 3])
def test_precision_by_group_ranks_labels_of_the_group(monkeypatch, candidates):
    monkeypatch.setattr(evaluation, "CANDIDATES", candidates)
    model, dataset = make_model(), make_dataset(23)
    excluded = np.zeros((23, 20), bool)
    excluded[:, 3] = True
    groups = np.repeat(np.array([0, 1, 2], np.int8), [4, 6, 10])
    logits = np.where(excluded, -np.inf, all_logits(model, dataset))
    positives = dataset.labels.toarray()
    expected = []
    for group in range(3):
        results = []
        for i in range(23):
            if not positives[i, groups == group].any():
                continue
            ranked = [
                label
                for label in np.argsort(-logits[i], kind="stable")[:candidates]
                if groups[label] == group and not excluded[i, label]
            ]
            results.append(bool(ranked) and bool(positives[i, ranked[0]]))
        expected.append(np.mean(results))
    found = evaluate_groups(
        model,
        dataclasses.replace(dataset, excluded=scipy.sparse.csr_array(excluded)),
        groups,
        batch_size=7,
    )
    assert list(found) == ["head", "middle", "tail"]
    assert list(found.values()) == pytest.approx(expected)


def test_group_without_points_has_no_precision():
    found = evaluate_groups(make_model(), make_dataset(23), np.zeros(20, np.int8))
    assert found["head"] > 0
    assert found["middle"] is None


@pytest.mark.parametrize("kind", HEADS)
def test_gradient_density_is_fraction_of_nonzero_gradients(monkeypatch, kind):
    monkeypatch.setattr(head, "_LABELS_AT_ONCE", 7)  # the last block is smaller
    model, dataset = make_model(kind, output_bias=-1.0, output_bound=0.5), make_dataset(23)
    model.eval()
    batches = [batch for _, batch in Batches(dataset, 10).in_order()]
    nonzero = 0
    for batch in batches:
        gradient = jax.grad(LOSSES["squared_hinge"])(model(batch.inputs), batch.positives)
        nonzero += np.count_nonzero(gradient)
    assert 0.05 < nonzero / (23 * 20) < 0.95
    assert gradient_density(model, batches) == nonzero / (23 * 20)


def test_gradient_density_of_bce_is_one():
    assert gradient_density(make_model(), [], "bce") == 1


def test_gradient_density_applies_dropout_and_keeps_rng_state():
    model, dataset = make_model(output_bound=0.5), make_dataset(200)
    batches = [batch for _, batch in Batches(dataset, 200).in_order()]
    counts = jax.tree.leaves(nnx.state(model, nnx.RngCount))
    with_dropout = [gradient_density(model, batches) for _ in range(2)]
    assert with_dropout[0] == with_dropout[1]
    assert counts == jax.tree.leaves(nnx.state(model, nnx.RngCount))
    model.eval()
    assert gradient_density(model, batches) != with_dropout[0]
