"""Checks for labels that were probably misread, such as by a wrong separator."""

import warnings
from collections.abc import Sequence

import numpy as np
import scipy.sparse

_MIN_POINTS = 100  # With fewer points, one label for each point is plausible.
_SEPARATORS = (";", ",")


def warn_of_unusual_labels(
    labels: scipy.sparse.csr_array, names: Sequence[str] | None = None, *, stacklevel: int = 2
) -> None:
    """Warn (UserWarning) if labels look as if separators were wrong, or labels and texts were swapped.

    It warns if at least 100 points have labels, nearly all of these points have one label, and either there
    are more than 0.9 times as many labels as points, or more than half of the names contain ";" or ",".

    Args:
      labels: bool [N, L], the labels of N points.
      names: the L names of the labels, or None.
      stacklevel: stack level of the warning, as for `warnings.warn` in the caller of this function.
    """
    counts = np.bincount(labels.indices, minlength=labels.shape[1])
    (used,) = np.nonzero(counts)
    points = np.count_nonzero(np.diff(labels.indptr))
    if points < _MIN_POINTS or labels.nnz > 1.1 * points:
        return
    separator_found = None if names is None else _likely_separator([names[int(label)] for label in used])
    if separator_found is not None:
        separator, count, example = separator_found
        message = (
            f"{points:,} points have one label each, and {count:,} of {len(used):,} label names contain "
            f"{separator!r}, such as {example!r}: is {separator!r} the separator of labels? In a .tsv that "
            "must be '|', and in lists each label must be a name of its own"
        )
    elif len(used) > 0.9 * points:
        example = "" if names is None else f", such as {shorten(names[int(used[0])])!r}"
        message = (
            f"nearly every point has a label of its own: {len(used):,} labels for {points:,} points with one "
            f"label each{example}: are labels and texts swapped, or is the separator of labels a wrong one?"
        )
    else:
        return
    warnings.warn(message, stacklevel=stacklevel + 1)


def _likely_separator(names: list[str]) -> tuple[str, int, str] | None:
    """Return a separator in more than half of the names, the number of names with it, and one of them."""
    for separator in _SEPARATORS:
        containing = [name for name in names if separator in name]
        if len(containing) > len(names) / 2:
            return separator, len(containing), shorten(containing[0])
    return None


def shorten(name: str) -> str:
    """Return a label name, truncated to 40 characters."""
    return name if len(name) <= 40 else f"{name[:37]}..."
