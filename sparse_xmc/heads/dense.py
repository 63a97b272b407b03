"""Dense heads: a dense layer over all labels, with or without a bottleneck layer before it."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.data.dataset import Dataset
from sparse_xmc.heads.head import OUTPUT_BIAS, Features, Head, HeadConfig, label_blocks
from sparse_xmc.heads.layered import LayeredHead
from sparse_xmc.heads.updates import step_dense
from sparse_xmc.layers import glorot_uniform
from sparse_xmc.losses import find_loss
from sparse_xmc.settings import setting


@dataclasses.dataclass(frozen=True)
class DenseConfig(HeadConfig):
    """Configuration of a dense head, "dense" in the paper.

    Attributes:
      output_bias: initial bias of all labels. -1 puts every label on the negative side of the squared hinge's
        margin, so that easy negatives have no gradient from the first step. For the loss "bce", -log(L) is
        suitable, the logit of the probability 1 / L. The paper uses 0.
    """

    output_bias: float = OUTPUT_BIAS

    def make(
        self,
        in_features: int,
        num_labels: int,
        *,
        num_words: int = 0,
        train: Dataset | None = None,
        rngs: nnx.Rngs,
    ) -> Head:
        return make_dense(in_features, num_labels, 0, self.output_bias, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class BottleneckConfig(HeadConfig):
    """Configuration of a dense layer behind a narrow penultimate layer, "bottleneck" in the paper.

    Attributes:
      penultimate: I, the number of hidden units.
      output_bias: initial bias of all labels, as in `DenseConfig`.
    """

    penultimate: int = setting(64, at_least=1)
    output_bias: float = OUTPUT_BIAS

    def make(
        self,
        in_features: int,
        num_labels: int,
        *,
        num_words: int = 0,
        train: Dataset | None = None,
        rngs: nnx.Rngs,
    ) -> Head:
        return make_dense(in_features, num_labels, self.penultimate, self.output_bias, rngs=rngs)


def make_dense(
    in_features: int, num_labels: int, penultimate: int, output_bias: float, *, rngs: nnx.Rngs
) -> "DenseHead":
    """Make a dense head.

    Args:
      in_features: E, the number of features.
      num_labels: L, the number of labels.
      penultimate: I, the width of the penultimate layer; 0 for none.
      output_bias: initial bias of all labels.
      rngs: random keys; the stream `params` is used.
    """

    def output(width):
        bias_init = nnx.initializers.constant(output_bias)
        return nnx.Linear(width, num_labels, kernel_init=glorot_uniform, bias_init=bias_init, rngs=rngs)

    return DenseHead(in_features, penultimate, output, rngs=rngs)


class DenseHead(LayeredHead):
    """A head with an `nnx.Linear` output layer over all labels, optionally behind a penultimate layer."""

    output: nnx.Linear

    def logits_in_blocks(self, x: Array | Features) -> Iterator[tuple[Array, Array]]:
        hidden, kernel, bias = self.hidden(x), self.output.kernel[...], self.output.bias
        for block in label_blocks(self.num_labels):
            logits = hidden @ kernel[:, block]
            logits = logits if bias is None else logits + bias[...][None, block]
            yield logits, jnp.arange(block.start, block.stop, dtype=jnp.int32)

    def step_output(self, inputs, moments, training):
        if training.output_optimizer != "adam":
            return super().step_output(inputs, moments, training)
        loss, d_y = jax.value_and_grad(find_loss(training.loss))(self.output(inputs.x), inputs.positives)
        d_x, of_output = step_dense(
            self.output,
            "output",
            d_y,
            inputs,
            moments,
            rate=training.output_lr_multiplier,
            epsilon=training.epsilon_for(self.num_labels),
        )
        return loss, d_x, of_output
