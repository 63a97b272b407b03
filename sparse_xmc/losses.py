"""Losses against sparse positives: a label that is not listed is a negative, and no target matrix is made.

Both are means over labels, then over the batch, as in the paper. With L labels a logit's gradient is of order
1/L, so an Adam epsilon near it matters: see `sparse_xmc.training.PAPER_EPSILON`.

Reference: Schultheis & Babbar, ECML-PKDD 2023, section 2 ("implicit negative mining" for the squared hinge).
"""

import jax
import jax.numpy as jnp
from jax import Array


def _with_positives(logits: Array, positives: Array, negative_loss, positive_loss) -> Array:
    """The mean over all logits of the negative loss, corrected where the label is a positive."""
    at_positives = jnp.take_along_axis(logits, jnp.maximum(positives, 0), axis=1)
    correction = jnp.where(positives >= 0, positive_loss(at_positives) - negative_loss(at_positives), 0)
    return (jnp.sum(negative_loss(logits)) + jnp.sum(correction)) / logits.size


def squared_hinge(logits: Array, positives: Array) -> Array:
    """Mean over B and L of `max(0, 1 - y s)^2`, with y = +1 for a point's labels and -1 for all others.

    Its gradient is exactly 0 for every logit with `y s >= 1`.

    Args:
      logits: [B, L], float32.
      positives: [B, P] int32, the labels of each point, distinct, padded with -1.

    Returns:
      A scalar.
    """
    return _with_positives(
        logits,
        positives,
        lambda s: jnp.square(jnp.maximum(0, 1 + s)),
        lambda s: jnp.square(jnp.maximum(0, 1 - s)),
    )


def binary_cross_entropy(logits: Array, positives: Array) -> Array:
    """Mean over B and L of the binary cross-entropy with logits. Arguments as `squared_hinge`."""
    return _with_positives(logits, positives, jax.nn.softplus, lambda s: jax.nn.softplus(-s))


LOSSES = {"squared_hinge": squared_hinge, "bce": binary_cross_entropy}
