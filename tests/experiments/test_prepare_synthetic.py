"""Test of `experiments.prepare_synthetic`."""

import numpy as np

from experiments import prepare_synthetic
from experiments.measure.synthetic import Synthetic
from sparse_xmc.data import read_dense


def test_write_saves_points_of_synthetic_source(tmp_path):
    prepare_synthetic.write(tmp_path, labels=1000, train_points=2000, test_points=1000)
    train, test = (
        read_dense(tmp_path / f"{name}.npy", tmp_path / f"{name}.txt") for name in ("train", "test")
    )
    assert (train.labels.shape, test.labels.shape) == ((2000, 1000), (1000, 1000))
    expected = Synthetic(1000, 5.0).batch(2, 1000)
    np.testing.assert_array_equal(test.features, expected.inputs)
    for row in (0, 999):
        positives = expected.positives[row]
        np.testing.assert_array_equal(test.labels[[row]].indices, positives[positives >= 0])
    assert not (train.features[:1000] == test.features).all(axis=1).any()
