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

_STEPS_UNDER_WAY = 10
_STEPS_TO_AGREE = 100  # Number of steps after which all processes agree on whether to save or to stop.


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
class _Part:
    """The completed part of an epoch: number of steps, sum of their losses, and their time in seconds."""

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
    config = trainer.config
    for name, points in (("train", train), ("validation", validation)):
        if points is not None and not len(points):
            raise ValueError(f"{name} must have at least one point, got none")
    schedule = SCHEDULES[config.schedule].start(config.learning_rate, config.epochs)
    if schedule.keeps_best and (validation is None or checkpoints is None):
        raise ValueError(
            f"schedule {config.schedule!r} ends with the weights of the best epoch: give validation points "
            "and checkpoints, or another schedule"
        )
    batches = Batches(train, config.batch_size, local_rows=local_rows(trainer.mesh))
    records: list[dict[str, Any]] = []
    part = _Part()
    run = {"seed": trainer.seed, "data": train.fingerprint(), **dataclasses.asdict(config)}
    if checkpoints and (progress := checkpoints.restore_latest(trainer)):
        theirs = progress["run"]
        if schedule.can_go_on:  # The number of epochs may be raised, but not lowered.
            theirs["epochs"] = max(config.epochs, theirs["epochs"])
        if different := sorted(name for name in run if run[name] != theirs.get(name)):
            was, now = ({name: of.get(name) for name in different} for of in (theirs, run))
            raise ValueError(f"the checkpoint is of a run with {was}, not {now}; choose another directory")
        records, part = progress["records"], _Part(**progress["part"])
        schedule = SCHEDULES[config.schedule](**progress["schedule"])
        if schedule.keeps_best and records and checkpoints.replace_lost_best(trainer):
            schedule.forget_best()
    saved = time.monotonic()

    def pause(settle: Callable[[], None], agree: bool = True, at_end: bool = False) -> bool:
        """Save a checkpoint or stops training if it is due, after all running steps have been settled.

        Args:
          settle: waits for all running steps.
          agree: whether to decide now; all processes must pass the same value.
          at_end: save regardless of the time passed.

        Returns:
          Whether a checkpoint was due. `Stopped` is raised instead of returning if training is to stop.
        """
        nonlocal saved
        is_time = at_end or time.monotonic() - saved > 60 * checkpoint_minutes
        late = checkpoints is not None and is_time
        stop, save = _of_any_process(should_stop(), late) if agree else (False, False)
        if not (stop or save):
            return False
        settle()
        if checkpoints is not None:
            if name := trainer.array_not_finite():
                raise FloatingPointError(
                    f"{name} is not finite after step {trainer.step}; training has stopped"
                )
            progress = {"records": records, "schedule": schedule.state(), "run": run}
            checkpoints.save_latest(trainer, progress | {"part": dataclasses.asdict(part)})
            saved = time.monotonic()
        if stop:
            epoch, step = (
                (len(records) + 1, part.steps) if part.steps else (len(records), batches.steps_per_epoch)
            )
            raise Stopped(epoch, step, None if checkpoints is None else checkpoints.directory)
        return True

    while len(records) < config.epochs and not schedule.should_stop:
        epoch = len(records)
        for callback in callbacks:
            callback.on_epoch_start(trainer, batches, epoch)

        def learning_rate(step, epoch=epoch, schedule=schedule):
            return schedule.rate(epoch + step / batches.steps_per_epoch)

        _train_epoch(trainer, batches, epoch, part, learning_rate, callbacks, pause)
        record = {
            "epoch": epoch + 1,
            "loss": part.loss / part.steps,
            "seconds": part.seconds,
            "learning_rate": learning_rate(0),
        }
        if validation is not None:
            record |= evaluate(trainer.model, validation, batch_size=config.batch_size)
            schedule.update(record["p@3"])
        records.append(record)
        part = _Part()
        for callback in callbacks:
            callback.on_epoch_end(trainer, batches, records)
        if checkpoints and schedule.is_best:
            checkpoints.save_best(trainer)
        pause(lambda: None, at_end=schedule.can_go_on and len(records) == config.epochs)

    if checkpoints and schedule.keeps_best:
        checkpoints.restore_best(trainer)
    return records


def _train_epoch(
    trainer: Trainer, batches: Batches, epoch: int, part: _Part, learning_rate, callbacks, pause
) -> None:
    """Train the remaining steps of an epoch, and add them to `part`."""
    under_way: collections.deque[jax.Array] = collections.deque()
    start = time.monotonic()

    def settle(left: int = 0) -> None:
        """Wait for all running steps except the last `left`, and add their losses to `part`."""
        nonlocal start
        while len(under_way) > left:
            loss = float(under_way.popleft())
            if not math.isfinite(loss):
                raise FloatingPointError(_not_finite(loss, trainer, batches, epoch, part.steps))
            part.loss += loss
            part.steps += 1
        now = time.monotonic()
        part.seconds, start = part.seconds + now - start, now

    for loss in trainer.epoch(batches, epoch, learning_rate, first=part.steps):
        under_way.append(loss)
        for callback in callbacks:
            callback.on_step(trainer, loss)
        # Waiting for the loss of some steps ago bounds the queue without emptying it.
        settle(_STEPS_UNDER_WAY)
        is_one = jax.process_count() == 1
        if pause(settle, agree=is_one or (part.steps + len(under_way)) % _STEPS_TO_AGREE == 0):
            start = time.monotonic()
    settle()


def _not_finite(loss: float, trainer: Trainer, batches: Batches, epoch: int, step: int) -> str:
    where = f"the loss is {loss} at step {step + 1} of epoch {epoch + 1}; training has stopped"
    rows = batches.rows_not_finite(trainer.seed, epoch, step)
    if not rows.size:
        return f"{where}. The inputs are finite: is the learning rate too high?"
    more = "" if rows.size <= 10 else f" and {rows.size - 10} more"
    return f"{where}. Not finite are the inputs of points {', '.join(map(str, rows[:10]))}{more}"


def _of_any_process(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is set in any process; the result is equal in all processes."""
    if jax.process_count() == 1:
        return flags
    return tuple(bool(any_of) for any_of in multihost_utils.process_allgather(np.array(flags)).any(axis=0))
