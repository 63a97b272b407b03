"""The encoder of features that are there already."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.modules import Scale, check_features


class DenseFeatures(nnx.Module):
    """Dense features as they are, with dropout: the paper's setting.

    Args:
      features: E.
      dropout: the rate of dropout.
      scale: what the features are multiplied by.
      rngs: random keys; the stream `dropout` is used.

    Attributes:
      scale: `Scale`, float32 scalar.
    """

    def __init__(self, features: int, dropout: float = 0.0, *, scale: float = 1.0, rngs: nnx.Rngs):
        self.features = features
        self.scale = Scale(jnp.float32(scale))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps features [B, E] to float32 [B, E]."""
        check_features(self, x, self.features, ndim=2)
        return self.dropout(jnp.asarray(x, jnp.float32) * self.scale[...])
