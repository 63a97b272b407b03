"""The encoder of bags of words, which sums word embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.data.batches import BagOfWords
from sparse_xmc.encoders.output import EncoderOutput
from sparse_xmc.encoders.table import EmbeddingTable
from sparse_xmc.modules import Scale
from xla_ops import SparseInputs


class EmbeddingBag(EmbeddingTable):
    """An embedding table that returns weighted sums over bags of words: a linear layer on sparse features.

    Arguments and attributes are those of `EmbeddingTable`, where V is the number of words.
    """

    def __call__(self, bags: BagOfWords) -> Array:
        """Map a batch of B bags of words to float32 [B, E]."""
        shapes = [list(array.shape) for array in (bags.rows, bags.words, bags.weights)]
        if shapes != [[bags.weights.size]] * 3:
            raise ValueError(f"{type(self).__name__}: rows, words, weights must have shape [N], got {shapes}")
        entries = self.lookup(bags.words).astype(bags.weights.dtype) * bags.weights[:, None]
        return jax.ops.segment_sum(
            entries, bags.rows, num_segments=bags.num_examples, indices_are_sorted=True, mode="drop"
        )


class BagOfWordsEncoder(nnx.Module):
    """An encoder of bags of words: an `EmbeddingBag`, followed by ReLU and dropout.

    Args:
      num_words: V, the number of words.
      features: E, the number of features.
      dropout: dropout rate.
      scale: factor by which the weights of the words are multiplied.
      return_direct_inputs: whether to return `EncoderOutput`, with the scaled words as direct inputs.
      rngs: random keys; the streams `params` and `dropout` are used.

    Attributes:
      scale: `Scale`, float32 scalar, the factor.
    """

    def __init__(
        self,
        num_words: int,
        features: int,
        dropout: float = 0.0,
        *,
        scale: float = 1.0,
        return_direct_inputs: bool = False,
        rngs: nnx.Rngs,
    ):
        self.num_words = num_words
        self.return_direct_inputs = return_direct_inputs
        self.scale = Scale(jnp.float32(scale))
        self.embedding = EmbeddingBag(num_words, features, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, bags: BagOfWords) -> Array | EncoderOutput:
        """Map B bags of words to float32 [B, E], or to `EncoderOutput` if `return_direct_inputs` is set."""
        x = self.dropout(nnx.relu(self.scale[...] * self.embedding(bags)))
        if not self.return_direct_inputs:
            return x
        rows, words = jnp.asarray(bags.rows), jnp.asarray(bags.words)
        values = self.scale[...] * jnp.asarray(bags.weights)
        return EncoderOutput(x, SparseInputs(rows, words, values, self.num_words))
