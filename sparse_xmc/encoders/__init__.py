"""Encoders, which map inputs to the features [B, E] of a head. Any such `nnx.Module` can be used."""

from sparse_xmc.encoders.bag_of_words import BagOfWordsEncoder, EmbeddingBag
from sparse_xmc.encoders.dense_features import DenseFeatures
from sparse_xmc.encoders.embedding_cache import cached_embeddings, embed
from sparse_xmc.encoders.joint import JointEncoder
from sparse_xmc.encoders.output import EncoderOutput, as_encoder_output
from sparse_xmc.encoders.pretrained import PretrainedEncoder
from sparse_xmc.encoders.table import EmbeddingTable

__all__ = [
    "BagOfWordsEncoder",
    "DenseFeatures",
    "EmbeddingBag",
    "EmbeddingTable",
    "EncoderOutput",
    "JointEncoder",
    "PretrainedEncoder",
    "as_encoder_output",
    "cached_embeddings",
    "embed",
]
