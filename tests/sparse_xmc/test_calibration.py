"""Tests of calibrated probabilities against known frequencies."""

import numpy as np
import pytest
import scipy.sparse
from small_models import FEATURES, LABELS, make_random_model

from sparse_xmc.calibration import Calibration
from sparse_xmc.data import Dataset
from sparse_xmc.evaluation import predict


def dataset(labels):
    x = np.random.default_rng(0).normal(size=(labels.shape[0], FEATURES)).astype(np.float32)
    return Dataset(x, scipy.sparse.csr_array(labels))


def test_probabilities_match_frequencies_of_correct_labels():
    model, rng = make_random_model(), np.random.default_rng(1)
    unlabelled = dataset(np.zeros((400, LABELS), bool))
    scores, labels = (
        np.concatenate(arrays) for arrays in list(zip(*predict(model, unlabelled, 20), strict=True))[1:]
    )
    true = 1 / (1 + np.exp(-scores))  # any increasing function
    positives = np.zeros((400, LABELS), bool)
    np.put_along_axis(positives, labels, rng.random(true.shape) < true, axis=1)
    calibration = Calibration.fit(model, dataset(positives))
    probabilities = calibration(scores)
    assert probabilities.shape == scores.shape
    assert np.all(np.diff(calibration(np.sort(scores.ravel()))) >= 0)
    assert np.all((probabilities >= 0) & (probabilities <= 1))
    np.testing.assert_allclose(probabilities, true, atol=0.12)
    assert np.mean(np.abs(probabilities - true)) < 0.03
    # Scores above those of the fitted points have the probability of the largest one.
    assert calibration(np.array([1e9])) == calibration(np.array([scores.max()]))


def test_probabilities_are_0_without_correct_labels():
    calibration = Calibration.fit(make_random_model(), dataset(np.zeros((5, LABELS), bool)))
    assert np.all(calibration(np.linspace(-9, 9, 5)) == 0)


def test_save_and_load_round_trip(tmp_path):
    calibration = Calibration(np.array([-1.0, 0.25, 2.0]), np.array([0.0, 1 / 3, 1.0]))
    calibration.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    np.testing.assert_array_equal(loaded.scores, calibration.scores)
    np.testing.assert_array_equal(loaded.probabilities, calibration.probabilities)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"scores": [1], "probabilities": [1, 1]}',
        '{"scores": [2, 1], "probabilities": [0, 1]}',
        '{"scores": [1, 2], "probabilities": [0, 1.5]}',
        '{"scores": [NaN], "probabilities": [0]}',
        '{"scores": [], "probabilities": []}',
    ],
)
def test_malformed_file_raises(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json: not a calibration"):
        Calibration.load(path)
