"""Evaluation of a model on a data set: predictions, ranking metrics, density of the gradient."""

import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_xmc.data.batches import Batch, padded_inputs
from sparse_xmc.data.dataset import Dataset, Points
from sparse_xmc.losses import find_loss
from sparse_xmc.mesh import data_size, local_rows, place_batch, place_inputs
from sparse_xmc.metrics import LABEL_GROUPS, RankingMetrics, is_listed
from sparse_xmc.model import Classifier
from sparse_xmc.modules import in_evaluation, merge

# Minimum number of labels to rank when some are excluded afterwards, and the number searched for the best
# label of each group.
CANDIDATES = 100


class _Ranking:
    """The compiled ranking programs of classifiers of one structure, one for each shape and k."""

    def __init__(self, graphdef: nnx.GraphDef):
        def top_k(state: nnx.State, inputs: Any, k: int) -> tuple[jax.Array, jax.Array]:
            return nnx.merge(graphdef, state).top_k(inputs, k)

        self.top_k = jax.jit(top_k, static_argnums=2)


# Classifiers of the same structure share programs, which are freed with the last of these classifiers. The
# two programs used last are kept in any case, because each `Trainer.model` is a new object.
_by_structure: weakref.WeakValueDictionary[nnx.GraphDef, _Ranking] = weakref.WeakValueDictionary()
_by_classifier: weakref.WeakKeyDictionary[Classifier, _Ranking] = weakref.WeakKeyDictionary()


@functools.lru_cache(maxsize=2)
def _find_ranking(graphdef: nnx.GraphDef) -> _Ranking:
    ranking = _by_structure.get(graphdef)
    if ranking is None:
        ranking = _by_structure[graphdef] = _Ranking(graphdef)
    return ranking


def _ranking(model: Classifier) -> tuple[_Ranking, nnx.State]:
    """Return the ranking programs of a classifier, and the state that they take."""
    graphdef, state = nnx.split(in_evaluation(model))
    ranking = _by_classifier[model] = _find_ranking(graphdef)
    return ranking, state


def predict(
    model: Classifier, points: Points, k: int, *, batch_size: int = 256
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield the k best labels of all points, batch by batch, in the order of the points.

    Args:
      model: the classifier; it is applied without dropout, and is not changed.
      points: the points; labels and exclusions of a `Dataset` are ignored.
      k: number of labels for each point, at most the number of labels of the model.
      batch_size: number of points in a batch.

    Yields:
      A range of n points, their scores [n, k] and labels [n, k], best first.

    Raises:
      FloatingPointError: a score is not finite.
    """
    ranking, state = _ranking(model)
    mesh = model.head.mesh
    batches = padded_inputs(points, batch_size, multiple_of=data_size(mesh), local_rows=local_rows(mesh))
    for rows, inputs in batches:
        placed = place_inputs(inputs, len(inputs), mesh)
        count = rows.stop - rows.start
        scores, labels = (np.asarray(array)[:count] for array in ranking.top_k(state, placed, k))
        if not np.isfinite(scores).all():
            row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
            raise FloatingPointError(f"the scores of point {rows.start + row} are not finite")
        yield rows, scores, labels


def trace_top_k(model: Classifier, inputs: Any) -> jax.stages.Traced:
    """Trace the program that ranks a batch in evaluation, without running it.

    Args:
      model: the classifier; its arrays may be shapes.
      inputs: the inputs of the batch, or their shapes.
    """
    ranking, state = _ranking(model)
    return ranking.top_k.trace(state, inputs, min(5, model.head.num_labels))


def evaluate(
    model: Classifier,
    dataset: Dataset,
    *,
    ks: tuple[int, ...] = (1, 3, 5),
    inv_propensities: np.ndarray | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """Compute ranking metrics of a model on a data set, holding the scores of one batch at a time.

    Excluded labels of the data set are removed from the ranking; ranks beyond the number of labels count as
    misses.

    Args:
      model: the classifier.
      dataset: the points and their labels.
      ks: cut-offs of the metrics.
      inv_propensities: float64 [L], inverse propensities of the labels, for the propensity-scored metrics;
        None to leave these out.
      batch_size: number of points in a batch.

    Returns:
      The metrics of `RankingMetrics`, by names such as "p@1".

    Raises:
      ValueError: the data set has no points.
      FloatingPointError: a score is not finite.
    """
    if not len(dataset):
        raise ValueError("expected at least one point to evaluate on, got none")
    metrics = RankingMetrics(ks=ks, inv_propensities=inv_propensities)
    for rows, labels in _rankings(model, dataset, max(ks), batch_size):
        metrics.update(labels, dataset.labels[rows])
    return metrics.compute()


def evaluate_groups(
    model: Classifier, dataset: Dataset, groups: np.ndarray, *, batch_size: int = 256
) -> dict[str, float | None]:
    """Compute P@1 within head, middle and tail labels, with the best-ranked label of each group.

    The mean is over the points with at least one label of the group. A point without any label of the group
    among its `CANDIDATES` best labels counts as a miss.

    Args:
      model: the classifier.
      dataset: the points; labels that it excludes are removed from the ranking.
      groups: int [L], from `sparse_xmc.metrics.label_groups`.
      batch_size: number of points in a batch.

    Returns:
      P@1 for each name in `LABEL_GROUPS`; None if no point has a label of the group.
    """
    hits, totals = np.zeros((2, len(LABEL_GROUPS)), np.int64)
    members = [dataset.labels @ (groups == group).astype(np.int64) > 0 for group in range(len(LABEL_GROUPS))]
    for rows, labels in _rankings(model, dataset, CANDIDATES, batch_size):
        hit = is_listed(labels, dataset.labels[rows])
        for group, has_label in enumerate(members):
            in_group = (labels >= 0) & (groups[labels] == group)
            first = in_group.argmax(axis=1)[:, None]
            is_hit = np.take_along_axis(in_group & hit, first, axis=1)[:, 0]
            hits[group] += np.sum(is_hit & has_label[rows])
            totals[group] += np.sum(has_label[rows])
    return {
        name: float(hit / total) if total else None
        for name, hit, total in zip(LABEL_GROUPS, hits, totals, strict=True)
    }


def _rankings(
    model: Classifier, dataset: Dataset, k: int, batch_size: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield ranges of n points and their labels [n, k] without excluded ones, best first, padded with -1."""
    candidates = k
    if dataset.excluded is not None:
        candidates = max(CANDIDATES, k + np.diff(dataset.excluded.indptr).max(initial=0))
    candidates = min(int(candidates), dataset.num_labels)
    for rows, _, labels in predict(model, dataset, candidates, batch_size=batch_size):
        if dataset.excluded is not None:
            dropped = is_listed(labels, dataset.excluded[rows])
            order = np.argsort(dropped, axis=1, kind="stable")
            labels = np.take_along_axis(np.where(dropped, -1, labels), order, axis=1)
        yield rows, np.pad(labels[:, :k], ((0, 0), (0, max(0, k - candidates))), constant_values=-1)


def gradient_density(model: Classifier, batches: Iterable[Batch], loss: str = "squared_hinge") -> float:
    """Compute the fraction of logits at which the loss has a gradient: logits within the margin, `y s < 1`.

    This is the work that implicit negative mining leaves for the backward pass. Labels are processed in
    blocks, so that the logits of all labels never exist at once (except for an unstructured layer, whose
    training step needs them too).

    Args:
      model: the classifier; it is applied with dropout as in training, unless it was set to evaluation, and
        is not changed.
      batches: a few training batches.
      loss: name of the loss, a key of `LOSSES`; the density of a loss without a margin is 1.

    Returns:
      A number in 0..1, over all points and labels of the batches.

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 2.
    """
    margin = find_loss(loss).margin
    if margin is None:
        return 1.0
    graphdef, state = nnx.split(model.encoder)
    count = total = 0
    for batch in batches:
        batch = place_batch(batch, model.head.mesh)
        x = _features(graphdef, state, batch.inputs)
        for logits, labels in model.head.logits_in_blocks(x):
            count += int(_count_within_margin(logits, labels, batch.positives, margin))
            total += logits.size
    return count / total


@functools.partial(jax.jit, static_argnums=0)
def _features(graphdef: nnx.GraphDef, state: nnx.State, inputs: Any) -> Any:
    return merge(graphdef, state)(inputs)


@jax.jit
def _count_within_margin(
    logits: jax.Array, labels: jax.Array, positives: jax.Array, margin: float
) -> jax.Array:
    """Count the logits [B, n] of the given labels [n], ascending, that have a gradient."""
    columns = jnp.searchsorted(labels, positives)
    is_positive = labels[jnp.minimum(columns, len(labels) - 1)] == positives
    positive_logits = jnp.take_along_axis(logits, jnp.where(is_positive, columns, 0), axis=1)
    negatives = jnp.sum(logits > -margin) - jnp.sum(is_positive & (positive_logits > -margin))
    return negatives + jnp.sum(is_positive & (positive_logits < margin))
