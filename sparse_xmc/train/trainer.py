"""Training step by step."""

import functools
import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import xla_ops
from sparse_xmc.data.batches import Batch
from sparse_xmc.heads import Head
from sparse_xmc.mesh import data_size, place, place_batch
from sparse_xmc.model import Classifier
from sparse_xmc.modules import key_path_names, path_name, split
from sparse_xmc.settings import check_seed
from sparse_xmc.train.config import TrainingConfig
from sparse_xmc.train.step import State, Step, check_parts


class Trainer:
    """Trains a `Classifier` in place of its initial weights.

    The encoder's optimizer sees the gradient of the loss summed over labels, a mean over the batch, so that
    its epsilon and clipping mean what they do elsewhere; its updates fall with the schedule. Tables of
    embeddings (`EmbeddingTable`) are not its concern: they learn by Adagrad, by the rows that a batch uses.
    All of the encoder is in training mode, as after `nnx.Module.train`.

    Args:
      model: the classifier; its arrays are donated to the first step, so use `Trainer.model` afterwards.
      config: how to train.
      seed: of the order of the points, of rewiring, and of stochastic rounding: 0..2^32-1.
      encoder_optimizer: a whole optimizer for the encoder, such as `optax.lion(1e-5)`; by default AdamW as
        the configuration's `encoder_rate`, `encoder_warmup`, `encoder_weight_decay` and `moments` say.
      fused: whether the head steps in place; by default wherever the native ops run. The state is the same,
        so that a checkpoint of the one goes on under the other.

    Attributes:
      state: all that changes: parameters, connectivity, random state, moments. A pytree.
      step: the number of steps taken.
      num_labels: L.
      mesh: the devices that the classifier's labels are split over, or None.

    Raises:
      ValueError: the seed is not an integer in 0..2^32-1, the head cannot be trained so, something would be
        left untrained, or settings of the encoder's optimizer are given beside an optimizer that does not ask
        for them.
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
        seed = check_seed(seed)
        check_parts(model)
        if config.rewire.fraction:
            model.head.check_rewiring(config.rewire)
        if encoder_optimizer is None:
            encoder_optimizer = _adamw(config)
        elif given := [name for name, default in _OF_ADAMW.items() if getattr(config, name) != default]:
            raise ValueError(f"{given[0]} is for the default optimizer, not beside encoder_optimizer")
        self.config = config
        self.seed = seed
        self.step = 0
        self.fused = jax.default_backend() in xla_ops.platforms() if fused is None else fused
        self.num_labels = model.head.num_labels
        self._graphdef, _ = split(model, nnx.Param)
        step = Step(self._graphdef, config, seed, encoder_optimizer, self.fused)
        self.state: State = step.init(model)
        self.mesh = model.head.mesh
        if self.mesh is None:
            self._programs = _programs(step)
        else:
            if config.batch_size % data_size(self.mesh):
                raise ValueError(
                    f"batch_size must be a multiple of the mesh's data axis, {data_size(self.mesh)}, "
                    f"got {config.batch_size}"
                )
            self.state = place(self.state, self.mesh)
            shardings = jax.tree.map(lambda array: array.sharding, self.state)
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            self._programs = _compiled(step, shardings, (shardings, everywhere))

    @property
    def head(self) -> Head:
        """The classifier's head, as `model` has it."""
        return self.model.head

    @property
    def model(self) -> Classifier:
        """The classifier with the present weights; good until the next step, which takes its arrays."""
        graphdef, state = self._graphdef, (self.state["params"], self.state["other"])
        return nnx.merge(graphdef, *jax.tree.map(lambda array: array, state))

    def train_step(self, batch: Batch, learning_rate: float) -> jax.Array:
        """One step, and the rewiring that falls due after it. Returns the loss (not waited for).

        Raises:
          TypeError: the learning rate is not a number, or positives are not integers.
          ValueError: the learning rate is not finite; positives are not as `Batch` has them; or nothing would
            train one of the parameters.
        """
        rate = _check_rate(learning_rate)
        _check_positives(np.asarray(batch.positives), self.num_labels)
        batch = place_batch(batch, self.mesh)
        self.state, loss = self._programs.train(self.state, batch, rate, np.int32(self.step))
        self.step += 1
        interval = self.config.rewire_interval
        if interval != -1 and self.step % interval == 1 % interval:
            self.rewire(batch)
        return loss

    def trace(self, batch: Batch) -> dict[str, jax.stages.Traced]:
        """The programs for batches like this one, not run: "step", and "rewiring" if there is any."""
        batch = place_batch(batch, self.mesh)
        programs = {"step": self._programs.train.trace(self.state, batch, np.float32(0), np.int32(0))}
        if self.config.rewire.fraction:
            programs["rewiring"] = self._programs.rewire.trace(self.state, batch, np.int32(0))
        return programs

    def rewire(self, batch: Batch) -> None:
        """Moves connections of the head now, if it has any and the configuration says so.

        Args:
          batch: the points that show where they move, if growth is `active`.
        """
        if self.config.rewire.fraction:
            batch = place_batch(batch, self.mesh)
            self.state = self._programs.rewire(self.state, batch, np.int32(self.step))

    def array_not_finite(self) -> str | None:
        """The name of an array of the state that has a value that is not finite, or None."""
        leaves = jax.tree_util.tree_leaves_with_path(self.state)
        floats = [(path, a) for path, a in leaves if jax.dtypes.issubdtype(a.dtype, np.floating)]
        for (path, _), finite in zip(floats, _are_finite([a for _, a in floats]), strict=True):
            if not finite:
                return path_name(key_path_names(path))
        return None

    def restore(self, state: State) -> None:
        """Goes on from a state that was saved, on whatever mesh. Its arrays are donated to the next step."""
        self.state = state if self.mesh is None else self._programs.fill_up(state)

    def epoch(
        self, batches: Any, epoch: int, learning_rate: Callable[[int], float], *, first: int = 0
    ) -> Iterator[jax.Array]:
        """Trains for one epoch, or what is left of it, yielding each step's loss.

        Args:
          batches: the training points: a `Batches`, or anything with its `shuffled(seed, epoch, first=)`.
          epoch: the epoch's number, from 0; with the seed it fixes the order of the points.
          learning_rate: from a step's number within the epoch.
          first: how many of its steps have been taken already.
        """
        for i, batch in enumerate(batches.shuffled(self.seed, epoch, first=first), start=first):
            # Not at an epoch's end: what is evaluated has had time to use its connections.
            if self.config.rewire_interval == -1 and epoch > 0 and i == 0:
                self.rewire(batch)
            yield self.train_step(batch, learning_rate(i))


class _Programs(NamedTuple):
    """What a `Step` does, compiled. Each is a function of a state, which is donated, and of more."""

    train: Any
    rewire: Any
    fill_up: Any


def _compiled(step: Step, state: Any = None, trained: Any = None) -> _Programs:
    """The programs, with the shardings of the state that they return, and of what training returns."""
    return _Programs(
        jax.jit(step.train, donate_argnums=0, out_shardings=trained),
        jax.jit(step.rewire, donate_argnums=0, out_shardings=state),
        jax.jit(step.fill_up, donate_argnums=0, out_shardings=state),
    )


@functools.lru_cache(maxsize=2)  # the others are freed with the last trainer that uses them
def _programs(step: Step) -> _Programs:
    """The programs of a step: trainers of the same kind, one that plans its memory among them, share them."""
    return _compiled(step)


_OF_ADAMW = {"encoder_rate": 1, "encoder_warmup": 0, "encoder_weight_decay": 0}


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(array).all() for array in arrays]


@functools.lru_cache(maxsize=16)  # the same object for the same settings
def _adamw(config: TrainingConfig) -> optax.GradientTransformation:
    """The encoder's optimizer. Biases and scales do not decay.

    Reference: Loshchilov & Hutter, Decoupled weight decay regularization, ICLR 2019.
    """
    rate = config.learning_rate * config.encoder_rate
    warmup = config.encoder_warmup
    return optax.adamw(
        optax.linear_schedule(rate / (1 + warmup), rate, warmup) if warmup else rate,
        mu_dtype=config.moments,
        weight_decay=config.encoder_weight_decay,
        mask=lambda params: jax.tree.map(lambda parameter: parameter.ndim > 1, params),
    )


def _check_rate(learning_rate: Any) -> np.float32:
    """Returns a learning rate as float32; raises unless it is a finite number, or an array of one."""
    is_number = isinstance(learning_rate, numbers.Real | np.ndarray | np.generic | jax.Array)
    rate = np.asarray(learning_rate if is_number else None)
    is_real = jnp.issubdtype(rate.dtype, jnp.floating) or jnp.issubdtype(rate.dtype, jnp.integer)
    if rate.shape != () or not is_real:
        raise TypeError(f"learning_rate must be a number, got {learning_rate!r}")
    with np.errstate(over="ignore"):
        rate = rate.astype(np.float32)
    if not np.isfinite(rate):
        raise ValueError(f"learning_rate must be finite in float32, got {learning_rate}")
    return np.float32(rate)


def _check_positives(positives: np.ndarray, num_labels: int) -> None:
    """Raises unless positives [B, P] are labels or -1, and a point has each once."""
    if positives.ndim != 2 or positives.dtype.kind not in "iu":
        got = f"dtype {positives.dtype.name} and shape {list(positives.shape)}"
        raise TypeError(f"positives must be an array of integers [B, P], got {got}")
    wrong = (positives < -1) | (positives >= num_labels)
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        raise ValueError(
            f"positives must be labels in 0..{num_labels - 1}, or -1; point {row} of the batch has "
            f"{positives[row][wrong[row]][0]}"
        )
    ordered = np.sort(positives, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        label = ordered[row, 1:][twice[row]][0]
        raise ValueError(f"positives must be distinct; point {row} of the batch has {label} twice")
