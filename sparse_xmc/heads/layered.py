"""Heads with an output layer, optionally behind a wide penultimate layer."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

import xla_ops
from sparse_xmc.heads.head import Features, Head, HeadTraining, StepInputs, split_features
from sparse_xmc.heads.part import LabelPart, shift
from sparse_xmc.heads.updates import Moments, adam_directions, next_state, step_dense
from sparse_xmc.layers import glorot_uniform
from sparse_xmc.losses import find_loss
from sparse_xmc.modules import check_features, parameters_of, path_name, split


class OutputLayer(Protocol):
    """Protocol of output layers of a `LayeredHead`, such as `nnx.Linear`: maps [B, D] to [B, L]."""

    kernel: nnx.Param
    bias: nnx.Param | None
    out_features: int

    def __call__(self, x: Array, /) -> Array: ...


class LayeredHead(Head):
    """A head with an output layer, optionally behind a penultimate layer with ReLU.

    The methods work for any output layer; subclasses override them with faster ones for their layer.

    Args:
      in_features: E, the number of features.
      penultimate: I, the width of the penultimate layer; 0 for none.
      make_output: function from the number of inputs, I or E, to the output layer.
      rngs: random keys; the stream `params` is used.

    Attributes:
      part: the sharding of the labels, if this head has the shard of one device; else None.
    """

    part: LabelPart | None = None
    output: Any  # an OutputLayer; subclasses narrow the type

    def __init__(
        self, in_features: int, penultimate: int, make_output: Callable[[int], OutputLayer], *, rngs: nnx.Rngs
    ):
        self.in_features = in_features
        self.penultimate = (
            nnx.Linear(in_features, penultimate, kernel_init=glorot_uniform, rngs=rngs)
            if penultimate
            else None
        )
        self.output = make_output(penultimate or in_features)
        self.num_labels = self.output.out_features

    @property
    def labels_of_all(self) -> int:
        """The number of labels of all devices together."""
        return self.num_labels if self.part is None else self.part.num_labels

    def first_label(self) -> ArrayLike:
        """Return the first label of this head among the labels of all devices."""
        return 0 if self.part is None else self.part.first(self.num_labels)

    def own_positives(self, positives: Array) -> Array:
        """Renumber positives for this head; labels of other devices and invalid values become negative."""
        if self.part is None:
            return positives
        return shift(jnp.where(positives < self.labels_of_all, positives, -1), self.first_label())

    def hidden(self, x: Array | Features) -> Array:
        """Return the dense input of the output layer, for features [B, E]."""
        x, _ = split_features(x)
        check_features(self, x, self.in_features, ndim=2)
        return x if self.penultimate is None else self.output_input(nnx.relu(self.penultimate(x)), x)

    def output_input(self, hidden: Array, x: Array) -> Array:
        """Return the dense input of the output layer, given the hidden units and the features."""
        return hidden

    def __call__(self, x: Array | Features) -> Array:
        return self.output(self.hidden(x))

    def loss(self, x: Array | Features, positives: Array, loss: str = "squared_hinge") -> Array:
        return find_loss(loss)(self(x), positives)

    def top_k(self, x: Array | Features, k: int) -> tuple[Array, Array]:
        return jax.lax.top_k(self(x).astype(jnp.float32), k)

    def logits_in_blocks(self, x: Array | Features) -> Iterator[tuple[Array, Array]]:
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

        def zeros():
            return {
                name: jnp.zeros(parameter.shape, dtypes[layer])
                for name, parameter in parameters.items()
                if (layer := name.partition(".")[0]) in dtypes
            }

        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def step_fused(self, inputs, moments, training):
        check_features(self, inputs.x, self.in_features, ndim=2)
        if self.penultimate is None:
            loss, d_x, of_output = self._step_own(inputs, moments, training)
            return loss, d_x, next_state(moments, of_output)
        y = self.penultimate(inputs.x)
        hidden, pullback = jax.vjp(lambda y, x: self.output_input(nnx.relu(y), x), y, inputs.x)
        behind = inputs._replace(x=hidden, wants_d_x=True)
        loss, d_hidden, of_output = self._step_own(behind, moments, training)
        d_y, d_x_past = pullback(d_hidden)
        d_x, of_penultimate = step_dense(
            self.penultimate,
            "penultimate",
            d_y,
            inputs,
            moments,
            rate=training.penultimate_lr_multiplier,
            epsilon=training.epsilon_for(self.labels_of_all),
        )
        d_x = d_x + d_x_past if inputs.wants_d_x else d_x
        return loss, d_x, next_state(moments, of_output, of_penultimate)

    def _step_own(
        self, inputs: StepInputs, moments: optax.ScaleByAdamState, training: HeadTraining
    ) -> tuple[Array, Array, Moments]:
        """Call `step_output`, and sum its loss and gradient over all devices if labels are sharded."""
        loss, d_x, of_output = self.step_output(inputs, moments, training)
        return (*((loss, d_x) if self.part is None else self.part.sum((loss, d_x))), of_output)

    def step_output(
        self, inputs: StepInputs, moments: optax.ScaleByAdamState, training: HeadTraining
    ) -> tuple[Array, Array, Moments]:
        """Take one training step of the output layer, whose input is `inputs.x`.

        Returns:
          The loss, its gradient with respect to `inputs.x`, and the new moments of the output layer.
        """
        graphdef, (params, rest) = split(self.output, nnx.Param)

        def loss_of(params, x):
            output = nnx.merge(graphdef, params, rest, copy=True)
            return find_loss(training.loss)(output(x), inputs.positives)

        loss, (grads, d_x) = jax.value_and_grad(loss_of, argnums=(0, 1))(params, inputs.x)
        return loss, d_x, self._update(nnx.State({"output": grads}), inputs, moments, training)

    def step_by_optax(self, inputs, moments, training):
        graphdef, (params, rest) = split(self, nnx.Param)

        def loss_of(params, x):
            head = nnx.merge(graphdef, params, rest, copy=True)
            return head.loss(Features(x, inputs.words), inputs.positives, training.loss)

        loss, (grads, d_x) = jax.value_and_grad(loss_of, argnums=(0, 1))(params, inputs.x)
        return loss, d_x, next_state(moments, self._update(grads, inputs, moments, training))

    def _update(
        self, grads: nnx.State, inputs: StepInputs, state: optax.ScaleByAdamState, training: HeadTraining
    ) -> Moments:
        """Update the parameters in `grads` with Optax, and return their new moments."""
        gradients = {path_name(path): g[...] for path, g in nnx.to_flat_state(grads)}
        parameters = parameters_of(self)
        rates = {"penultimate": training.penultimate_lr_multiplier, "output": training.output_lr_multiplier}
        of_adam = {name: g for name, g in gradients.items() if name in state.mu}
        epsilon = training.epsilon_for(self.labels_of_all)
        directions, moments = adam_directions(of_adam, state, epsilon, inputs.seed)
        for name, gradient in gradients.items():
            # The loss is a mean over batch and labels; SGD follows the sum.
            scale = float(inputs.x.shape[0] * self.labels_of_all)
            direction = directions[name] if name in directions else scale * gradient.astype(jnp.float32)
            value = parameters[name][...]
            new = value.astype(jnp.float32) - rates[name.partition(".")[0]] * inputs.learning_rate * direction
            if value.dtype == jnp.bfloat16:
                shape, is_bias = parameters["output.kernel"].shape, name == "output.bias"
                # The bias uses the random bits that follow the bits of the kernel.
                of_kernel = math.prod(shape if self.part is None else (self.labels_of_all, *shape[1:]))
                new = xla_ops.round_stochastically(
                    new[:, None] if is_bias else new,
                    inputs.seed,
                    inputs.step,
                    first=of_kernel if is_bias else 0,
                    first_row=self.first_label(),
                ).reshape(new.shape)
            parameters[name].set_value(new.astype(value.dtype))
        return moments
