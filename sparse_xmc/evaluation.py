"""Ranking metrics of a model on a data set, and its predictions."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from sparse_xmc.data.batches import Batches
from sparse_xmc.data.formats import Dataset
from sparse_xmc.metrics import RankingMetrics
from sparse_xmc.models import Classifier


@functools.partial(jax.jit, static_argnums=(0, 3))
def _top_k(graphdef, state, inputs, k):
    return nnx.merge(graphdef, state).top_k(inputs, k)


def predict(
    model: Classifier, dataset: Dataset, k: int, *, batch_size: int = 256
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yields (points, scores [n, k], labels [n, k]) batch by batch, best first, in the data set's order.

    Args:
      model: the classifier; used without dropout, and not changed.
      dataset: the points; their labels are not looked at.
      k: how many labels; no more than the model has.
      batch_size: how many points are scored at once.
    """
    graphdef, state = nnx.split(nnx.view(model, deterministic=True))
    for points, batch in Batches(dataset, batch_size).in_order():
        scores, labels = _top_k(graphdef, state, batch.inputs, k)
        yield points, np.asarray(scores), np.asarray(labels)


def evaluate(
    model: Classifier,
    dataset: Dataset,
    *,
    ks: tuple[int, ...] = (1, 3, 5),
    inv_propensities: np.ndarray | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """The metrics of `RankingMetrics` of a model on a data set; never holds more than one batch of scores.

    Ranks beyond the number of labels count as misses.
    """
    metrics = RankingMetrics(ks=ks, inv_propensities=inv_propensities)
    k = min(max(ks), dataset.num_labels)
    for points, _, labels in predict(model, dataset, k, batch_size=batch_size):
        ranks = np.pad(labels, ((0, 0), (0, max(ks) - k)), constant_values=-1)
        metrics.update(ranks, dataset.labels[points])
    return metrics.compute()
