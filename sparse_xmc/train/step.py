"""The training step of a classifier: Optax updates the encoder, Adagrad its tables, the head itself.

    features, pullback = jax.vjp(encoder, ...)
    loss, d_features, head = head.step(features, positives, ...)
    encoder = optax(pullback(d_features))

A head is updated in place by fused ops (`Head.step_fused`) or by Optax (`Head.step_by_optax`); the state has
the same structure in both cases.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.extend import core

from sparse_xmc.data.batches import Batch
from sparse_xmc.encoders import EncoderOutput, as_encoder_output
from sparse_xmc.encoders.table import TableParam, adagrad, put_rows, tables_of, take_rows, used_rows
from sparse_xmc.heads import StepInputs, reset_padding_labels
from sparse_xmc.model import Classifier
from sparse_xmc.modules import in_evaluation, in_training, parameters_of, path_name, split
from sparse_xmc.train.config import TrainingConfig

State = dict[str, Any]

# The encoder's parameters that Optax trains.
_OPTAX = nnx.All(nnx.Param, nnx.Not(TableParam))


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step and a rewiring as pure functions of the training state, for `jax.jit`.

    Attributes:
      graphdef: the structure of the classifier.
      config: the training configuration.
      seed: seed of rewiring and stochastic rounding, an integer in 0..2^32-1.
      optimizer: optimizer of the encoder.
      fused: whether the head is updated in place (`Head.step_fused`) rather than by Optax.
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
        tables = tables_of(model.encoder)
        squares = {path: jnp.zeros(table.embedding.shape[0], jnp.float32) for path, table in tables}
        moments = model.head.init_moments(self.config)
        return _state(model, moments, self.optimizer.init(nnx.state(model.encoder, _OPTAX)), squares)

    def train(self, state: State, batch: Batch, learning_rate, step) -> tuple[State, jax.Array]:
        """Take one training step.

        Args:
          state: the training state.
          batch: the batch to train on.
          learning_rate: float32 scalar.
          step: int32 scalar, the number of the step.

        Returns:
          The state after the step, and the loss before it, a float32 scalar.
        """
        model = self._merge(state)
        encoder, head = in_training(model.encoder), model.head
        rows = used_rows(nnx.clone(encoder), batch.inputs)
        take_rows(encoder, rows)
        graphdef, (tables, params, rest) = split(encoder, TableParam, nnx.Param)

        def encode(tables, params):
            encoder = nnx.merge(graphdef, tables, params, rest, copy=True)
            features, direct = as_encoder_output(encoder(batch.inputs))
            return features.astype(jnp.float32), (direct, nnx.state(encoder, nnx.Not(nnx.Param)))

        features, pullback, (direct, rest) = jax.vjp(encode, tables, params, has_aux=True)
        has_params, positives = bool(jax.tree.leaves((tables, params))), jnp.asarray(batch.positives)
        inputs = StepInputs(
            features, positives, learning_rate, self.seed, step, wants_d_x=has_params, direct=direct
        )
        before = {name: parameter[...] for name, parameter in parameters_of(head).items()}
        step_head = head.step_fused if self.fused else head.step_by_optax
        loss, d_features, moments = step_head(inputs, state["moments"], self.config)
        _check_updated(before, head)

        nnx.update(model.encoder, rest)
        optimizer, squares = state["optimizer"], dict(state["squares"])
        if has_params:
            _check_used(pullback, features, tables, params)
            # The encoder gets the gradient of the sum over labels, not of the mean.
            d_tables, gradients = pullback(head.num_labels * d_features)
            if jax.tree.leaves(params):
                updates, optimizer = self.optimizer.update(gradients, optimizer, params)
                falling = learning_rate / self.config.learning_rate
                updates = jax.tree.map(lambda update: (falling * update).astype(update.dtype), updates)
                nnx.update(model.encoder, optax.apply_updates(params, updates))
            self._step_tables(model.encoder, rows, d_tables, squares, learning_rate)
        return _state(model, moments, optimizer, squares), loss

    def _step_tables(self, encoder, rows, gradients: nnx.State, squares: State, learning_rate) -> None:
        """Update the table rows that a batch uses, and their sums of squares, with Adagrad."""
        rate = self.config.embedding_lr_multiplier * learning_rate
        gradient_of = {path_name(path): g[...] for path, g in nnx.to_flat_state(gradients)}
        for path, table in tables_of(encoder):
            whole, of_table = table.embedding[...], rows[path]
            direction, new = adagrad(gradient_of[path], squares[path].at[of_table].get(mode="clip"))
            values = whole.at[of_table].get(mode="clip") - rate * direction
            table.embedding.set_value(put_rows(whole, of_table, values))
            squares[path] = put_rows(squares[path], of_table, new)

    def rewire(self, state: State, batch: Batch, step) -> State:
        """Return the state after a rewiring on a batch; `step` is mixed into the random key."""
        model, key = self._merge(state), jax.random.fold_in(jax.random.key(self.seed), step)
        features, direct = as_encoder_output(in_evaluation(nnx.clone(model.encoder))(batch.inputs))
        moments = model.head.rewire(
            EncoderOutput(features.astype(jnp.float32), direct),
            jnp.asarray(batch.positives),
            state["moments"],
            key,
            self.config.rewire,
        )
        return _state(model, moments, state["optimizer"], state["squares"])

    def reset_padding_labels(self, state: State) -> State:
        """Return the state with padding labels of a mesh reset, after it was read from another mesh."""
        model = self._merge(state)
        reset_padding_labels(model.head)
        return _state(model, state["moments"], state["optimizer"], state["squares"])

    def _merge(self, state: State) -> Classifier:
        return nnx.merge(self.graphdef, state["params"], state["other"], copy=True)


def _state(model: Classifier, moments: Any, optimizer: Any, squares: State) -> State:
    _, (params, other) = split(model, nnx.Param)
    return {
        "params": params,
        "other": other,
        "moments": moments,
        "optimizer": optimizer,
        "squares": squares,
    }


# ---- checks against parameters that would silently stay untrained ----


def check_parts(model: Classifier) -> None:
    """Raise ValueError unless each parameter belongs to either encoder or head, and tables are float32."""
    parts = {"encoder": parameters_of(model.encoder), "head": parameters_of(model.head)}
    for name, parameter in parameters_of(model).items():
        owners = [part for part, its in parts.items() if any(p is parameter for p in its.values())]
        if len(owners) != 1:
            where = "in the encoder and the head both" if owners else "neither in the encoder nor in the head"
            raise ValueError(f"parameter {name} is {where}; Trainer cannot train it")
    tables = dict(tables_of(model.encoder))
    for name, parameter in parts["encoder"].items():
        if not isinstance(parameter, TableParam):
            continue
        owners = [path for path, table in tables.items() if table.embedding is parameter]
        if len(owners) != 1:
            raise ValueError(f"{name} must be the table of one EmbeddingTable, but is that of {len(owners)}")
        if parameter.dtype != jnp.float32:
            raise ValueError(f"table {name} must be float32 to be trained by rows, got {parameter.dtype}")


def _check_updated(before: dict[str, jax.Array], head: nnx.Module) -> None:
    for name, parameter in parameters_of(head).items():
        if parameter[...] is before[name]:
            raise ValueError(f"the head's step leaves its parameter {name} as it is")


def _check_used(pullback: Callable, features: jax.Array, *params: nnx.State) -> None:
    """Raise ValueError if the features do not depend on a parameter of the encoder."""
    program = jax.make_jaxpr(pullback)(jnp.zeros_like(features)).jaxpr
    reached = set(program.invars)
    for equation in program.eqns:
        if any(isinstance(v, core.Var) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    paths = [path for state in params for path, _ in nnx.to_flat_state(state)]
    for path, result in zip(paths, program.outvars, strict=True):
        if not isinstance(result, core.Var) or result not in reached:
            raise ValueError(
                f"the features do not depend on the encoder's parameter {path_name(path)}, so that "
                "nothing would train it; what is to stay as it is may be an nnx.Variable of another type"
            )
