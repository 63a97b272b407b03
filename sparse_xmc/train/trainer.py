"""The trainer: the training state of a classifier, and single training steps."""

import functools
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
from sparse_xmc.modules import key_path_names, merge, path_name, split
from sparse_xmc.settings import check_seed
from sparse_xmc.train.checks import as_learning_rate, check_parameters, check_positives
from sparse_xmc.train.config import TrainingConfig
from sparse_xmc.train.step import State, Step


class Trainer:
    """A trainer of a `Classifier`, which takes single steps; `fit` adds the loop over epochs.

    The optimizer of the encoder gets the gradient of the loss summed over labels and averaged over the batch,
    so that its epsilon and gradient clipping have their usual meaning. Its updates are scaled by the learning
    rate of the step relative to the base learning rate, `config.learning_rate`. It does not train embedding
    tables (`EmbeddingTable`): Adagrad updates their rows that a batch uses. The whole encoder is in training
    mode, as after `nnx.Module.train`.

    Args:
      model: the classifier; its arrays are donated to the first step, so use `Trainer.model` afterwards.
      config: the training configuration.
      seed: seed of the order of the points, of rewiring, and of stochastic rounding: an integer in 0..2^32-1.
      encoder_optimizer: an optimizer for the encoder that includes its learning rate, such as
        `optax.lion(1e-5)`; by default AdamW with `encoder_lr_multiplier`, `encoder_warmup`,
        `encoder_weight_decay` and `moment_dtype` of the configuration.
      fused: whether the head takes its steps with native ops (`Head.step_fused`) or with Optax; by default
        with native ops wherever they run. The state is the same in both cases, so a run can be resumed with
        either.

    Attributes:
      state: pytree of everything that training changes: parameters, connectivity, random state, moments.
      step: number of steps taken.
      num_labels: L, the number of labels.
      mesh: mesh over whose devices the labels are sharded, or None.

    Raises:
      ValueError: the seed is not an integer in 0..2^32-1; the head does not support the configuration; a
        parameter would be left untrained; batch_size is not a multiple of the mesh's data axis; or settings
        of the default optimizer are given together with `encoder_optimizer`.
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
        check_parameters(model)
        if config.rewire.fraction:
            model.head.check_rewiring(config.rewire)
        if encoder_optimizer is None:
            encoder_optimizer = _adamw(config)
        elif given := [name for name, default in _ADAMW_DEFAULTS.items() if getattr(config, name) != default]:
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
            self._programs = _shared_programs(step)
        else:
            if config.batch_size % data_size(self.mesh):
                raise ValueError(
                    f"batch_size must be a multiple of the mesh's data axis, {data_size(self.mesh)}, "
                    f"got {config.batch_size}"
                )
            self.state = place(self.state, self.mesh)
            shardings = jax.tree.map(lambda array: array.sharding, self.state)
            replicated = NamedSharding(self.mesh, PartitionSpec())
            self._programs = _compile(step, state=shardings, loss=replicated)

    @property
    def head(self) -> Head:
        """The head of `model`."""
        return self.model.head

    @property
    def model(self) -> Classifier:
        """The classifier with the current weights. Its arrays are donated to the next step."""
        return merge(self._graphdef, self.state["params"], self.state["other"])

    def train_step(self, batch: Batch, learning_rate: float) -> jax.Array:
        """Take one training step, and a rewiring if one is due after it.

        With `rewire_interval=-1`, `epoch` rewires, not this method.

        Args:
          batch: the batch to train on.
          learning_rate: the learning rate of this step, from the schedule, before the multipliers of the
            layers.

        Returns:
          The loss before the step, a float32 scalar. The function does not wait for its value.

        Raises:
          TypeError: the learning rate is not a number, or positives are not an integer array [B, P].
          ValueError: the learning rate is not finite; positives are not as described in `Batch`; or a
            parameter would stay untrained.
        """
        rate = as_learning_rate(learning_rate)
        check_positives(np.asarray(batch.positives), self.num_labels)
        batch = place_batch(batch, self.mesh)
        self.state, loss = self._programs.train(self.state, batch, rate, np.int32(self.step))
        self.step += 1
        interval = self.config.rewire_interval
        # The first rewiring follows step 1. (With an interval of 1, each remainder is 0.)
        if interval != -1 and self.step % interval == 1 % interval:
            self.rewire(batch)
        return loss

    def trace(self, batch: Batch) -> dict[str, jax.stages.Traced]:
        """Trace the programs for batches of this shape without running them.

        Returns:
          The traced programs: "step", and "rewiring" if the configuration has one.
        """
        batch = place_batch(batch, self.mesh)
        programs = {"step": self._programs.train.trace(self.state, batch, np.float32(0), np.int32(0))}
        if self.config.rewire.fraction:
            programs["rewiring"] = self._programs.rewire.trace(self.state, batch, np.int32(0))
        return programs

    def rewire(self, batch: Batch) -> None:
        """Rewire the head now, if it has connections and the configuration asks for rewiring.

        Args:
          batch: the points used to choose new connections if growth is `active`.
        """
        if self.config.rewire.fraction:
            batch = place_batch(batch, self.mesh)
            self.state = self._programs.rewire(self.state, batch, np.int32(self.step))

    def array_not_finite(self) -> str | None:
        """Return the name of an array of the state that has a value that is not finite, or None."""
        leaves = jax.tree_util.tree_leaves_with_path(self.state)
        floats = [(path, a) for path, a in leaves if jax.dtypes.issubdtype(a.dtype, np.floating)]
        for (path, _), finite in zip(floats, _are_finite([a for _, a in floats]), strict=True):
            if not finite:
                return path_name(key_path_names(path))
        return None

    def restore(self, state: State) -> None:
        """Replace the state by a saved one, of any mesh. Its arrays are donated to the next step."""
        self.state = state if self.mesh is None else self._programs.reset_padding_labels(state)

    def epoch(
        self, batches: Any, epoch: int, learning_rate: Callable[[int], float], *, first: int = 0
    ) -> Iterator[jax.Array]:
        """Train for one epoch or its remaining steps, and yield the loss of each step.

        Args:
          batches: the training points: a `Batches`, or any object with a method `shuffled(seed, epoch,
            first=)`.
          epoch: number of the epoch, from 0; with the seed it determines the order of the points.
          learning_rate: function from the number of a step within the epoch, from 0, to the learning rate of
            this step.
          first: number of steps of this epoch already taken.
        """
        for i, batch in enumerate(batches.shuffled(self.seed, epoch, first=first), start=first):
            # Rewiring follows at the start of the next epoch, not before validation: new connections start at
            # 0, and need training to be of use.
            if self.config.rewire_interval == -1 and epoch > 0 and i == 0:
                self.rewire(batch)
            yield self.train_step(batch, learning_rate(i))


class _Programs(NamedTuple):
    """The compiled methods of a `Step`. Each takes a state, which is donated, and further arguments."""

    train: Any
    rewire: Any
    reset_padding_labels: Any


def _compile(step: Step, state: Any = None, loss: Any = None) -> _Programs:
    """Compile the methods of a step.

    Args:
      step: the step.
      state: shardings of the returned states; None for those that XLA chooses.
      loss: sharding of the returned losses.
    """
    train_results = None if state is None else (state, loss)
    return _Programs(
        jax.jit(step.train, donate_argnums=0, out_shardings=train_results),
        jax.jit(step.rewire, donate_argnums=0, out_shardings=state),
        jax.jit(step.reset_padding_labels, donate_argnums=0, out_shardings=state),
    )


@functools.lru_cache(maxsize=2)  # Older programs are freed with the last trainer that uses them.
def _shared_programs(step: Step) -> _Programs:
    """Return the compiled methods of a step; equal steps share them, for example when planning memory."""
    return _compile(step)


_ADAMW_DEFAULTS = {"encoder_lr_multiplier": 1, "encoder_warmup": 0, "encoder_weight_decay": 0}


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(array).all() for array in arrays]


@functools.lru_cache(maxsize=16)  # Equal settings must give the same object, so that programs are shared.
def _adamw(config: TrainingConfig) -> optax.GradientTransformation:
    """Return the default optimizer of the encoder, AdamW. Biases and scales do not decay.

    Reference: Loshchilov & Hutter, Decoupled weight decay regularization, ICLR 2019.
    """
    rate = config.learning_rate * config.encoder_lr_multiplier
    warmup = config.encoder_warmup
    return optax.adamw(
        optax.linear_schedule(rate / (1 + warmup), rate, warmup) if warmup else rate,
        mu_dtype=config.moment_dtype,
        weight_decay=config.encoder_weight_decay,
        mask=lambda params: jax.tree.map(lambda parameter: parameter.ndim > 1, params),
    )
