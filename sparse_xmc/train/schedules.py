"""Learning-rate schedules, which also decide when training ends.

To add one, write a subclass of `Schedule` here and add it to `SCHEDULES`.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar


class Schedule(abc.ABC):
    """Base class of learning-rate schedules. Subclasses are dataclasses whose fields are their state.

    Attributes:
      keeps_best: whether training ends with the weights of the best epoch instead of the last weights.
      can_go_on: whether a finished run can be continued with a higher number of epochs, with the same result
        as if that number had been given from the start.
    """

    keeps_best: ClassVar[bool]
    can_go_on: ClassVar[bool]

    @classmethod
    @abc.abstractmethod
    def start(cls, learning_rate: float, epochs: int) -> "Schedule":
        """Return the schedule before the first epoch.

        Args:
          learning_rate: the base learning rate, from the configuration.
          epochs: maximum number of epochs.
        """

    def state(self) -> dict[str, Any]:
        """Return the constructor arguments that restore this state, serializable as JSON."""
        return dict(vars(self))

    @abc.abstractmethod
    def rate(self, progress: float) -> float:
        """Return the learning rate of a step, before the multipliers of the layers.

        Args:
          progress: number of epochs trained so far, with the current one as a fraction.
        """

    def update(self, metric: float) -> None:  # noqa: B027 (not every schedule asks)
        """Update the schedule at the end of an epoch.

        Args:
          metric: P@3 on the validation points.
        """

    def forget_best(self) -> None:  # noqa: B027
        """Make the next epoch count as the best so far, because the best weights have been lost."""

    @property
    def should_stop(self) -> bool:
        """Whether training should stop before the maximum number of epochs."""
        return False

    @property
    def is_best(self) -> bool:
        """Whether the last epoch passed to `update` is the best so far."""
        return False


@dataclasses.dataclass
class Plateau(Schedule):
    """Schedule that halves the learning rate on a plateau and stops early, as in the paper.

    It uses P@3 on the validation points: the learning rate is halved after 2 epochs without an improvement of
    1e-3, down to 1e-4, and training stops after 4 epochs without an improvement of 5e-5.

    Attributes:
      learning_rate: the current learning rate.
      best: the best metric so far.
      epochs_since_best: number of epochs since then.
      best_for_halving: the best metric so far by the threshold for halving.
      epochs_since_halving: number of epochs since then, or since the last halving.
    """

    keeps_best: ClassVar[bool] = True
    can_go_on: ClassVar[bool] = True

    learning_rate: float
    best: float = -math.inf
    epochs_since_best: int = 0
    best_for_halving: float = -math.inf
    epochs_since_halving: int = 0

    @classmethod
    def start(cls, learning_rate: float, epochs: int) -> "Plateau":
        """Return the schedule before the first epoch; `epochs` is not used."""
        return cls(learning_rate)

    def rate(self, progress: float) -> float:
        """Return the current learning rate, which is constant within an epoch."""
        return self.learning_rate

    def update(self, metric: float) -> None:
        """Update the learning rate and the best metric at the end of an epoch."""
        if metric > self.best + 5e-5:
            self.best, self.epochs_since_best = metric, 0
        else:
            self.epochs_since_best += 1
        if metric > self.best_for_halving + 1e-3:
            self.best_for_halving, self.epochs_since_halving = metric, 0
            return
        self.epochs_since_halving += 1
        if self.epochs_since_halving >= 2:
            self.learning_rate = max(self.learning_rate / 2, min(self.learning_rate, 1e-4))
            self.epochs_since_halving = 0

    def forget_best(self) -> None:
        """Make the next epoch count as the best so far."""
        self.best = -math.inf

    @property
    def should_stop(self) -> bool:
        """Whether 4 epochs have passed without an improvement of 5e-5."""
        return self.epochs_since_best >= 4

    @property
    def is_best(self) -> bool:
        """Whether the last epoch was an improvement of 5e-5."""
        return self.epochs_since_best == 0


@dataclasses.dataclass
class Linear(Schedule):
    """Schedule that lowers the learning rate linearly to 0 over all epochs.

    Attributes:
      learning_rate: learning rate at the start.
      epochs: number of epochs after which the learning rate is 0.
    """

    keeps_best: ClassVar[bool] = False
    can_go_on: ClassVar[bool] = False

    learning_rate: float
    epochs: int

    @classmethod
    def start(cls, learning_rate: float, epochs: int) -> "Linear":
        """Return the schedule before the first epoch."""
        return cls(learning_rate, epochs)

    def rate(self, progress: float) -> float:
        """Return the learning rate after `progress` epochs."""
        return self.learning_rate * (1 - progress / self.epochs)


SCHEDULES: dict[str, type[Schedule]] = {"plateau": Plateau, "linear": Linear}
