"""The classifier: input stage, dropout, penultimate layer, output layer."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.layers import (
    BagOfWords,
    EmbeddingBag,
    FixedFanInLinear,
    flat_glorot_uniform,
    glorot_uniform,
    symmetric_uniform,
)
from sparse_xmc.losses import LOSSES
from sparse_xmc.unstructured import UnstructuredLinear
from xla_ops import fan_in_loss, fan_in_top_k

OUTPUT_LAYERS = ("fixed_fan_in", "unstructured", "dense")
OUTPUT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What a `Classifier` is made of.

    Attributes:
      num_features: D of dense features, or V, the number of words.
      num_labels: L.
      bag_of_words: whether the features are bags of words; they are embedded first.
      embedding: E, the size of the embedding of bags of words.
      dropout: the rate of dropout on the input features (after the embedding).
      penultimate: I, the width of the penultimate layer; 0 for none.
      output_layer: one of `OUTPUT_LAYERS`. The paper's "dense" is `dense` with penultimate=0, its
        "bottleneck" `dense` with penultimate=64.
      fan_in: F, the inputs of each label, for `fixed_fan_in`; `unstructured` has as many connections, L*F,
        but anywhere.
      output_bias: where the output layer's bias starts. -1 puts every label on the negative side of the
        squared hinge's margin, so that easy negatives have no gradient from the first step.
      output_bound: the kernel of a sparse output layer starts uniformly in +-output_bound; None for the
        much smaller bound of the paper's code.
      distinct: whether the inputs of a label are distinct, for `fixed_fan_in`; the paper's code has repeats.
      output_dtype: "float32" or "bfloat16", of the parameters of a fixed fan-in output layer.
    """

    num_features: int
    num_labels: int
    bag_of_words: bool = False
    embedding: int = 512
    dropout: float = 0.1
    penultimate: int = 8192
    output_layer: str = "fixed_fan_in"
    fan_in: int = 32
    output_bias: float = 0.0
    output_bound: float | None = None
    distinct: bool = True
    output_dtype: str = "float32"

    def __post_init__(self):
        if self.output_layer not in OUTPUT_LAYERS:
            raise ValueError(
                f"output_layer must be one of {', '.join(OUTPUT_LAYERS)}, got {self.output_layer!r}"
            )
        if self.output_dtype not in OUTPUT_DTYPES:
            raise ValueError(
                f"output_dtype must be one of {', '.join(OUTPUT_DTYPES)}, got {self.output_dtype!r}"
            )


class Classifier(nnx.Module):
    """An extreme multi-label classifier.

    Args:
      config: what it is made of.
      rngs: random keys; streams `params` and `dropout`.
    """

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.num_features
        if config.bag_of_words:
            self.embedding = EmbeddingBag(width, config.embedding, rngs=rngs)
            width = config.embedding
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        if config.penultimate:
            self.penultimate = nnx.Linear(width, config.penultimate, kernel_init=glorot_uniform, rngs=rngs)
            width = config.penultimate
        bias_init = nnx.initializers.constant(config.output_bias)
        if config.output_layer == "dense":
            kernel_init = glorot_uniform
        elif config.output_bound is None:
            kernel_init = flat_glorot_uniform
        else:
            kernel_init = symmetric_uniform(config.output_bound)
        options = {"kernel_init": kernel_init, "bias_init": bias_init, "rngs": rngs}
        if config.output_layer == "fixed_fan_in":
            self.output = FixedFanInLinear(
                width,
                config.num_labels,
                config.fan_in,
                distinct=config.distinct,
                param_dtype=jnp.dtype(config.output_dtype),
                **options,
            )
        elif config.output_layer == "unstructured":
            connections = config.num_labels * config.fan_in
            self.output = UnstructuredLinear(width, config.num_labels, connections, **options)
        else:
            self.output = nnx.Linear(width, config.num_labels, **options)

    def embed(self, inputs: Array | BagOfWords) -> Array:
        """The penultimate layer's inputs, [B, E], for dense features [B, num_features] or a `BagOfWords`."""
        return self.dropout(nnx.relu(self.embedding(inputs)) if self.config.bag_of_words else inputs)

    def features(self, inputs: Array | BagOfWords) -> Array:
        """The output layer's inputs, [B, D]."""
        x = self.embed(inputs)
        return nnx.relu(self.penultimate(x)) if self.config.penultimate else x

    def __call__(self, inputs: Array | BagOfWords) -> Array:
        """The logits [B, L]."""
        return self.output(self.features(inputs))

    def loss(self, inputs: Array | BagOfWords, positives: Array, loss: str = "squared_hinge") -> Array:
        """The loss of a batch: `positives` [B, P] int32 padded with -1; `loss` names one of `LOSSES`."""
        x = self.features(inputs)
        if isinstance(self.output, FixedFanInLinear):
            return fan_in_loss(*self.output.cast(x), positives, loss=loss)
        return LOSSES[loss](self.output(x), positives)

    def top_k(self, inputs: Array | BagOfWords, k: int) -> tuple[Array, Array]:
        """Scores and label ids, each [B, k], of the k best labels; of equal scores the lower label wins."""
        x = self.features(inputs)
        if isinstance(self.output, FixedFanInLinear):
            return fan_in_top_k(*self.output.cast(x), k)
        return jax.lax.top_k(self.output(x).astype(jnp.float32), k)
