"""The fixed fan-in head of the paper: every label reads exactly F of the inputs of the output layer."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

import xla_ops
from sparse_xmc.connectivity import draw_connections
from sparse_xmc.data.dataset import Dataset
from sparse_xmc.encoders.output import EncoderOutput
from sparse_xmc.heads.feature_selection import select_direct_inputs
from sparse_xmc.heads.head import HeadTraining, StepInputs, label_blocks
from sparse_xmc.heads.label_shard import LabelShard
from sparse_xmc.heads.layered import LayeredHead
from sparse_xmc.heads.rewiring import RewireConfig, rewire, rewire_active
from sparse_xmc.heads.updates import MuNu
from sparse_xmc.layers import FixedFanInLinear
from xla_ops import SparseInputs

# Initial Euclidean norm of the weights of a label's direct inputs.
_DIRECT_NORM = 0.3


class FixedFanInHead(LayeredHead):
    """A head with a `FixedFanInLinear` output layer, optionally behind a wide penultimate layer.

    Training and ranking never hold the logits of all labels. The inputs of the output layer are the hidden
    units, or the features without a penultimate layer, and after them the direct inputs: either the sparse
    direct inputs of the encoder, or the features.

    Args:
      output: the output layer.
      penultimate: the penultimate layer; None for none.
      num_direct: V, the number of sparse direct inputs that labels may read; 0 if there are none, or if
        labels read the features directly (`reads_features`).
      reads_features: whether labels may read the features directly, beside the hidden units.
      direct_scale: factor by which direct inputs are multiplied.
      shard: the labels of this head, if it is the head of one device of a mesh; None for all labels.

    Reference: Schultheis & Babbar, ECML-PKDD 2023.
    """

    output: FixedFanInLinear

    def __init__(
        self,
        output: FixedFanInLinear,
        penultimate: nnx.Linear | None = None,
        *,
        num_direct: int = 0,
        reads_features: bool = False,
        direct_scale: float = 1.0,
        shard: LabelShard | None = None,
    ):
        super().__init__(output, penultimate)
        if penultimate is None:
            self.in_features -= num_direct
        self.num_direct = num_direct
        self.reads_features = reads_features
        self.direct_scale = direct_scale
        if shard is not None:
            self.shard = shard

    # ---- inputs of the output layer ----

    def dense_inputs(self, y: Array, features: Array) -> Array:
        hidden = super().dense_inputs(y, features)
        if self.reads_features:
            return jnp.concatenate([hidden, self.direct_scale * features], axis=1)
        return hidden

    def sparse_inputs(self, direct: SparseInputs | None) -> SparseInputs | None:
        if not self.num_direct:
            return None
        if direct is None or direct.num_columns != self.num_direct:
            given = "none" if direct is None else f"{direct.num_columns}"
            raise ValueError(f"features must come with direct inputs, {self.num_direct} of them, got {given}")
        values = (self.direct_scale * jnp.asarray(direct.values)).astype(self.output.kernel.dtype)
        return dataclasses.replace(direct, values=values)

    def connect_direct_inputs(self, count: int, train: Dataset, key: Array) -> None:
        """Connect each label to its best direct inputs, and to random hidden units for the rest.

        Args:
          count: maximum number of direct inputs of a label; fewer if `select_direct_inputs` finds fewer.
          train: the training points, from which direct inputs are selected.
          key: random key for the connections to hidden units.
        """
        layer = self.output
        labels = slice(0, self.num_labels)
        kernel, indices = self.connections_of(labels, count, train, key, layer.kernel[...])
        layer.indices.set_value(jnp.asarray(indices))
        layer.kernel.set_value(jnp.asarray(kernel))

    def connections_of(
        self, labels: slice, count: int, train: Dataset, key: Array, kernel: Array
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the kernel and indices after `connect_direct_inputs` for a range of labels.

        Args:
          labels: the range of labels.
          count, train, key: as for `connect_direct_inputs`.
          kernel: [n, F], the initial kernel of these labels; kept for connections to hidden units.

        Returns:
          The kernel [n, F] and the indices [n, F].
        """
        layer = self.output
        units = layer.in_features - (self.num_direct or self.in_features)
        rows = labels.stop - labels.start
        drawn = draw_connections(key, rows, layer.fan_in, units, first=labels.start)
        indices, weights = np.array(drawn, np.int32), np.array(kernel.astype(jnp.float32))
        for block, columns, excess in select_direct_inputs(train.features, train.labels[:, labels], count):
            norm = np.sqrt(np.square(excess).sum(axis=1, keepdims=True))
            direct_weights = _DIRECT_NORM * excess / np.maximum(norm, np.finfo(np.float32).tiny)
            selected = columns >= 0
            indices[block, :count][selected] = units + columns[selected]
            weights[block, :count][selected] = direct_weights[selected]
        return weights.astype(kernel.dtype), indices.astype(layer.indices.dtype)

    # ---- logits ----

    def __call__(self, x: Array | EncoderOutput) -> Array:
        return self.output(*self.output_inputs(x))

    def loss(self, x: Array | EncoderOutput, positives: Array, loss: str = "squared_hinge") -> Array:
        dense, sparse = self.output_inputs(x)
        value = xla_ops.fan_in_loss(
            *self.output.cast(dense),
            self.shard.local_positives(positives),
            loss=loss,
            num_labels=self.shard.global_num_labels,
            sparse=sparse,
        )
        return self.shard.sum(value)

    def top_k(self, x: Array | EncoderOutput, k: int) -> tuple[Array, Array]:
        dense, sparse = self.output_inputs(x)
        return xla_ops.fan_in_top_k(*self.output.cast(dense), k, sparse=sparse)

    def logits_in_blocks(self, x: Array | EncoderOutput) -> Iterator[tuple[Array, Array]]:
        inputs = self.output_inputs(x)
        for block in label_blocks(self.num_labels):
            labels = jnp.arange(block.start, block.stop, dtype=jnp.int32)
            yield self.logits_of(inputs, block.start, block.stop - block.start), labels

    def logits_of(self, inputs: tuple[Array, SparseInputs | None], start: ArrayLike, count: int) -> Array:
        """Return the logits [B, count] of the labels from `start` on, for `output_inputs`."""
        x, kernel, indices, bias = self.output.cast(inputs[0])
        kernel, indices = (jax.lax.dynamic_slice_in_dim(a, start, count) for a in (kernel, indices))
        bias = bias if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, count)
        return xla_ops.fan_in_matmul(x, kernel, indices, bias, sparse=inputs[1])

    # ---- training ----

    def init_moments(self, training: HeadTraining) -> optax.ScaleByAdamState:
        dtype = self.output.dtype
        if dtype is not None and jnp.dtype(dtype) != self.output.kernel.dtype:
            raise ValueError(
                f"a FixedFanInLinear is trained in the dtype of its parameters, {self.output.kernel.dtype}; "
                f"leave out dtype={jnp.dtype(dtype).name}"
            )
        return super().init_moments(training)

    def step_output(
        self,
        inputs: StepInputs,
        sparse: SparseInputs | None,
        moments: optax.ScaleByAdamState,
        training: HeadTraining,
    ) -> tuple[Array, Array, MuNu]:
        layer, names = self.output, ("output.kernel", "output.bias")
        kernel, bias = layer.kernel[...], None if layer.bias is None else layer.bias[...]
        num_labels, positives = self.shard.global_num_labels, self.shard.local_positives(inputs.positives)
        arguments = (inputs.x.astype(kernel.dtype), kernel, layer.indices[...], bias, positives)
        options: dict[str, Any] = {
            "loss": training.loss,
            "num_labels": num_labels,
            "sparse": sparse,
            "wants_d_x": inputs.wants_d_x,
        }
        rate = training.output_lr_multiplier * inputs.learning_rate
        new_bias: Array | None
        mu: dict[str, Any] = {}
        nu: dict[str, Any] = {}
        if training.output_optimizer == "adam":
            kernel_moments, bias_moments = ((moments.mu.get(name), moments.nu.get(name)) for name in names)
            adam = xla_ops.AdamState(moments.count, *kernel_moments, *bias_moments)
            loss, d_x, new_kernel, new_bias, adam = xla_ops.fan_in_adam_step(
                *arguments, adam, rate, epsilon=training.epsilon_for(num_labels), **options
            )
            mu, nu = {names[0]: adam.mu_kernel}, {names[0]: adam.nu_kernel}
            if bias is not None:
                mu[names[1]], nu[names[1]] = adam.mu_bias, adam.nu_bias
        else:
            # SGD follows the sum of the losses; the loss is a mean over batch and labels.
            rate = rate * float(inputs.x.shape[0] * num_labels)
            options |= {"seed": inputs.seed, "step": inputs.step, "first_label": self.shard.first}
            loss, d_x, new_kernel, new_bias = xla_ops.fan_in_sgd_step(*arguments, rate, **options)
        layer.kernel.set_value(new_kernel)
        if layer.bias is not None and new_bias is not None:
            layer.bias.set_value(new_bias)
        return loss, jnp.zeros(0, jnp.float32) if d_x is None else d_x.astype(inputs.x.dtype), (mu, nu)

    def check_rewiring(self, config: RewireConfig) -> None:
        if (self.num_direct or self.reads_features) and config.growth != "active":
            raise ValueError(
                "direct inputs were selected, and do not move to others at random: set rewire's growth to "
                f"'active' or its fraction to 0, got growth={config.growth!r}"
            )

    def rewire(
        self,
        x: Array | EncoderOutput,
        positives: Array,
        moments: optax.ScaleByAdamState,
        key: Array,
        config: RewireConfig,
    ) -> optax.ScaleByAdamState:
        layer, name = self.output, "output.kernel"
        kernel, indices = layer.kernel[...], layer.indices[...]
        kernel_moments = (moments.mu[name], moments.nu[name]) if name in moments.mu else ()
        if config.growth == "active":
            dense, sparse = self.output_inputs(x)
            local_positives = self.shard.local_positives(positives)
            kernel, indices, _, kernel_moments = rewire_active(
                kernel, indices, dense, local_positives, config, kernel_moments, sparse
            )
        else:
            kernel, indices, _, kernel_moments = rewire(
                key, kernel, indices, layer.in_features, config, kernel_moments, self.shard
            )
        layer.kernel.set_value(kernel)
        layer.indices.set_value(indices)
        if not kernel_moments:
            return moments
        mu, nu = kernel_moments
        return moments._replace(mu=moments.mu | {name: mu}, nu=moments.nu | {name: nu})
