"""Probabilities of scores, from points that were held out."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from sklearn.isotonic import IsotonicRegression

from sparse_xmc.data.files import write_text
from sparse_xmc.data.formats import Dataset
from sparse_xmc.evaluation import predict
from sparse_xmc.metrics import is_listed
from sparse_xmc.model import Classifier

# How many of a point's best labels are looked at. More would be wrong answers nearly all, and of low scores.
_RANKS = 20


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How likely a label of a score is right, by isotonic regression: the higher the score, the likelier.

    Of the labels that are among their points' best 20 and have probability p, a part p is right, on points
    like those that were held out. It says nothing of a label by itself: one that is often wrong at a score
    where others are right has their probability.

    Attributes:
      scores: float64 [n], ascending.
      probabilities: float64 [n] in 0..1, ascending; between two scores they are interpolated.

    Reference: Zadrozny & Elkan, Transforming classifier scores into accurate multiclass probability
    estimates, KDD 2002.
    """

    scores: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def fit(cls, model: Classifier, points: Dataset, *, batch_size: int = 256) -> "Calibration":
        """That of a classifier, by points that it was not trained on, with their labels."""
        scores, right = [], []
        k = min(_RANKS, points.num_labels)
        for rows, its_scores, labels in predict(model, points, k, batch_size=batch_size):
            scores.append(its_scores.ravel())
            right.append(is_listed(labels, points.labels[rows]).ravel())
        if not scores:
            raise ValueError("calibration needs at least one point that was held out")
        fitted = IsotonicRegression().fit(np.concatenate(scores).astype(np.float64), np.concatenate(right))
        return cls(fitted.X_thresholds_, fitted.y_thresholds_)

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities float64 of scores, of the same shape."""
        return np.interp(scores, self.scores, self.probabilities)

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as JSON."""
        fields = {name: values.tolist() for name, values in vars(self).items()}
        write_text(path, json.dumps(fields) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Calibration":
        """Reads what `save` wrote.

        Raises:
          ValueError: it is no calibration.
        """
        try:
            fields = json.loads(Path(path).read_text())
            scores, probabilities = (np.array(fields[n], np.float64) for n in ("scores", "probabilities"))
            of_both = scores.ndim == 1 and scores.shape == probabilities.shape
            ascending = all((np.diff(values) >= 0).all() for values in (scores, probabilities))
            within = np.isfinite(scores).all() and probabilities.min() >= 0 and probabilities.max() <= 1
            if not (of_both and ascending and within):
                raise ValueError("expected ascending scores and as many ascending probabilities")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: not a calibration: {error}") from error
        return cls(scores, probabilities)
