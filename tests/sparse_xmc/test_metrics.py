"""Tests of the metrics against plain loops, scikit-learn and manual computations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse import csc_array, csr_array
from sklearn.metrics import ndcg_score

from sparse_xmc.metrics import PROPENSITY_CONSTANTS, RankingMetrics, inverse_propensities, label_groups

KS = (1, 3, 5)


def loop_metrics(top_labels, dense_positives, weights, ks=KS):
    """Compute all metrics with loops over points and ranks, straight from their definitions."""
    sums, best = {}, {}

    def add(where, key, value):
        where[key] = where.get(key, 0.0) + value

    num_points = len(dense_positives)
    for row, flags in zip(top_labels, dense_positives, strict=True):
        positives = {label for label, flag in enumerate(flags) if flag}
        best_weights = sorted((weights[label] for label in positives), reverse=True)
        for k in ks:
            ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(positives))))
            hits = [label in positives for label in row[:k]]
            hit_weights = [weights[label] if label in positives else 0.0 for label in row[:k]]
            add(sums, f"p@{k}", sum(hits) / k)
            add(sums, f"ndcg@{k}", discounted(hits) / ideal if positives else 0.0)
            add(sums, f"recall@{k}", sum(hits) / len(positives) if positives else 0.0)
            add(sums, f"psp@{k}", sum(hit_weights) / k)
            add(best, f"psp@{k}", sum(best_weights[:k]) / k)
            add(sums, f"psndcg@{k}", discounted(hit_weights) / ideal if positives else 0.0)
            add(best, f"psndcg@{k}", discounted(best_weights[:k]) / ideal if positives else 0.0)
    return {
        key: total / (best[key] or 1.0) if key in best else total / num_points for key, total in sums.items()
    }


def discounted(gains):
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


@st.composite
def batches(draw):
    """Draw top labels (some -1), dense positives and weights. Few distinct scores give many ties."""
    num_points, num_labels = draw(st.integers(1, 8)), draw(st.integers(5, 12))
    shape = (num_points, num_labels)
    positives = draw(hnp.arrays(bool, shape))
    positives[draw(hnp.arrays(bool, num_points))] = False
    scores = draw(hnp.arrays(np.int8, shape, elements=st.integers(0, 3)))
    width = draw(st.integers(5, num_labels))
    top_labels = np.argsort(-scores, axis=1, kind="stable")[:, :width]
    top_labels[draw(hnp.arrays(bool, top_labels.shape, elements=st.booleans()))] = -1
    weights = draw(hnp.arrays(np.float64, num_labels, elements=st.floats(1, 50)))
    return top_labels, positives, weights


@given(batches())
def test_metrics_match_plain_loops(batch):
    top_labels, positives, weights = batch
    metrics = RankingMetrics(KS, weights)
    metrics.update(top_labels, csr_array(positives))
    results = metrics.compute()
    assert results == pytest.approx(loop_metrics(top_labels, positives, weights))
    assert all(0 <= value <= 1 + 1e-12 for value in results.values())


@given(batches(), st.data())
def test_updates_in_two_batches_match_one_update(batch, data):
    top_labels, positives, weights = batch
    cut = data.draw(st.integers(0, len(top_labels)))
    whole, pieces = RankingMetrics(KS, weights), RankingMetrics(KS, weights)
    whole.update(top_labels, csr_array(positives))
    for part in (slice(None, cut), slice(cut, None)):
        pieces.update(top_labels[part], csr_array(positives[part]))
    assert pieces.compute() == pytest.approx(whole.compute())


@given(batches())
def test_best_ranking_scores_one(batch):
    _, positives, weights = batch
    positives[:, :5] = True
    metrics = RankingMetrics(KS, weights)
    metrics.update(np.argsort(-weights * positives, axis=1), csr_array(positives))
    results = metrics.compute()
    best = [key for key in results if not key.startswith("recall")]
    assert {key: results[key] for key in best} == pytest.approx(dict.fromkeys(best, 1.0))


@pytest.mark.parametrize("k", KS)
def test_ndcg_matches_scikit_learn(k):
    rng = np.random.default_rng(k)
    scores = rng.permuted(np.tile(np.arange(30.0), (200, 1)), axis=1)
    positives = rng.random((200, 30)) < 0.1
    metrics = RankingMetrics([k])
    metrics.update(np.argsort(-scores, axis=1), csr_array(positives))
    assert metrics.compute()[f"ndcg@{k}"] == pytest.approx(ndcg_score(positives, scores, k=k))


def test_metrics_match_manual_computation():
    # Point 0 has labels 0 and 3, and label 3 is at rank 2. Point 1 has no labels. Point 2 has label 1, which
    # is at rank 1.
    positives = csr_array(np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]))
    top_labels = np.array([[2, 3], [0, 1], [1, -1]])
    metrics = RankingMetrics([1, 2], inv_propensities=[4.0, 2.0, 1.0, 3.0])
    metrics.update(top_labels, positives)
    second = 1 / math.log2(3)
    ideal = 1 + second
    assert metrics.compute() == pytest.approx(
        {
            "p@1": 1 / 3,
            "p@2": (1 + 0 + 1) / 2 / 3,
            "ndcg@1": 1 / 3,
            "ndcg@2": (second / ideal + 1) / 3,
            "recall@1": 1 / 3,
            "recall@2": (1 / 2 + 1) / 3,
            "psp@1": 2 / (4 + 2),
            "psp@2": (3 + 2) / (4 + 3 + 2),
            "psndcg@1": 2 / (4 + 2),
            "psndcg@2": (3 * second / ideal + 2) / ((4 + 3 * second) / ideal + 2),
        }
    )


def test_large_label_ids_do_not_overflow():
    num_labels = 2**31 - 1
    labels = np.full(1000, num_labels - 1)
    positives = csr_array((np.ones(1000), labels, np.arange(1001)), shape=(1000, num_labels))
    metrics = RankingMetrics([1])
    metrics.update(labels[:, None], positives)
    assert metrics.compute()["p@1"] == 1


def test_unsorted_repeated_and_zero_entries_of_positives():
    messy = csr_array((np.array([1, 1, 0, 1]), np.array([3, 0, 1, 3]), np.array([0, 4])), shape=(1, 4))
    metrics = RankingMetrics([2])
    metrics.update([[3, 1]], messy)
    assert metrics.compute() == pytest.approx(
        {"p@2": 0.5, "ndcg@2": 1 / (1 + 1 / math.log2(3)), "recall@2": 0.5}
    )
    assert messy.nnz == 4, "the caller's matrix was changed"


def test_points_without_labels_score_zero():
    metrics = RankingMetrics([1], np.ones(3))
    metrics.update([[0], [1]], csr_array((2, 3)))
    assert set(metrics.compute().values()) == {0.0}


@pytest.mark.parametrize(("a", "b"), PROPENSITY_CONSTANTS.values())
def test_inverse_propensities_match_formula(a, b):
    labels = csr_array(np.array([[1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 1]]))
    weights = inverse_propensities(labels, a, b)
    c = (math.log(4) - 1) * (b + 1) ** a
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, [1 + c * (count + b) ** -a for count in (4, 0, 2)], rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.eye(4),), "labels: expected a two-dimensional CSR matrix, got ndarray"),
        ((csr_array((2, 4)),), "labels: expected at least 3 rows"),
        ((csr_array((4, 4)), 0.0), "a: expected a positive number, got 0.0"),
        ((csr_array((4, 4)), 0.5, math.nan), "b: expected a positive number, got nan"),
    ],
)
def test_inverse_propensities_with_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        inverse_propensities(*arguments)


@pytest.mark.parametrize("ks", [(), (0, 1), (1, 1), (1.0,), 5])
def test_invalid_ks_raise(ks):
    with pytest.raises(ValueError, match="ks: expected distinct integers"):
        RankingMetrics(ks)


@pytest.mark.parametrize("weights", [[[1.0]], [1.0, 0.0], [math.inf]])
def test_invalid_inv_propensities_raise(weights):
    with pytest.raises(ValueError, match="inv_propensities: expected a vector of positive finite"):
        RankingMetrics(inv_propensities=weights)


@pytest.mark.parametrize(
    ("top_labels", "positives", "message"),
    [
        ([[0, 1]], np.zeros((1, 4)), "positives: expected a two-dimensional CSR matrix, got ndarray"),
        ([[0, 1]], csc_array((1, 4)), "positives: expected a two-dimensional CSR matrix, got csc_array"),
        ([[0, 1]], csr_array((1, 5)), r"positives: expected 4 columns \(labels\), got 5"),
        ([0, 1], csr_array((2, 4)), r"top_labels: expected shape \[2, >=2\], got \(2,\)"),
        ([[0]], csr_array((1, 4)), r"top_labels: expected shape \[1, >=2\], got \(1, 1\)"),
        ([[0, 1]], csr_array((2, 4)), r"top_labels: expected shape \[2, >=2\], got \(1, 2\)"),
        ([[0.0, 1.0]], csr_array((1, 4)), "top_labels: expected an integer dtype, got float64"),
        ([[0, 4]], csr_array((1, 4)), r"top_labels: expected ids in \[-1, 4\), got 4"),
        ([[-2, 0]], csr_array((1, 4)), r"top_labels: expected ids in \[-1, 4\), got -2"),
        ([[2, 2]], csr_array((1, 4)), "top_labels: expected distinct ids in each row, got a repeated one"),
    ],
)
def test_update_with_invalid_arguments_raises(top_labels, positives, message):
    metrics = RankingMetrics([2], np.ones(4))
    with pytest.raises(ValueError, match=message):
        metrics.update(top_labels, positives)


def test_update_with_other_number_of_labels_raises():
    metrics = RankingMetrics([1])
    metrics.update([[0]], csr_array((1, 4)))
    with pytest.raises(ValueError, match="positives: expected 4 columns"):
        metrics.update([[0]], csr_array((1, 5)))


def test_compute_without_points_raises():
    with pytest.raises(ValueError, match="compute: expected at least one point"):
        RankingMetrics().compute()


def test_label_groups_have_a_third_of_the_occurrences_each():
    # Occurrences 1, 6, 0, 3, 1, 1: from the most frequent, the labels are 1, 3, 0, 4, 5, 2.
    counts = [1, 6, 0, 3, 1, 1]
    labels = csr_array(np.array([[row < count for count in counts] for row in range(6)]))
    # Of 12 occurrences, those of label 1 start at 0, of label 3 at 6, of labels 0, 4 and 5 at 9, 10 and 11.
    np.testing.assert_array_equal(label_groups(labels), [2, 0, 2, 1, 2, 2])


def test_label_groups_break_ties_by_label_id():
    labels = csr_array(np.ones((5, 6), bool))
    np.testing.assert_array_equal(label_groups(labels), [0, 0, 1, 1, 2, 2])


def test_labels_without_points_are_tail_labels():
    groups = label_groups(csr_array((3, 4), dtype=bool))
    np.testing.assert_array_equal(groups, np.full(4, 2, np.int8), strict=True)
