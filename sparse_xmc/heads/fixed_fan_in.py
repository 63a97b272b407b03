"""The fixed fan-in head, the paper's: every label reads exactly F inputs, of a wide penultimate layer."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import xla_ops
from sparse_xmc.heads.head import Head, HeadConfig, label_blocks
from sparse_xmc.heads.layered import LayeredHead
from sparse_xmc.heads.rewiring import rewire, rewire_active
from sparse_xmc.layers import FixedFanInLinear, start_of_kernel
from sparse_xmc.settings import setting


@dataclasses.dataclass(frozen=True)
class FixedFanInConfig(HeadConfig):
    """A fixed fan-in head.

    Attributes:
      penultimate: I, the width of the penultimate layer; 0 for none.
      fan_in: F, the inputs of each label.
      output_bias: where the bias of all labels starts. -1 puts every label on the negative side of the
        squared hinge's margin, so that easy negatives have no gradient from the first step.
      output_bound: the kernel starts uniformly in +-output_bound; None for the much smaller bound of the
        paper's code.
      distinct: whether the inputs of a label are distinct at the start; the paper's code has repeats.
      output_dtype: "float32" or "bfloat16", of the output layer's parameters.
    """

    penultimate: int = setting(8192, at_least=0)
    fan_in: int = setting(32, at_least=1)
    output_bias: float = 0.0
    output_bound: float | None = setting(None, above=0, or_else=(None,))
    distinct: bool = True
    output_dtype: str = setting("float32", choices=("float32", "bfloat16"))

    def make(
        self, in_features: int, num_labels: int, *, label_counts: np.ndarray | None = None, rngs: nnx.Rngs
    ) -> Head:
        def output(width):
            return FixedFanInLinear(
                width,
                num_labels,
                self.fan_in,
                distinct=self.distinct,
                param_dtype=jnp.dtype(self.output_dtype),
                kernel_init=start_of_kernel(self.output_bound),
                bias_init=nnx.initializers.constant(self.output_bias),
                rngs=rngs,
            )

        return FixedFanInHead(in_features, self.penultimate, output, rngs=rngs)


class FixedFanInHead(LayeredHead):
    """[A wide penultimate layer, then] a `FixedFanInLinear`: the logits of all labels are never held.

    Reference: Schultheis & Babbar, ECML-PKDD 2023.
    """

    output: FixedFanInLinear

    def loss(self, x: Array, positives: Array, loss: str = "squared_hinge") -> Array:
        return xla_ops.fan_in_loss(*self.output.cast(self.hidden(x)), positives, loss=loss)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        return xla_ops.fan_in_top_k(*self.output.cast(self.hidden(x)), k)

    def logits_in_blocks(self, x: Array) -> Iterator[tuple[Array, Array]]:
        x, kernel, indices, bias = self.output.cast(self.hidden(x))
        for block in label_blocks(self.num_labels):
            of_block = None if bias is None else bias[block]
            logits = xla_ops.fan_in_matmul(x, kernel[block], indices[block], of_block)
            yield logits, jnp.arange(block.start, block.stop)

    def init_moments(self, training):
        dtype = self.output.dtype
        if dtype is not None and jnp.dtype(dtype) != self.output.kernel.dtype:
            raise ValueError(
                f"a FixedFanInLinear is trained in the dtype of its parameters, {self.output.kernel.dtype}; "
                f"leave out dtype={jnp.dtype(dtype).name}"
            )
        return super().init_moments(training)

    def step_output(self, inputs, moments, training):
        layer, names = self.output, ("output.kernel", "output.bias")
        kernel, bias = layer.kernel[...], None if layer.bias is None else layer.bias[...]
        arguments = (inputs.x.astype(kernel.dtype), kernel, layer.indices[...], bias, inputs.positives)
        rate = training.output_rate * inputs.learning_rate
        mu, nu = {}, {}
        if training.output_optimizer == "adam":
            of_kernel, of_bias = ((moments.mu.get(name), moments.nu.get(name)) for name in names)
            adam = xla_ops.AdamState(moments.count, *of_kernel, *of_bias)
            loss, d_x, kernel, bias, adam = xla_ops.fan_in_adam_step(
                *arguments, adam, rate, loss=training.loss, epsilon=training.epsilon
            )
            mu, nu = {names[0]: adam.mu_kernel}, {names[0]: adam.nu_kernel}
            if bias is not None:
                mu[names[1]], nu[names[1]] = adam.mu_bias, adam.nu_bias
        else:
            rate = rate * (inputs.x.shape[0] * self.num_labels)  # the loss is a mean over both
            loss, d_x, kernel, bias = xla_ops.fan_in_sgd_step(
                *arguments, rate, seed=inputs.seed, step=inputs.step, loss=training.loss
            )
        layer.kernel.set_value(kernel)
        if layer.bias is not None:
            layer.bias.set_value(bias)
        return loss, d_x.astype(inputs.x.dtype), (mu, nu)

    def rewire(self, x, positives, moments, key, config):
        layer, name = self.output, "output.kernel"
        kernel, indices = layer.kernel[...], layer.indices[...]
        remembered = (moments.mu[name], moments.nu[name]) if name in moments.mu else ()
        if config.growth == "active":
            kernel, indices, _, remembered = rewire_active(
                kernel, indices, self.hidden(x), positives, config, remembered
            )
        else:
            kernel, indices, _, remembered = rewire(
                key, kernel, indices, layer.in_features, config, remembered
            )
        layer.kernel.set_value(kernel)
        layer.indices.set_value(indices)
        if not remembered:
            return moments
        mu, nu = (of | {name: new} for of, new in zip((moments.mu, moments.nu), remembered, strict=True))
        return moments._replace(mu=mu, nu=nu)

    def memory(self, batch_size, training):
        return super().memory(batch_size, training) | {"gradients": 0, "logits": 0}
