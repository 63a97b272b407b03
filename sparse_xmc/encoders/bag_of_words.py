"""The encoder of bags of words: their embeddings, summed."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.data.batches import BagOfWords
from sparse_xmc.encoders.table import EmbeddingTable
from sparse_xmc.heads.head import Features
from sparse_xmc.modules import Scale
from xla_ops import SparseInputs


class EmbeddingBag(EmbeddingTable):
    """Sums the embeddings of each example's words, weighted: a linear layer on sparse features.

    Arguments and attributes are those of `EmbeddingTable`; V is the number of words.
    """

    def __call__(self, bags: BagOfWords) -> Array:
        """Maps a batch of B bags to float32 [B, E]."""
        shapes = [list(array.shape) for array in (bags.rows, bags.words, bags.weights)]
        if shapes != [[bags.weights.size]] * 3:
            raise ValueError(f"{type(self).__name__}: rows, words, weights must have shape [N], got {shapes}")
        entries = self.lookup(bags.words).astype(bags.weights.dtype) * bags.weights[:, None]
        return jax.ops.segment_sum(
            entries, bags.rows, num_segments=bags.num_examples, indices_are_sorted=True, mode="drop"
        )


class BagOfWordsEncoder(nnx.Module):
    """An `EmbeddingBag`, ReLU, dropout.

    Args:
      num_words: V.
      features: E.
      dropout: the rate of dropout.
      scale: what the words' weights are multiplied by.
      direct: whether to return the weighted words beside the features, for heads that read them.
      rngs: random keys; the streams `params` and `dropout` are used.

    Attributes:
      scale: `Scale`, float32 scalar.
    """

    def __init__(
        self,
        num_words: int,
        features: int,
        dropout: float = 0.0,
        *,
        scale: float = 1.0,
        direct: bool = False,
        rngs: nnx.Rngs,
    ):
        self.num_words = num_words
        self.direct = direct
        self.scale = Scale(jnp.float32(scale))
        self.embedding = EmbeddingBag(num_words, features, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, bags: BagOfWords) -> Array | Features:
        """Maps a batch of B bags to float32 [B, E], or to `Features`."""
        x = self.dropout(nnx.relu(self.scale[...] * self.embedding(bags)))
        if not self.direct:
            return x
        rows, words = jnp.asarray(bags.rows), jnp.asarray(bags.words)
        values = self.scale[...] * jnp.asarray(bags.weights)
        return Features(x, SparseInputs(rows, words, values, self.num_words))
