"""How the learning rate falls, and when training ends. A new one is a class here and a line below."""

import abc
import dataclasses
import math
from typing import Any, ClassVar


class Schedule(abc.ABC):
    """The learning rate over the epochs. Subclasses are dataclasses: their fields are their state.

    Attributes:
      keeps_best: whether training ends with the weights of the best epoch, in place of the last.
      can_go_on: whether epochs after the last are what they would be had they been planned from the start.
    """

    keeps_best: ClassVar[bool]
    can_go_on: ClassVar[bool]

    @classmethod
    @abc.abstractmethod
    def start(cls, learning_rate: float, epochs: int) -> "Schedule":
        """Before the first epoch."""

    def state(self) -> dict[str, Any]:
        """For JSON; the arguments of the class that go on from here."""
        return dict(vars(self))

    @abc.abstractmethod
    def rate(self, progress: float) -> float:
        """The learning rate after so many epochs, of which a step is a fraction."""

    def update(self, metric: float) -> None:  # noqa: B027 (not every schedule asks)
        """Takes the validation P@3 at the end of an epoch."""

    def forget_best(self) -> None:  # noqa: B027
        """Has the next epoch count as the best so far, as the weights of the best are lost."""

    @property
    def should_stop(self) -> bool:
        """Whether to train no further."""
        return False

    @property
    def is_best(self) -> bool:
        """Whether the epoch of the last update is the best so far."""
        return False


@dataclasses.dataclass
class Plateau(Schedule):
    """Halving the learning rate and stopping early, as the paper does by P@3 on the validation points.

    Attributes:
      learning_rate: the present one.
      best: the best metric so far.
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
        """Before the first epoch."""
        return cls(learning_rate)

    def rate(self, progress: float) -> float:
        """The same through an epoch."""
        return self.learning_rate

    def update(self, metric: float) -> None:
        """Takes the metric at the end of an epoch."""
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
        """Has the next epoch count as the best so far."""
        self.best = -math.inf

    @property
    def should_stop(self) -> bool:
        """Whether 4 epochs have passed without an improvement."""
        return self.epochs_since_best >= 4

    @property
    def is_best(self) -> bool:
        """Whether the last epoch was an improvement."""
        return self.epochs_since_best == 0


@dataclasses.dataclass
class Linear(Schedule):
    """A learning rate that falls evenly to 0 over all epochs.

    Attributes:
      learning_rate: at the start.
      epochs: after how many it is 0.
    """

    keeps_best: ClassVar[bool] = False
    can_go_on: ClassVar[bool] = False

    learning_rate: float
    epochs: int

    @classmethod
    def start(cls, learning_rate: float, epochs: int) -> "Linear":
        """Before the first epoch."""
        return cls(learning_rate, epochs)

    def rate(self, progress: float) -> float:
        """What is left after so many epochs."""
        return self.learning_rate * (1 - progress / self.epochs)


SCHEDULES: dict[str, type[Schedule]] = {"plateau": Plateau, "linear": Linear}
