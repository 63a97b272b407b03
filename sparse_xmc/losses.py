"""Losses against sparse positives: a label that is not listed is a negative, and no target matrix is made.

All are means over labels, then over the batch, as in the paper. With L labels a logit's gradient is of order
1/L, so Adam's epsilon must be far below: see `sparse_xmc.heads.HeadTraining`.

Reference: Schultheis & Babbar, ECML-PKDD 2023, section 2 ("implicit negative mining" for the squared hinge).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss that is a sum over logits.

    Attributes:
      of_positive: from the logit of a label that the point has.
      of_negative: from that of one that it does not have.
      margin: at a logit s of a label, y = +1 for a positive and -1 for a negative, the gradient is exactly 0
        wherever `y s >= margin`; None where it never is.
    """

    of_positive: Callable[[Array], Array]
    of_negative: Callable[[Array], Array]
    margin: float | None

    def __call__(self, logits: Array, positives: Array) -> Array:
        """The mean over batch and labels.

        Args:
          logits: [B, L], float32.
          positives: [B, P] int32, the labels of each point, distinct, padded with -1. What is outside [0, L)
            does not count, as in `xla_ops.fan_in_loss`.

        Returns:
          A scalar.
        """
        batch, labels = logits.shape
        positives = jnp.where(positives < 0, labels, positives)  # a negative index would count from the end
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        of_positives = self.of_positive(jnp.asarray(logits).at[rows, positives].get(mode="clip"))
        losses = self.of_negative(logits).at[rows, positives].set(of_positives, mode="drop")
        return jnp.sum(losses) / batch / labels  # their product may be beyond int32


LOSSES = {
    "squared_hinge": Loss(
        of_positive=lambda s: jnp.square(jnp.maximum(0, 1 - s)),
        of_negative=lambda s: jnp.square(jnp.maximum(0, 1 + s)),
        margin=1.0,
    ),
    "bce": Loss(
        of_positive=lambda s: jax.nn.softplus(-s),
        of_negative=jax.nn.softplus,
        margin=None,
    ),
}

squared_hinge = LOSSES["squared_hinge"]


def find_loss(name: str) -> Loss:
    """The loss of a name; raises ValueError if there is none."""
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]
