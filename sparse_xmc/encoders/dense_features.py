"""The encoder of precomputed dense features."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.modules import Scale, check_features


class DenseFeatures(nnx.Module):
    """An encoder that scales dense features and applies dropout, without parameters, as in the paper.

    Args:
      features: E, the number of features.
      dropout: dropout rate.
      scale: factor by which the features are multiplied.
      rngs: random keys; the stream `dropout` is used.

    Attributes:
      scale: `Scale`, float32 scalar, the factor.
    """

    def __init__(self, features: int, dropout: float = 0.0, *, scale: float = 1.0, rngs: nnx.Rngs):
        self.features = features
        self.scale = Scale(jnp.float32(scale))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map features [B, E] to float32 [B, E]."""
        check_features(self, x, self.features, ndim=2)
        return self.dropout(jnp.asarray(x, jnp.float32) * self.scale[...])
