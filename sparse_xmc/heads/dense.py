"""Dense heads: a dense layer over all labels, with or without a bottleneck layer before it."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from sparse_xmc.encoders.output import EncoderOutput
from sparse_xmc.heads.head import (
    OUTPUT_BIAS,
    HeadConfig,
    HeadSpec,
    HeadTraining,
    StepInputs,
    label_blocks,
)
from sparse_xmc.heads.layered import LayeredHead, make_penultimate
from sparse_xmc.heads.updates import MuNu, step_dense
from sparse_xmc.layers import glorot_uniform
from sparse_xmc.losses import find_loss
from sparse_xmc.settings import setting
from xla_ops import SparseInputs


@dataclasses.dataclass(frozen=True)
class DenseConfig(HeadConfig):
    """Configuration of a dense head, "dense" in the paper.

    Attributes:
      output_bias: initial bias of all labels. -1 puts every label on the negative side of the squared hinge's
        margin, so that easy negatives have no gradient from the first step. For the loss "bce", -log(L) is
        suitable, the logit of the probability 1 / L. The paper uses 0.
    """

    output_bias: float = OUTPUT_BIAS

    def _make(self, spec: HeadSpec, rngs: nnx.Rngs) -> "DenseHead":
        penultimate = make_penultimate(spec.in_features, self._width(), rngs)
        output = nnx.Linear(
            self._width() or spec.in_features,
            spec.num_labels,
            kernel_init=glorot_uniform,
            bias_init=nnx.initializers.constant(self.output_bias),
            rngs=rngs,
        )
        return DenseHead(output, penultimate)

    def _width(self) -> int:
        """Return the width of the penultimate layer, or 0 for none."""
        return 0


@dataclasses.dataclass(frozen=True)
class BottleneckConfig(DenseConfig):
    """Configuration of a dense head behind a narrow penultimate layer, "bottleneck" in the paper.

    Attributes:
      penultimate: I, the number of hidden units.
    """

    penultimate: int = setting(64, at_least=1)

    def _width(self) -> int:
        return self.penultimate


class DenseHead(LayeredHead):
    """A head with an `nnx.Linear` output layer over all labels, optionally behind a penultimate layer."""

    output: nnx.Linear

    def logits_in_blocks(self, x: Array | EncoderOutput) -> Iterator[tuple[Array, Array]]:
        hidden, kernel, bias = self.output_inputs(x)[0], self.output.kernel[...], self.output.bias
        for block in label_blocks(self.num_labels):
            logits = hidden @ kernel[:, block]
            logits = logits if bias is None else logits + bias[...][None, block]
            yield logits, jnp.arange(block.start, block.stop, dtype=jnp.int32)

    def step_output(
        self,
        inputs: StepInputs,
        sparse: SparseInputs | None,
        moments: optax.ScaleByAdamState,
        training: HeadTraining,
    ) -> tuple[Array, Array, MuNu]:
        if training.output_optimizer != "adam":
            return super().step_output(inputs, sparse, moments, training)
        loss, d_y = jax.value_and_grad(find_loss(training.loss))(self.output(inputs.x), inputs.positives)
        d_x, output_moments = step_dense(
            self.output,
            "output",
            d_y,
            inputs,
            moments,
            lr_multiplier=training.output_lr_multiplier,
            epsilon=training.epsilon_for(self.num_labels),
        )
        return loss, d_x, output_moments
