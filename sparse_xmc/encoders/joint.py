"""The encoder of texts by words and by a pretrained encoder: rare words and meaning are half of it each."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.data.batches import WordsAndText
from sparse_xmc.encoders.bag_of_words import BagOfWordsEncoder
from sparse_xmc.encoders.dense_features import DenseFeatures
from sparse_xmc.encoders.pretrained import PretrainedEncoder
from sparse_xmc.heads.head import Features, split_features


class JointEncoder(nnx.Module):
    """The features of texts side by side: embeddings [B, E], then those of their words [B, W].

    Args:
      words: from bags of words to float32 [B, W], or to `Features`.
      embeddings: what is done to embeddings, dropout for example.
      text: from tokens to embeddings, to be trained too; None where inputs have embeddings.
    """

    def __init__(
        self, words: BagOfWordsEncoder, embeddings: DenseFeatures, text: PretrainedEncoder | None = None
    ):
        self.words = words
        self.embeddings = embeddings
        self.text = text

    def __call__(self, inputs: WordsAndText) -> Array | Features:
        """Maps a batch of B texts to float32 [B, E + W], or to `Features`."""
        encoded: Any = inputs.encoded
        embeddings = encoded if self.text is None else self.text(encoded)
        x, words = split_features(self.words(inputs.bags))
        x = jnp.concatenate([self.embeddings(embeddings), x], axis=1)
        return x if words is None else Features(x, words)
