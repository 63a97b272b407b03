"""The training step of a classifier, as a pure function of the training state.

    features, pullback = jax.vjp(encoder, ...)
    loss, d_features, head = head.step(features, positives, ...)
    encoder = optax(pullback(d_features))

A head updates itself, with fused ops (`Head.step_fused`) or with Optax (`Head.step_by_optax`); the state has
the same structure in both cases. Embedding tables of the encoder are updated by Adagrad, by rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from sparse_xmc.data.batches import Batch
from sparse_xmc.encoders import EncoderOutput, as_encoder_output
from sparse_xmc.encoders.table import TableParam, adagrad, put_rows, tables_of, take_rows, used_rows
from sparse_xmc.heads import StepInputs, reset_padding_labels
from sparse_xmc.model import Classifier
from sparse_xmc.modules import in_evaluation, in_training, merge, parameters_of, path_name, split
from sparse_xmc.train.checks import check_encoder_used, check_head_updated
from sparse_xmc.train.config import TrainingConfig

# The training state, a pytree of arrays with these entries:
#   "params": all parameters of the classifier;
#   "other": its other variables, such as connectivity and random state;
#   "moments": the moments of the head;
#   "optimizer": the Optax state of the encoder;
#   "squares": Adagrad's sums of squared gradients, float32 [V] for each embedding table.
State = dict[str, Any]

# The encoder's parameters that Optax trains.
_OPTAX_PARAMS = nnx.All(nnx.Param, nnx.Not(TableParam))


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step and a rewiring as pure functions of the training state, for `jax.jit`.

    Attributes:
      graphdef: the structure of the classifier.
      config: the training configuration.
      seed: seed of rewiring and stochastic rounding, an integer in 0..2^32-1.
      optimizer: optimizer of the encoder.
      fused: whether the head updates itself by `Head.step_fused` rather than by `Head.step_by_optax`.
    """

    graphdef: nnx.GraphDef
    config: TrainingConfig
    seed: int
    optimizer: optax.GradientTransformation
    fused: bool

    def init(self, model: Classifier) -> State:
        """Return the state before the first step: arrays, or shapes if the model's parameters are shapes."""
        graphdef, state = nnx.split(model)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
            return jax.eval_shape(lambda state: self._init(nnx.merge(graphdef, state)), state)
        return self._init(model)

    def _init(self, model: Classifier) -> State:
        moments = model.head.init_moments(self.config)
        optimizer = self.optimizer.init(nnx.state(model.encoder, _OPTAX_PARAMS))
        tables = tables_of(model.encoder)
        squares = {path: jnp.zeros(table.embedding.shape[0], jnp.float32) for path, table in tables}
        return _make_state(model, moments, optimizer, squares)

    def train(self, state: State, batch: Batch, learning_rate: Array, step: Array) -> tuple[State, Array]:
        """Take one training step.

        Args:
          state: the training state.
          batch: the batch to train on.
          learning_rate: float32 scalar, the learning rate of this step, from the schedule, before the
            multipliers of the layers.
          step: int32 scalar, the number of the step.

        Returns:
          The state after the step, and the loss before it, a float32 scalar.
        """
        model = self._merge(state)
        head, encoder = model.head, in_training(model.encoder)

        # Forward pass of the encoder. Each table is replaced by the rows that the batch uses, so that its
        # gradient consists of these rows only. `used_rows` runs a clone of the encoder: this advances the
        # random state of the clone only, so that the forward pass below draws the same dropout masks.
        rows = used_rows(nnx.clone(encoder), batch.inputs)
        take_rows(encoder, rows)
        graphdef, (tables, params, variables) = split(encoder, TableParam, nnx.Param)

        def encode(tables, params):
            encoder = merge(graphdef, tables, params, variables)
            features, direct = as_encoder_output(encoder(batch.inputs))
            # The call updates variables other than parameters, such as random state.
            return features.astype(jnp.float32), (direct, nnx.state(encoder, nnx.Not(nnx.Param)))

        features, pullback, (direct, new_variables) = jax.vjp(encode, tables, params, has_aux=True)
        nnx.update(model.encoder, new_variables)

        # Loss and update of the head.
        has_params = bool(jax.tree.leaves((tables, params)))
        inputs = StepInputs(
            features,
            jnp.asarray(batch.positives),
            learning_rate,
            self.seed,
            step,
            wants_d_x=has_params,
            direct=direct,
        )
        old_params = {name: parameter[...] for name, parameter in parameters_of(head).items()}
        step_head = head.step_fused if self.fused else head.step_by_optax
        loss, d_features, moments = step_head(inputs, state["moments"], self.config)
        check_head_updated(old_params, head)

        # Backward pass and update of the encoder.
        optimizer, squares = state["optimizer"], state["squares"]
        if has_params:
            check_encoder_used(pullback, features, tables, params)
            # The loss of the head is a mean over labels. The encoder gets the gradient of the sum, which
            # does not become tiny with many labels.
            d_tables, d_params = pullback(head.num_labels * d_features)
            optimizer = self._update_params(model.encoder, params, d_params, optimizer, learning_rate)
            squares = self._update_tables(model.encoder, rows, d_tables, squares, learning_rate)
        return _make_state(model, moments, optimizer, squares), loss

    def _update_params(
        self,
        encoder: nnx.Module,
        params: nnx.State,
        gradients: nnx.State,
        optimizer: Any,
        learning_rate: Array,
    ) -> Any:
        """Update the parameters of the encoder except tables with Optax, and return the Optax state."""
        if not jax.tree.leaves(params):
            return optimizer
        updates, optimizer = self.optimizer.update(gradients, optimizer, params)
        # The optimizer includes a learning rate of its own, which the schedule scales.
        scale = learning_rate / self.config.learning_rate
        updates = jax.tree.map(lambda update: (scale * update).astype(update.dtype), updates)
        nnx.update(encoder, optax.apply_updates(params, updates))
        return optimizer

    def _update_tables(
        self,
        encoder: nnx.Module,
        rows: dict[str, Array],
        gradients: nnx.State,
        squares: dict[str, Array],
        learning_rate: Array,
    ) -> dict[str, Array]:
        """Update the given rows of the tables with Adagrad, and return its sums of squared gradients."""
        rate = self.config.embedding_lr_multiplier * learning_rate
        gradient_of = {path_name(path): gradient[...] for path, gradient in nnx.to_flat_state(gradients)}
        squares = dict(squares)
        for path, table in tables_of(encoder):
            values, table_rows = table.embedding[...], rows[path]
            # Row numbers are padded with V; "clip" makes them valid, and `put_rows` drops their results.
            old_squares = squares[path].at[table_rows].get(mode="clip")
            direction, new_squares = adagrad(gradient_of[path], old_squares)
            new_values = values.at[table_rows].get(mode="clip") - rate * direction
            table.embedding.set_value(put_rows(values, table_rows, new_values))
            squares[path] = put_rows(squares[path], table_rows, new_squares)
        return squares

    def rewire(self, state: State, batch: Batch, step: Array) -> State:
        """Return the state after a rewiring.

        Args:
          state: the training state.
          batch: the points used to choose new connections if growth is `active`.
          step: int32 scalar, the number of steps taken, which makes the random key different each time.
        """
        model, key = self._merge(state), jax.random.fold_in(jax.random.key(self.seed), step)
        features, direct = as_encoder_output(in_evaluation(nnx.clone(model.encoder))(batch.inputs))
        moments = model.head.rewire(
            EncoderOutput(features.astype(jnp.float32), direct),
            jnp.asarray(batch.positives),
            state["moments"],
            key,
            self.config.rewire,
        )
        return _make_state(model, moments, state["optimizer"], state["squares"])

    def reset_padding_labels(self, state: State) -> State:
        """Return the state with padding labels of a mesh reset, after it was read from another mesh."""
        model = self._merge(state)
        reset_padding_labels(model.head)
        return _make_state(model, state["moments"], state["optimizer"], state["squares"])

    def _merge(self, state: State) -> Classifier:
        return merge(self.graphdef, state["params"], state["other"])


def _make_state(model: Classifier, moments: Any, optimizer: Any, squares: dict[str, Array]) -> State:
    _, (params, other) = split(model, nnx.Param)
    return {
        "params": params,
        "other": other,
        "moments": moments,
        "optimizer": optimizer,
        "squares": squares,
    }
