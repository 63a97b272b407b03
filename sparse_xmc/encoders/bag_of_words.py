"""The encoder of bags of words: their embeddings, summed."""

import jax
from flax import nnx
from jax import Array

from sparse_xmc.data.batches import BagOfWords
from sparse_xmc.encoders.table import EmbeddingTable


class EmbeddingBag(EmbeddingTable):
    """Sums the embeddings of each example's words, weighted: a linear layer on sparse features.

    Arguments and attributes are those of `EmbeddingTable`; V is the number of words.
    """

    def __call__(self, bags: BagOfWords) -> Array:
        """Maps a batch of B bags to float32 [B, E]."""
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
      rngs: random keys; the streams `params` and `dropout` are used.
    """

    def __init__(self, num_words: int, features: int, dropout: float = 0.0, *, rngs: nnx.Rngs):
        self.embedding = EmbeddingBag(num_words, features, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, bags: BagOfWords) -> Array:
        """Maps a batch of B bags to float32 [B, E]."""
        return self.dropout(nnx.relu(self.embedding(bags)))
