"""Calibration of scores to probabilities, on held-out points."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from sklearn.isotonic import IsotonicRegression

from sparse_xmc.data.dataset import Dataset
from sparse_xmc.data.files import write_text
from sparse_xmc.evaluation import predict
from sparse_xmc.metrics import is_listed
from sparse_xmc.model import Classifier

# Number of best labels of a point used for calibration. Labels of lower rank have low scores and are nearly
# always wrong.
_RANKS = 20


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A monotone mapping from scores to probabilities of correctness, fitted by isotonic regression.

    Among labels that are in the best 20 of their points and have probability p, a fraction p is correct, on
    points like the held-out ones. The calibration does not depend on the label: a label that is often wrong
    at a score at which other labels are correct gets the same probability.

    Attributes:
      scores: float64 [n], ascending.
      probabilities: float64 [n] in 0..1, ascending; interpolated linearly between scores.

    Reference: Zadrozny & Elkan, Transforming classifier scores into accurate multiclass probability
    estimates, KDD 2002.
    """

    scores: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def fit(cls, model: Classifier, dataset: Dataset, *, batch_size: int = 256) -> "Calibration":
        """Fit the calibration of a classifier on labelled points that it was not trained on.

        Args:
          model: the classifier.
          dataset: the held-out points, at least one.
          batch_size: number of points in a batch.

        Raises:
          ValueError: there are no points.
        """
        scores, is_correct = [], []
        k = min(_RANKS, dataset.num_labels)
        for rows, batch_scores, labels in predict(model, dataset, k, batch_size=batch_size):
            scores.append(batch_scores.ravel())
            is_correct.append(is_listed(labels, dataset.labels[rows]).ravel())
        if not scores:
            raise ValueError("calibration needs at least one point that was held out")
        fitted = IsotonicRegression().fit(
            np.concatenate(scores).astype(np.float64), np.concatenate(is_correct)
        )
        return cls(fitted.X_thresholds_, fitted.y_thresholds_)

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return the probabilities of scores, float64 of the same shape."""
        return np.interp(scores, self.scores, self.probabilities)

    def save(self, path: str | os.PathLike) -> None:
        """Write the calibration as a JSON file."""
        fields = {name: values.tolist() for name, values in vars(self).items()}
        write_text(path, json.dumps(fields) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Calibration":
        """Read a calibration saved by `save`.

        Raises:
          ValueError: the file is not a saved calibration.
        """
        try:
            fields = json.loads(Path(path).read_text())
            scores, probabilities = (np.array(fields[n], np.float64) for n in ("scores", "probabilities"))
            same_shape = scores.ndim == 1 and scores.shape == probabilities.shape
            ascending = all((np.diff(values) >= 0).all() for values in (scores, probabilities))
            in_range = np.isfinite(scores).all() and probabilities.min() >= 0 and probabilities.max() <= 1
            if not (same_shape and ascending and in_range):
                raise ValueError("expected ascending scores and as many ascending probabilities")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: not a calibration: {error}") from error
        return cls(scores, probabilities)
