"""The training loop: epochs, validation, schedule, stopping, checkpoints, callbacks."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparse_xmc.data.batches import Batches
from sparse_xmc.data.dataset import Dataset
from sparse_xmc.evaluation import evaluate
from sparse_xmc.mesh import local_rows
from sparse_xmc.train.callbacks import Callback
from sparse_xmc.train.checkpoints import Checkpoints
from sparse_xmc.train.schedules import SCHEDULES
from sparse_xmc.train.trainer import Trainer

# Number of steps whose losses may be pending. JAX runs steps asynchronously; waiting for the loss of an
# earlier step bounds the number of queued batches without letting the device idle.
_MAX_PENDING = 10
# Number of steps after which several processes agree on whether to save or to stop, because this takes a
# collective operation.
_STEPS_TO_AGREE = 100


class Stopped(Exception):
    """The exception raised by `fit` when training has stopped because `should_stop` returned true.

    Attributes:
      epoch: number of the epoch in which training stopped, from 1.
      step: number of the last step taken in this epoch, from 1.
      directory: where the state was saved, or None if there were no checkpoints.
    """

    def __init__(self, epoch: int, step: int, directory: Path | None):
        where = "nothing was saved" if directory is None else f"saved in {directory}"
        super().__init__(f"stopped after step {step} of epoch {epoch}; {where}")
        self.epoch, self.step, self.directory = epoch, step, directory


@dataclasses.dataclass
class _EpochTotals:
    """Totals of the steps of the current epoch whose losses are known. Checkpoints contain them.

    Attributes:
      steps: number of these steps.
      loss: sum of their losses.
      seconds: their time.
    """

    steps: int = 0
    loss: float = 0.0
    seconds: float = 0.0


def fit(
    trainer: Trainer,
    train: Dataset,
    validation: Dataset | None = None,
    *,
    checkpoints: Checkpoints | None = None,
    checkpoint_minutes: float = 10.0,
    should_stop: Callable[[], bool] = lambda: False,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, Any]]:
    """Train a classifier until the schedule ends, resuming from the latest checkpoint if there is one.

    Args:
      trainer: trainer of the classifier; `trainer.model` is the trained classifier afterwards.
      train: the training points.
      validation: points to evaluate on after each epoch; None only for schedules that need no validation,
        such as "linear".
      checkpoints: where to save and resume; required by schedules that end with the best weights.
      checkpoint_minutes: the whole state is saved whenever this many minutes have passed, also within epochs.
      should_stop: function called after each step; training stops when it returns true. With several
        processes it is called every 100 steps and after each epoch, and training stops when it is true in any
        of them.
      callbacks: called in this order.

    Returns:
      A record for each epoch: "epoch" (from 1), "loss" (the mean over its steps), "seconds" (of its steps),
      "learning_rate" (at its start), the metrics on the validation points, and the entries of callbacks.

    Raises:
      ValueError: there are no points; the schedule needs validation points or checkpoints; or the latest
        checkpoint is of a run with other settings. A higher number of epochs is allowed if the schedule can
        continue.
      FloatingPointError: the loss is not finite, or a weight is not finite before a checkpoint. The message
        names the step, the array, and the points whose inputs are not finite. Checkpoints contain only finite
        values.
      Stopped: `should_stop` returned true; the state after the last step has been saved.
    """
    loop = _Loop(trainer, train, validation, checkpoints, checkpoint_minutes, should_stop, callbacks)
    return loop.run()


class _Loop:
    """A run of `fit`, with the same arguments. Each method is above the ones that it calls."""

    def __init__(
        self,
        trainer: Trainer,
        train: Dataset,
        validation: Dataset | None,
        checkpoints: Checkpoints | None,
        checkpoint_minutes: float,
        should_stop: Callable[[], bool],
        callbacks: Sequence[Callback],
    ):
        config = trainer.config
        for name, points in (("train", train), ("validation", validation)):
            if points is not None and not len(points):
                raise ValueError(f"{name} must have at least one point, got none")
        self._schedule = SCHEDULES[config.schedule].start(config.learning_rate, config.epochs)
        if self._schedule.keeps_best and (validation is None or checkpoints is None):
            raise ValueError(
                f"schedule {config.schedule!r} ends with the weights of the best epoch: give validation "
                "points and checkpoints, or another schedule"
            )
        self._trainer = trainer
        self._config = config
        self._batches = Batches(train, config.batch_size, local_rows=local_rows(trainer.mesh))
        self._validation = validation
        self._checkpoints = checkpoints
        self._checkpoint_seconds = 60 * checkpoint_minutes
        self._should_stop = should_stop
        self._callbacks = callbacks
        # Everything that determines the result of the run; a checkpoint of another run is rejected.
        self._identity = {"seed": trainer.seed, "data": train.fingerprint(), **dataclasses.asdict(config)}
        self._records: list[dict[str, Any]] = []
        self._totals = _EpochTotals()
        self._pending: collections.deque[jax.Array] = collections.deque()  # losses of the last steps
        self._timed_until = self._saved_at = time.monotonic()

    def run(self) -> list[dict[str, Any]]:
        """Train until the schedule ends, and return the records of all epochs."""
        if self._checkpoints:
            self._resume(self._checkpoints)
        while len(self._records) < self._config.epochs and not self._schedule.should_stop:
            self._run_epoch()
            is_last = len(self._records) == self._config.epochs
            # The end of the run is saved if a run with more epochs can continue from there.
            self._checkpoint_or_stop(save=is_last and self._schedule.can_go_on)
        if self._checkpoints and self._schedule.keeps_best:
            self._checkpoints.restore_best(self._trainer)
        return self._records

    def _resume(self, checkpoints: Checkpoints) -> None:
        """Restore the state from the latest checkpoint, if there is one."""
        progress = checkpoints.restore_latest(self._trainer)
        if progress is None:
            return
        identity, saved = self._identity, progress["run"]
        if self._schedule.can_go_on:  # The number of epochs may be raised, but not lowered.
            saved["epochs"] = max(self._config.epochs, saved["epochs"])
        if different := sorted(name for name in identity if identity[name] != saved.get(name)):
            was, now = ({name: run.get(name) for name in different} for run in (saved, identity))
            raise ValueError(f"the checkpoint is of a run with {was}, not {now}; choose another directory")
        self._records, self._totals = progress["records"], _EpochTotals(**progress["part"])
        self._schedule = type(self._schedule)(**progress["schedule"])
        if self._schedule.keeps_best and self._records and checkpoints.replace_lost_best(self._trainer):
            self._schedule.forget_best()

    def _run_epoch(self) -> None:
        """Train the remaining steps of the current epoch, validate, and append the epoch's record."""
        epoch = len(self._records)
        for callback in self._callbacks:
            callback.on_epoch_start(self._trainer, self._batches, epoch)
        self._run_steps(epoch)
        record = {
            "epoch": epoch + 1,
            "loss": self._totals.loss / self._totals.steps,
            "seconds": self._totals.seconds,
            "learning_rate": self._schedule.rate(epoch),
        }
        if self._validation is not None:
            record |= evaluate(self._trainer.model, self._validation, batch_size=self._config.batch_size)
            self._schedule.update(record["p@3"])
        self._records.append(record)
        self._totals = _EpochTotals()
        for callback in self._callbacks:
            callback.on_epoch_end(self._trainer, self._batches, self._records)
        if self._checkpoints and self._schedule.is_best:
            self._checkpoints.save_best(self._trainer)

    def _run_steps(self, epoch: int) -> None:
        """Train the remaining steps of an epoch."""
        steps_per_epoch, first = self._batches.steps_per_epoch, self._totals.steps

        def learning_rate(step: int) -> float:
            return self._schedule.rate(epoch + step / steps_per_epoch)

        self._timed_until = time.monotonic()
        losses = self._trainer.epoch(self._batches, epoch, learning_rate, first=first)
        for step, loss in enumerate(losses, start=first + 1):
            self._pending.append(loss)
            for callback in self._callbacks:
                callback.on_step(self._trainer, loss)
            self._wait_for_losses(_MAX_PENDING)
            if jax.process_count() == 1 or step % _STEPS_TO_AGREE == 0:
                self._checkpoint_or_stop()
        self._wait_for_losses()

    def _wait_for_losses(self, max_pending: int = 0) -> None:
        """Wait until at most `max_pending` losses are pending, and add the others to the epoch's totals."""
        totals = self._totals
        while len(self._pending) > max_pending:
            loss = float(self._pending.popleft())
            if not math.isfinite(loss):
                raise FloatingPointError(self._describe_not_finite(loss))
            now = time.monotonic()
            totals.steps += 1
            totals.loss += loss
            totals.seconds += now - self._timed_until
            self._timed_until = now

    def _describe_not_finite(self, loss: float) -> str:
        """Return the error message for a loss that is not finite, of the step after `_totals.steps`."""
        epoch, step = len(self._records), self._totals.steps
        where = f"the loss is {loss} at step {step + 1} of epoch {epoch + 1}; training has stopped"
        rows = self._batches.rows_not_finite(self._trainer.seed, epoch, step)
        if not rows.size:
            return f"{where}. The inputs are finite: is the learning rate too high?"
        more = "" if rows.size <= 10 else f" and {rows.size - 10} more"
        return f"{where}. Not finite are the inputs of points {', '.join(map(str, rows[:10]))}{more}"

    def _checkpoint_or_stop(self, *, save: bool = False) -> None:
        """Save a checkpoint if one is due or training is to stop, once no loss is pending.

        Args:
          save: save a checkpoint even if none is due.

        Raises:
          Stopped: `should_stop` returned true.
        """
        is_due = save or time.monotonic() - self._saved_at > self._checkpoint_seconds
        stop, save = _in_any_process(self._should_stop(), self._checkpoints is not None and is_due)
        if not (stop or save):
            return
        self._wait_for_losses()
        if self._checkpoints is not None:
            self._save(self._checkpoints)
        if stop:
            epoch, step = len(self._records) + 1, self._totals.steps
            if step == 0:
                epoch, step = epoch - 1, self._batches.steps_per_epoch
            raise Stopped(epoch, step, None if self._checkpoints is None else self._checkpoints.directory)

    def _save(self, checkpoints: Checkpoints) -> None:
        """Save a checkpoint. The time that it takes does not count as training time."""
        if name := self._trainer.array_not_finite():
            raise FloatingPointError(
                f"{name} is not finite after step {self._trainer.step}; training has stopped"
            )
        progress = {
            "records": self._records,
            "schedule": self._schedule.state(),
            "run": self._identity,
            "part": dataclasses.asdict(self._totals),
        }
        checkpoints.save_latest(self._trainer, progress)
        self._timed_until = self._saved_at = time.monotonic()


def _in_any_process(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is set in any process; the result is equal in all processes."""
    if jax.process_count() == 1:
        return flags
    return tuple(bool(any_of) for any_of in multihost_utils.process_allgather(np.array(flags)).any(axis=0))
