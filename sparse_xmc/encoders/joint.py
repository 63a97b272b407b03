"""The joint encoder of texts, which combines bags of words with a pretrained encoder."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.data.batches import WordsAndText
from sparse_xmc.encoders.bag_of_words import BagOfWordsEncoder
from sparse_xmc.encoders.dense_features import DenseFeatures
from sparse_xmc.encoders.output import EncoderOutput, as_encoder_output
from sparse_xmc.encoders.pretrained import PretrainedEncoder


class JointEncoder(nnx.Module):
    """An encoder that concatenates the embeddings [B, E] of texts and the features [B, W] of their words.

    Args:
      words: encoder of bags of words, which returns float32 [B, W] or `EncoderOutput`.
      embeddings: module applied to the embeddings, for example for dropout.
      text: encoder from tokens to embeddings, to be fine-tuned; None if the inputs contain embeddings.
    """

    def __init__(
        self, words: BagOfWordsEncoder, embeddings: DenseFeatures, text: PretrainedEncoder | None = None
    ):
        self.words = words
        self.embeddings = embeddings
        self.text = text

    def __call__(self, inputs: WordsAndText) -> Array | EncoderOutput:
        """Map a batch of B texts to float32 [B, E + W], or to `EncoderOutput`."""
        encoded: Any = inputs.encoded
        embeddings = encoded if self.text is None else self.text(encoded)
        x, direct = as_encoder_output(self.words(inputs.bags))
        x = jnp.concatenate([self.embeddings(embeddings), x], axis=1)
        return x if direct is None else EncoderOutput(x, direct)
