"""One training step for every network: the encoder by Optax, its tables by rows, the head by itself.

    features, pullback = jax.vjp(encoder, ...)
    loss, d_features, head = head.step(features, positives, ...)
    encoder = optax(pullback(d_features))

A head steps in place (`Head.step_fused`) wherever the native ops run, else by Optax; the state is the same.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend import core

import xla_ops
from sparse_xmc.data.batches import Batch
from sparse_xmc.encoders.table import TableParam, adagrad, put_rows, tables_of, take_rows, used_rows
from sparse_xmc.heads import StepInputs
from sparse_xmc.model import Classifier
from sparse_xmc.modules import in_evaluation, in_training, split
from sparse_xmc.train.config import TrainingConfig

State = dict[str, Any]


class Trainer:
    """Trains a `Classifier` in place of its initial weights.

    The encoder's optimizer sees the gradient of the loss summed over labels, a mean over the batch, so that
    its epsilon and clipping mean what they do elsewhere; its updates fall with the schedule. Tables of
    embeddings (`EmbeddingTable`) are not its concern: they learn by Adagrad, by the rows that a batch uses.

    Args:
      model: the classifier; its arrays are donated to the first step, so use `Trainer.model` afterwards.
      config: how to train.
      seed: of the order of the points, of rewiring, and of stochastic rounding.
      encoder_optimizer: a whole optimizer for the encoder, such as `optax.adamw(1e-4)`; by default Adam at
        the learning rate times `config.encoder_rate`.
      fused: whether the head steps in place; by default wherever the native ops run. The state is the same,
        so that a checkpoint of the one goes on under the other.

    Attributes:
      state: all that changes: parameters, connectivity, random state, moments. A pytree.
      step: the number of steps taken.

    Raises:
      ValueError: the head cannot be trained so, or it shares parameters with the encoder.
    """

    def __init__(
        self,
        model: Classifier,
        config: TrainingConfig,
        *,
        seed: int = 0,
        encoder_optimizer: optax.GradientTransformation | None = None,
        fused: bool | None = None,
    ):
        self.config = config
        self.seed = seed
        self.step = 0
        self.fused = jax.default_backend() in xla_ops.platforms() if fused is None else fused
        self._optimizer = encoder_optimizer or optax.adam(config.learning_rate * config.encoder_rate)
        _check_parts(model)
        if config.rewire.fraction:
            model.head.check_rewiring(config.rewire)
        self._num_labels = model.head.num_labels
        self._graphdef, (params, other) = split(model, nnx.Param)
        self.state: State = {
            "params": params,
            "other": other,
            "moments": model.head.init_moments(config),
            "encoder": self._optimizer.init(nnx.state(model.encoder, _OPTAX)),
            "squares": {
                path: jnp.zeros(table.embedding.shape[0]) for path, table in tables_of(model.encoder)
            },
        }
        self._train_step = jax.jit(self._step, donate_argnums=0)
        self._rewire = jax.jit(self._rewired, donate_argnums=0)

    @property
    def model(self) -> Classifier:
        """The classifier with the present weights."""
        return nnx.merge(self._graphdef, self.state["params"], self.state["other"])

    def train_step(self, batch: Batch, learning_rate: float) -> jax.Array:
        """One step, and the rewiring that falls due after it. Returns the loss (not waited for).

        Raises:
          ValueError: a label is beyond those of the head; or nothing would train one of the parameters.
        """
        _check_labels(batch.positives, self._num_labels)
        self.state, loss = self._train_step(self.state, batch, np.float32(learning_rate), np.int32(self.step))
        self.step += 1
        interval = self.config.rewire_interval
        if interval != -1 and self.step % interval == 1 % interval:
            self.rewire(batch)
        return loss

    def lower_step(self, batch: Batch) -> jax.stages.Lowered:
        """The step for batches like this one, lowered and not run: for its memory analysis."""
        return self._train_step.lower(self.state, batch, np.float32(0), np.int32(0))

    def rewire(self, batch: Batch) -> None:
        """Moves connections of the head now, if it has any and the configuration says so.

        Args:
          batch: the points that show where they move, if growth is `active`.
        """
        if self.config.rewire.fraction:
            key = jax.random.fold_in(jax.random.key(self.seed), self.step)
            self.state = self._rewire(self.state, batch, key)

    def epoch(self, batches: Any, epoch: int, learning_rate: Callable[[int], float]) -> Iterator[jax.Array]:
        """Trains for one epoch, yielding each step's loss.

        Args:
          batches: the training points: a `Batches`, or anything with its `shuffled(seed, epoch)`.
          epoch: the epoch's number, from 0; with the seed it fixes the order of the points.
          learning_rate: from a step's number within the epoch.
        """
        for i, batch in enumerate(batches.shuffled(self.seed, epoch)):
            # Not at an epoch's end: what is evaluated has had time to use its connections.
            if self.config.rewire_interval == -1 and epoch > 0 and i == 0:
                self.rewire(batch)
            yield self.train_step(batch, learning_rate(i))

    # ---- traced ----

    def _step(self, state: State, batch: Batch, learning_rate, step) -> tuple[State, jax.Array]:
        """The new state and the loss."""
        model = nnx.merge(self._graphdef, state["params"], state["other"], copy=True)
        encoder, head = in_training(model.encoder), model.head
        rows = used_rows(nnx.clone(encoder), batch.inputs)
        of_batch = nnx.clone(encoder)
        take_rows(of_batch, rows)
        graphdef, (tables, params, rest) = split(of_batch, TableParam, nnx.Param)

        def encode(tables, params):
            encoder = nnx.merge(graphdef, tables, params, rest, copy=True)
            features = encoder(batch.inputs).astype(jnp.float32)
            return features, nnx.state(encoder, nnx.Not(nnx.Param))

        features, pullback, rest = jax.vjp(encode, tables, params, has_aux=True)
        has_params, positives = bool(jax.tree.leaves((tables, params))), jnp.asarray(batch.positives)
        inputs = StepInputs(features, positives, learning_rate, self.seed, step, wants_d_x=has_params)
        before = [
            (path, node, node[...]) for path, node in nnx.iter_graph(head) if isinstance(node, nnx.Param)
        ]
        step_head = head.step_fused if self.fused else head.step_by_optax
        loss, d_features, moments = step_head(inputs, state["moments"], self.config)
        _check_updated(before)

        nnx.update(model.encoder, rest)
        optimizer, squares = state["encoder"], dict(state["squares"])
        if has_params:
            _check_used(pullback, features, params)
            d_tables, gradients = pullback(head.num_labels * d_features)
            if jax.tree.leaves(params):
                updates, optimizer = self._optimizer.update(gradients, optimizer, params)
                falling = learning_rate / self.config.learning_rate
                updates = jax.tree.map(lambda update: (falling * update).astype(update.dtype), updates)
                nnx.update(model.encoder, optax.apply_updates(params, updates))
            self._step_tables(model.encoder, rows, d_tables, squares, learning_rate)
        return self._state(model, moments, optimizer, squares), loss

    def _step_tables(self, encoder, rows, gradients: nnx.State, squares: State, learning_rate) -> None:
        """Updates the rows that a batch uses, by their gradients, and `squares`."""
        rate = self.config.embedding_rate * learning_rate
        gradient_of = {".".join(map(str, path)): g[...] for path, g in nnx.to_flat_state(gradients)}
        for path, table in tables_of(encoder):
            whole, of_table = table.embedding[...], rows[path]
            direction, new = adagrad(gradient_of[path], squares[path].at[of_table].get(mode="clip"))
            values = whole.at[of_table].get(mode="clip") - (rate * direction).astype(whole.dtype)
            table.embedding.set_value(put_rows(whole, of_table, values))
            squares[path] = put_rows(squares[path], of_table, new)

    def _rewired(self, state: State, batch: Batch, key: jax.Array) -> State:
        model = nnx.merge(self._graphdef, state["params"], state["other"], copy=True)
        features = in_evaluation(nnx.clone(model.encoder))(batch.inputs).astype(jnp.float32)
        moments = model.head.rewire(features, batch.positives, state["moments"], key, self.config.rewire)
        return self._state(model, moments, state["encoder"], state["squares"])

    def _state(self, model: Classifier, moments, optimizer, squares) -> State:
        _, (params, other) = split(model, nnx.Param)
        return {
            "params": params,
            "other": other,
            "moments": moments,
            "encoder": optimizer,
            "squares": squares,
        }


# The encoder's parameters that Optax trains.
_OPTAX = nnx.All(nnx.Param, nnx.Not(TableParam))


# ---- what would go wrong without a word ----


def _check_parts(model: Classifier) -> None:
    """Raises ValueError unless each parameter of the model is in its encoder or in its head, not both."""
    parts = {
        name: {id(node) for _, node in nnx.iter_graph(part) if isinstance(node, nnx.Param)}
        for name, part in (("encoder", model.encoder), ("head", model.head))
    }
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and (count := sum(id(node) in part for part in parts.values())) != 1:
            where = "in the encoder and the head both" if count else "neither in the encoder nor in the head"
            raise ValueError(f"parameter {'.'.join(map(str, path))} is {where}; Trainer cannot train it")


def _check_labels(positives: Any, num_labels: int) -> None:
    if isinstance(positives, np.ndarray) and positives.size and positives.max() >= num_labels:
        row = int(positives.max(axis=1).argmax())
        raise ValueError(
            f"positives must be labels in 0..{num_labels - 1}, or -1; point {row} of the batch has "
            f"{positives[row].max()}"
        )


def _check_updated(before: list) -> None:
    for path, node, array in before:
        if node[...] is array:
            raise ValueError(f"the head's step leaves its parameter {'.'.join(map(str, path))} as it is")


def _check_used(pullback: Callable, features: jax.Array, params: nnx.State) -> None:
    """Raises ValueError if a parameter of the encoder gets no gradient whatever the features' gradient is."""
    program = jax.make_jaxpr(lambda d_features: pullback(d_features)[1])(jnp.zeros_like(features)).jaxpr
    reached = set(program.invars)
    for equation in program.eqns:
        if any(isinstance(v, core.Var) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    for (path, _), result in zip(nnx.to_flat_state(params), program.outvars, strict=True):
        if not isinstance(result, core.Var) or result not in reached:
            raise ValueError(
                f"the features do not depend on the encoder's parameter {'.'.join(map(str, path))}, so that "
                "nothing would train it; what is to stay as it is may be an nnx.Variable of another type"
            )
