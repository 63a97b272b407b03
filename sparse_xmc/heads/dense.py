"""Dense heads: one dense layer over all labels, with or without a bottleneck in front."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.data.formats import Dataset
from sparse_xmc.heads.head import OUTPUT_BIAS, Features, Head, HeadConfig, label_blocks
from sparse_xmc.heads.layered import LayeredHead
from sparse_xmc.heads.updates import step_dense
from sparse_xmc.layers import glorot_uniform
from sparse_xmc.losses import find_loss
from sparse_xmc.settings import setting


@dataclasses.dataclass(frozen=True)
class DenseConfig(HeadConfig):
    """A dense head, as the paper's "dense".

    Attributes:
      output_bias: where the bias of all labels starts. -1 puts every label on the negative side of the
        squared hinge's margin, so that easy negatives have no gradient from the first step. With the loss
        "bce" -log(L) suits, the logit of the probability 1 / L. The paper's is 0.
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
    """A dense layer behind a few units, as the paper's "bottleneck".

    Attributes:
      penultimate: I, how many units.
      output_bias: as for `DenseConfig`.
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
    """A new dense head, behind so many penultimate units if not 0."""

    def output(width):
        bias_init = nnx.initializers.constant(output_bias)
        return nnx.Linear(width, num_labels, kernel_init=glorot_uniform, bias_init=bias_init, rngs=rngs)

    return DenseHead(in_features, penultimate, output, rngs=rngs)


class DenseHead(LayeredHead):
    """[A bottleneck, then] an `nnx.Linear` over all labels."""

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
            rate=training.output_rate,
            epsilon=training.epsilon_for(self.num_labels),
        )
        return loss, d_x, of_output
