"""Losses with sparse positives: labels that are not listed are negatives, and no target matrix is made.

All losses are means over labels and over the batch, as in the paper. With L labels, the gradient of a logit
is of order 1/L, so Adam's epsilon must be far below: see `sparse_xmc.heads.HeadTraining`.

Reference: Schultheis & Babbar, ECML-PKDD 2023, section 2 ("implicit negative mining" for the squared hinge).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss that is a mean of terms of single logits.

    Attributes:
      positive: function from the logit of a positive to its loss.
      negative: function from the logit of a negative to its loss.
      margin: the gradient at a logit s is exactly 0 if `y s >= margin`, where y is +1 for a positive and -1
        for a negative; None if the gradient is nonzero everywhere.
    """

    positive: Callable[[Array], Array]
    negative: Callable[[Array], Array]
    margin: float | None

    def __call__(self, logits: Array, positives: Array) -> Array:
        """Return the mean of the loss over batch and labels.

        Args:
          logits: [B, L], float32.
          positives: [B, P] int32, the labels of each point, distinct, padded with -1. Values outside [0, L)
            are ignored, as in `xla_ops.fan_in_loss`.

        Returns:
          Scalar, the loss.
        """
        batch, labels = logits.shape
        positives = jnp.where(positives < 0, labels, positives)  # Negative indices would count from the end.
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        positive_losses = self.positive(jnp.asarray(logits).at[rows, positives].get(mode="clip"))
        losses = self.negative(logits).at[rows, positives].set(positive_losses, mode="drop")
        return jnp.sum(losses) / batch / labels  # The product of both may exceed int32.


LOSSES = {
    "squared_hinge": Loss(
        positive=lambda s: jnp.square(jnp.maximum(0, 1 - s)),
        negative=lambda s: jnp.square(jnp.maximum(0, 1 + s)),
        margin=1.0,
    ),
    "bce": Loss(
        positive=lambda s: jax.nn.softplus(-s),
        negative=jax.nn.softplus,
        margin=None,
    ),
}

squared_hinge = LOSSES["squared_hinge"]


def find_loss(name: str) -> Loss:
    """Return the loss with this name; raise ValueError if there is none."""
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]
