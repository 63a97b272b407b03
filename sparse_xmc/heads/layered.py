"""Heads with an output layer, optionally behind a wide penultimate layer."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import xla_ops
from sparse_xmc.encoders.output import EncoderOutput, as_encoder_output
from sparse_xmc.heads.head import Head, HeadTraining, StepInputs, StepResult
from sparse_xmc.heads.label_shard import LabelShard
from sparse_xmc.heads.updates import MuNu, adam_directions, next_moments, step_dense
from sparse_xmc.layers import glorot_uniform
from sparse_xmc.losses import find_loss
from sparse_xmc.modules import check_features, merge, parameters_of, path_name, split
from xla_ops import SparseInputs


class OutputLayer(Protocol):
    """Protocol of output layers of a `LayeredHead`, such as `nnx.Linear`: maps [B, D] to [B, L].

    Attributes:
      in_features: D, the number of inputs.
      out_features: L, the number of labels.
      kernel: the weights, of any shape.
      bias: the bias [L], or None.
    """

    in_features: int
    out_features: int

    @property
    def kernel(self) -> nnx.Param: ...

    @property
    def bias(self) -> nnx.Param | None: ...

    def __call__(self, x: Array, /) -> Array: ...


def make_penultimate(in_features: int, width: int, rngs: nnx.Rngs) -> nnx.Linear | None:
    """Make a penultimate layer of `width` hidden units; return None if the width is 0."""
    return nnx.Linear(in_features, width, kernel_init=glorot_uniform, rngs=rngs) if width else None


class LayeredHead(Head):
    """A head with an output layer, optionally behind a penultimate layer with ReLU.

    The output layer must have its weights in a parameter `kernel`, and may have a parameter `bias`
    (`OutputLayer`). The methods work for any such layer, but they hold the logits of all labels; subclasses
    override them to save time and memory.

    Args:
      output: the output layer.
      penultimate: the penultimate layer, from the features to the inputs of the output layer; None for none.

    Attributes:
      shard: the labels of this head, which are all labels unless it is the head of one device of a mesh.
    """

    output: Any  # an OutputLayer; subclasses narrow the type
    shard: LabelShard

    def __init__(self, output: OutputLayer, penultimate: nnx.Linear | None = None):
        self.penultimate = penultimate
        self.output = output
        self.in_features = output.in_features if penultimate is None else penultimate.in_features
        self.num_labels = output.out_features
        self.shard = LabelShard.whole(self.num_labels)

    # ---- inputs of the output layer ----

    def output_inputs(self, x: Array | EncoderOutput) -> tuple[Array, SparseInputs | None]:
        """Return the dense inputs [B, D] of the output layer, and the sparse inputs after them or None."""
        features, direct = as_encoder_output(x)
        check_features(self, features, self.in_features, ndim=2)
        if self.penultimate is None:
            return features, self.sparse_inputs(direct)
        return self.dense_inputs(self.penultimate(features), features), self.sparse_inputs(direct)

    def dense_inputs(self, y: Array, features: Array) -> Array:
        """Return the dense inputs of the output layer, given the penultimate layer's output and its input."""
        return nnx.relu(y)

    def sparse_inputs(self, direct: SparseInputs | None) -> SparseInputs | None:
        """Return the sparse inputs of the output layer, given the direct inputs of the encoder."""
        return None

    # ---- logits ----

    def __call__(self, x: Array | EncoderOutput) -> Array:
        return self.output(self.output_inputs(x)[0])

    def loss(self, x: Array | EncoderOutput, positives: Array, loss: str = "squared_hinge") -> Array:
        return find_loss(loss)(self(x), positives)

    def top_k(self, x: Array | EncoderOutput, k: int) -> tuple[Array, Array]:
        return jax.lax.top_k(self(x).astype(jnp.float32), k)

    def logits_in_blocks(self, x: Array | EncoderOutput) -> Iterator[tuple[Array, Array]]:
        yield self(x), jnp.arange(self.num_labels, dtype=jnp.int32)

    # ---- training ----

    def init_moments(self, training: HeadTraining) -> optax.ScaleByAdamState:
        parameters = parameters_of(self)
        if unknown := [
            name for name in parameters if name.partition(".")[0] not in ("penultimate", "output")
        ]:
            raise ValueError(f"nothing would train the head's parameter {unknown[0]}: it is in neither layer")
        dtypes = {"penultimate": jnp.dtype(training.moment_dtype)}
        if training.output_optimizer == "adam":
            dtypes["output"] = jnp.dtype(jnp.float32)
            if (dtype := parameters["output.kernel"].dtype) != jnp.float32:
                raise ValueError(
                    f"output_optimizer='adam' needs a float32 output layer, got {dtype}; use 'sgd'"
                )

        def zeros() -> dict[str, Array]:
            return {
                name: jnp.zeros(parameter.shape, dtypes[layer])
                for name, parameter in parameters.items()
                if (layer := name.partition(".")[0]) in dtypes
            }

        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def step_fused(
        self, inputs: StepInputs, moments: optax.ScaleByAdamState, training: HeadTraining
    ) -> StepResult:
        check_features(self, inputs.x, self.in_features, ndim=2)
        output_inputs, sparse = inputs, self.sparse_inputs(inputs.direct)
        if self.penultimate is not None:
            y = self.penultimate(inputs.x)
            dense, pullback = jax.vjp(self.dense_inputs, y, inputs.x)
            output_inputs = inputs._replace(x=dense, wants_d_x=True)
        loss, d_x, output_moments = self.step_output(output_inputs, sparse, moments, training)
        loss, d_x = self.shard.sum((loss, d_x))
        if self.penultimate is None:
            return loss, d_x, next_moments(moments, output_moments)
        # `dense_inputs` may contain the features beside the hidden units, and they have a gradient there too.
        d_y, d_features = pullback(d_x)
        d_x, penultimate_moments = step_dense(
            self.penultimate,
            "penultimate",
            d_y,
            inputs,
            moments,
            lr_multiplier=training.penultimate_lr_multiplier,
            epsilon=training.epsilon_for(self.shard.global_num_labels),
        )
        d_x = d_x + d_features if inputs.wants_d_x else d_x
        return loss, d_x, next_moments(moments, output_moments, penultimate_moments)

    def step_output(
        self,
        inputs: StepInputs,
        sparse: SparseInputs | None,
        moments: optax.ScaleByAdamState,
        training: HeadTraining,
    ) -> tuple[Array, Array, MuNu]:
        """Take one training step of the output layer.

        Args:
          inputs: the inputs of the step, where `x` has the dense inputs of the output layer in place of the
            features; `direct` is not used.
          sparse: the sparse inputs of the output layer, from `sparse_inputs`.
          moments: the moments of the head.
          training: the training configuration.

        Returns:
          The loss of the labels of this shard, its gradient with respect to `inputs.x`, and the new moments
          of the output layer.
        """
        graphdef, (params, rest) = split(self.output, nnx.Param)

        def loss_of(params: nnx.State, x: Array) -> Array:
            output = merge(graphdef, params, rest)
            return find_loss(training.loss)(output(x), inputs.positives)

        loss, (grads, d_x) = jax.value_and_grad(loss_of, argnums=(0, 1))(params, inputs.x)
        return loss, d_x, self._update(nnx.State({"output": grads}), inputs, moments, training)

    def step_by_optax(
        self, inputs: StepInputs, moments: optax.ScaleByAdamState, training: HeadTraining
    ) -> StepResult:
        graphdef, (params, rest) = split(self, nnx.Param)

        def loss_of(params: nnx.State, x: Array) -> Array:
            head = merge(graphdef, params, rest)
            return head.loss(EncoderOutput(x, inputs.direct), inputs.positives, training.loss)

        loss, (grads, d_x) = jax.value_and_grad(loss_of, argnums=(0, 1))(params, inputs.x)
        return loss, d_x, next_moments(moments, self._update(grads, inputs, moments, training))

    def _update(
        self, grads: nnx.State, inputs: StepInputs, moments: optax.ScaleByAdamState, training: HeadTraining
    ) -> MuNu:
        """Update the parameters in `grads` with Optax, and return their new moments."""
        gradients = {path_name(path): g[...] for path, g in nnx.to_flat_state(grads)}
        parameters, num_labels = parameters_of(self), self.shard.global_num_labels
        lr_multipliers = {
            "penultimate": training.penultimate_lr_multiplier,
            "output": training.output_lr_multiplier,
        }
        adam_gradients = {name: g for name, g in gradients.items() if name in moments.mu}
        epsilon = training.epsilon_for(num_labels)
        directions, new_moments = adam_directions(adam_gradients, moments, epsilon, inputs.seed)
        for name, gradient in gradients.items():
            # The loss is a mean over batch and labels; SGD follows the sum.
            scale = float(inputs.x.shape[0] * num_labels)
            direction = directions[name] if name in directions else scale * gradient.astype(jnp.float32)
            value = parameters[name][...]
            rate = lr_multipliers[name.partition(".")[0]] * inputs.learning_rate
            new = value.astype(jnp.float32) - rate * direction
            if value.dtype == jnp.bfloat16:
                is_bias = name == "output.bias"
                # The bias uses the random bits that follow the bits of the kernel of all labels.
                kernel_size = math.prod(parameters["output.kernel"].shape) * num_labels // self.shard.size
                new = xla_ops.round_stochastically(
                    new[:, None] if is_bias else new,
                    inputs.seed,
                    inputs.step,
                    first=kernel_size if is_bias else 0,
                    first_row=self.shard.first,
                ).reshape(new.shape)
            parameters[name].set_value(new.astype(value.dtype))
        return new_moments
