"""Tests of `experiments.measure.feature_selection` at small sizes."""

import itertools

import numpy as np

from experiments.measure import feature_selection

SIZES = feature_selection.Sizes(points=1500, labels=1000, words=300, labels_per_point=3.0, penultimate=64)


def test_make_dataset_statistics():
    train = feature_selection.make_dataset(SIZES)
    assert train.features.shape == (1500, 300)
    assert (np.diff(train.features.indptr) == 75).all()
    np.testing.assert_allclose(train.features.power(2).sum(axis=1), 1, rtol=1e-5)
    assert 2.8 < train.labels.nnz / 1500 < 3.2


def test_measure_compares_selection_with_epoch():
    ticks = itertools.count()
    report = feature_selection.measure(SIZES, now=lambda: float(next(ticks)))
    assert report["seconds"] == report["step_seconds"] == 1
    assert report["part_of_an_epoch"] == 1 / (1500 // 256)
    assert 0 < report["chosen_per_label"] <= 28
    assert "1.0 s, which is 20.0% of an epoch of steps of 1.00 s" in feature_selection.table(report)
