import tracemalloc

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.measure.synthetic import Synthetic
from sparse_xmc.heads import DenseConfig
from sparse_xmc.model import ClassifierConfig, EncoderConfig
from sparse_xmc.modules import in_evaluation
from sparse_xmc.train import Trainer, TrainingConfig


def joined_batches(source, count, start=0):
    """Return the concatenated features and positives of `count` batches."""
    batches = [source.batch(start + i, 1000) for i in range(count)]
    return np.concatenate([b.inputs for b in batches]), np.concatenate([b.positives for b in batches])


@pytest.mark.parametrize(
    ("num_labels", "labels_per_point", "hundredth", "tenth"),
    [
        (16_087, 6.25, (0.28, 0.40), (0.60, 0.72)),
        (670_091, 5.45, (0.28, 0.40), (0.60, 0.72)),
        (2_812_281, 36.17, (0.15, 0.25), (0.5, 0.72)),  # flatter, because the labels of a point are distinct
    ],
)
def test_label_statistics_match_real_data_sets(num_labels, labels_per_point, hundredth, tenth):
    source = Synthetic(num_labels, labels_per_point, num_features=16)
    _, positives = joined_batches(source, 20)
    assert positives.max() < num_labels
    counts = (positives >= 0).sum(axis=1)
    assert counts.min() >= 1
    assert counts.mean() == pytest.approx(labels_per_point, rel=0.02)
    assert counts.std() == pytest.approx(np.sqrt(labels_per_point - 1), rel=0.1)
    for row in positives[:500]:
        labels = row[row >= 0]
        assert len(set(labels)) == len(labels)
        np.testing.assert_array_equal(row[len(labels) :], -1)

    # In the shipped data set, a hundredth of the labels has 0.31 of the occurrences, and a tenth has 0.67.
    labels = positives[positives >= 0]
    assert hundredth[0] < np.mean(labels < num_labels // 100) < hundredth[1]
    assert tenth[0] < np.mean(labels < num_labels // 10) < tenth[1]
    # In the shipped data set, no label has more than 5% of the points.
    assert np.bincount(labels).max() < 0.08 * len(positives)
    # The rarer half of the labels also occurs, up to the rarest labels.
    assert np.mean(labels >= num_labels // 2) > 0.05
    assert labels.max() > 0.99 * num_labels


def test_labels_of_point_are_from_one_cluster():
    source = Synthetic(50_000, 5, num_features=16)
    _, positives = joined_batches(source, 2)
    for row in positives:
        assert len(set(row[row >= 0] % 50)) == 1


def test_batch_depends_only_on_index_and_seed():
    first, again, other = (Synthetic(10_000, 5).batch(i, 8) for i in (3, 3, 4))
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.positives, again.positives)
    assert first.inputs.shape == (8, 768)
    assert first.inputs.dtype == np.float32
    assert first.positives.dtype == np.int32
    assert np.any(first.inputs != other.inputs)
    assert np.any(Synthetic(10_000, 5, seed=1).batch(3, 8).inputs != first.inputs)


def test_memory_is_small_for_millions_of_labels():
    tracemalloc.start()
    Synthetic(8_623_847, 5).batch(0, 32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150 << 20


def test_classifier_generalizes_to_new_points():
    source = Synthetic(1000, 2, num_features=128)
    config = ClassifierConfig(128, 1000, encoder=EncoderConfig(dropout=0), head=DenseConfig(output_bias=-1))
    with jax.numpy_dtype_promotion("standard"):
        trainer = Trainer(config.make(rngs=nnx.Rngs(0)), TrainingConfig(epsilon=1e-10), seed=0)
        for i in range(150):
            trainer.train_step(source.batch(i, 128), 3e-3)
    batch = source.batch(1000, 500)
    _, labels = in_evaluation(trainer.model).top_k(batch.inputs, 1)
    hits = np.mean((np.asarray(labels) == batch.positives).any(axis=1))
    # Always predicting the most frequent label would be right for at most 2 / ln(1001) * ln(2) = 0.2 of
    # the points.
    assert hits > 0.5


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((999, 5), "num_labels must be at least 1000, got 999"),
        ((1000, 0.5), "labels_per_point must be between 1 and 100, got 0.5"),
        ((1000, 101), "labels_per_point must be between 1 and 100, got 101"),
    ],
)
def test_synthetic_raises_for_sizes_out_of_range(sizes, message):
    with pytest.raises(ValueError, match=message):
        Synthetic(*sizes)
