"""The training loop: steps, rewiring, learning rate, early stopping."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from sparse_xmc.data.batches import Batch, Batches
from sparse_xmc.layers import FixedFanInLinear
from sparse_xmc.losses import LOSSES
from sparse_xmc.models import Classifier
from sparse_xmc.rewire import RewireConfig
from sparse_xmc.steps import (
    init_in_place,
    init_optax,
    rewire_in_place,
    rewire_optax,
    step_in_place,
    step_optax,
)
from sparse_xmc.unstructured import UnstructuredLinear

# The paper's framework adds this to the root of the second moment; Optax's default is 1e-8. Gradients of a
# mean over 10^5 labels are as small as that.
PAPER_EPSILON = 1e-7

SCHEDULES = ("plateau", "linear")
OPTIMIZERS = ("adam", "sgd")
MOMENTS = ("float32", "bfloat16", "factored")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a classifier is trained.

    Attributes:
      epochs: the most epochs to train.
      batch_size: B.
      loss: one of `sparse_xmc.losses.LOSSES`.
      learning_rate: Adam's, at the start.
      embedding_rate: the embedding of words learns at this times the learning rate, by Adagrad: a row moves
        by this much at its word's first use, and by less at each further one.
      penultimate_rate: the penultimate layer learns at this times the learning rate; its weights are small.
      output_rate: the output layer learns at this times the learning rate.
      output_optimizer: "adam", or "sgd" without momentum, which keeps no moments, and on a CPU rounds
        bfloat16 weights stochastically. SGD follows the sum of the losses over batch and labels, not the
        mean, so that its rate depends on neither's number.
      moments: what Adam keeps of the penultimate layer: both moments in "float32" or in "bfloat16", the
        second rounded stochastically (by Optax, on a GPU, only the first in bfloat16); or "factored": no
        first moment, and of the second the means of rows and columns, as `optax.scale_by_factored_rms`.
      epsilon: Adam's.
      schedule: "plateau" halves the learning rate when validation P@3 has not improved by 1e-3 for 2 epochs,
        down to 1e-4, and stops after 4 epochs without an improvement of 5e-5; "linear" lowers it evenly to 0
        over all `epochs`. The first ends with the weights of the epoch with the best validation P@3, the
        second with the last.
      rewire: which connections a rewiring moves, and how; None for never.
      rewire_interval: after how many steps a rewiring follows (the first after step 1); -1 for once an epoch.
        With `active` growth only labels of the step's batch are rewired, so that it is short, 20 say.
    """

    epochs: int = 100
    batch_size: int = 32
    loss: str = "squared_hinge"
    learning_rate: float = 1e-3
    embedding_rate: float = 1.0
    penultimate_rate: float = 1.0
    output_rate: float = 1.0
    output_optimizer: str = "adam"
    moments: str = "float32"
    epsilon: float = PAPER_EPSILON
    schedule: str = "plateau"
    rewire: RewireConfig | None = RewireConfig()
    rewire_interval: int = 1000

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        choices = {
            "loss": LOSSES,
            "schedule": SCHEDULES,
            "output_optimizer": OPTIMIZERS,
            "moments": MOMENTS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.rewire_interval < 1 and self.rewire_interval != -1:
            raise ValueError(
                f"rewire_interval must be positive, or -1 for once an epoch, got {self.rewire_interval}"
            )


@dataclasses.dataclass
class Plateau:
    """Halving the learning rate and stopping early, as the paper does by P@3 on the validation points.

    Attributes:
      learning_rate: the present one.
      best: the best metric so far.
    """

    learning_rate: float
    best: float = -np.inf
    epochs_since_best: int = 0
    _best_for_halving: float = -np.inf
    _epochs_since_halving: int = 0

    def update(self, metric: float) -> None:
        """Takes the metric at the end of an epoch."""
        if metric > self.best + 5e-5:
            self.best, self.epochs_since_best = metric, 0
        else:
            self.epochs_since_best += 1
        if metric > self._best_for_halving + 1e-3:
            self._best_for_halving, self._epochs_since_halving = metric, 0
            return
        self._epochs_since_halving += 1
        if self._epochs_since_halving >= 2:
            self.learning_rate = max(self.learning_rate / 2, min(self.learning_rate, 1e-4))
            self._epochs_since_halving = 0

    @property
    def should_stop(self) -> bool:
        """Whether 4 epochs have passed without an improvement."""
        return self.epochs_since_best >= 4


class Trainer:
    """Trains a `Classifier` in place of its initial weights.

    Args:
      model: the classifier; its arrays are donated to the first step, so use `Trainer.model` afterwards.
      config: how to train.
      seed: of the order of the points and of rewiring.

    Attributes:
      state: all that changes: parameters, connectivity, random state, moments. A pytree.
      step: the number of steps taken.
    """

    def __init__(self, model: Classifier, config: TrainingConfig, *, seed: int):
        self.config = config
        self.seed = seed
        self.step = 0
        if isinstance(model.output, FixedFanInLinear) and jax.default_backend() == "cpu":
            init, step, rewire = init_in_place, step_in_place, rewire_in_place
        else:
            init, step, rewire = init_optax, step_optax, rewire_optax
        self._graphdef, params, other = nnx.split(model, nnx.Param, ...)
        self.state = init(config, params, other)
        self._train_step = jax.jit(functools.partial(step, self._graphdef, config, seed), donate_argnums=0)
        self._rewires = config.rewire is not None and not isinstance(model.output, nnx.Linear)
        unstructured = isinstance(model.output, UnstructuredLinear)
        if unstructured and self._rewires and config.rewire.growth != "random":
            raise ValueError(f"unstructured layers grow at random, got growth={config.rewire.growth!r}")
        self._rewire = jax.jit(functools.partial(rewire, self._graphdef, config), donate_argnums=0)

    @property
    def model(self) -> Classifier:
        """The classifier with the present weights."""
        return nnx.merge(self._graphdef, self.state["params"], self.state["other"])

    def train_step(self, batch: Batch, learning_rate: float) -> jax.Array:
        """One step, and the rewiring that falls due after it. Returns the loss (not waited for)."""
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
        """Moves connections of the output layer now, if it has any and the configuration says so.

        Args:
          batch: the points that show where they move, if growth is `active`.
        """
        if self._rewires:
            key = jax.random.fold_in(jax.random.key(self.seed), self.step)
            self.state = self._rewire(self.state, batch, key)

    def epoch(
        self, batches: Batches, epoch: int, learning_rate: Callable[[int], float]
    ) -> Iterator[jax.Array]:
        """Trains for one epoch, yielding each step's loss.

        Args:
          batches: the training points.
          epoch: the epoch's number, from 0; with the seed it fixes the order of the points.
          learning_rate: from a step's number within the epoch.
        """
        for i, batch in enumerate(batches.shuffled(self.seed, epoch)):
            # Not at an epoch's end: what is evaluated has had time to use its connections.
            if self.config.rewire_interval == -1 and epoch > 0 and i == 0:
                self.rewire(batch)
            yield self.train_step(batch, learning_rate(i))
