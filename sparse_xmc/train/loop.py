"""The training loop: epochs, validation, schedule, stopping, checkpoints, callbacks."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sparse_xmc.data.batches import Batches
from sparse_xmc.data.formats import Dataset
from sparse_xmc.evaluation import evaluate
from sparse_xmc.mesh import own_rows
from sparse_xmc.train.callbacks import Callback
from sparse_xmc.train.checkpoints import Checkpoints
from sparse_xmc.train.schedules import SCHEDULES
from sparse_xmc.train.trainer import Trainer

_STEPS_UNDER_WAY = 10


def fit(
    trainer: Trainer,
    train: Dataset,
    validation: Dataset | None = None,
    *,
    checkpoints: Checkpoints | None = None,
    checkpoint_minutes: float = 10.0,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, Any]]:
    """Trains until the schedule ends, or goes on from the latest checkpoint until then.

    Args:
      trainer: with the classifier; `trainer.model` is the trained one afterwards.
      train: the training points.
      validation: points to validate on after each epoch; without them the schedule must be one that needs
        none, such as "linear".
      checkpoints: where to save to and go on from; a schedule that keeps the best weights needs them.
      checkpoint_minutes: save the whole state when an epoch ends and this much time has passed.
      callbacks: called in this order.

    Returns:
      A record for each epoch: "epoch" (from 1), "loss" (the mean over its steps), "seconds" (of its steps),
      "learning_rate" (at its start), the metrics on the validation points, and what callbacks entered.

    Raises:
      ValueError: the schedule needs validation points or checkpoints, or the latest checkpoint is of a run
        with other settings.
      FloatingPointError: the loss is not finite; the message says where.
    """
    config = trainer.config
    schedule = SCHEDULES[config.schedule].start(config.learning_rate, config.epochs)
    if schedule.keeps_best and (validation is None or checkpoints is None):
        raise ValueError(
            f"schedule {config.schedule!r} ends with the weights of the best epoch: give validation points "
            "and checkpoints, or another schedule"
        )
    batches = Batches(train, config.batch_size, own_rows=own_rows(trainer.mesh))
    records: list[dict[str, Any]] = []
    run = {"seed": trainer.seed, **dataclasses.asdict(config)}
    if checkpoints and (progress := checkpoints.restore_latest(trainer)):
        if different := sorted(name for name in run if run[name] != progress["run"].get(name)):
            was, now = ({name: of[name] for name in different} for of in (progress["run"], run))
            raise ValueError(f"the checkpoint is of a run with {was}, not {now}; choose another directory")
        records = progress["records"]
        schedule = SCHEDULES[config.schedule](**progress["schedule"])
    saved = time.monotonic()

    while len(records) < config.epochs and not schedule.should_stop:
        epoch = len(records)
        for callback in callbacks:
            callback.on_epoch_start(trainer, batches, epoch)

        def learning_rate(step, epoch=epoch, schedule=schedule):
            return schedule.rate(epoch + step / batches.steps_per_epoch)

        start = time.monotonic()
        loss = _train_epoch(trainer, batches, epoch, learning_rate, callbacks)
        record = {
            "epoch": epoch + 1,
            "loss": loss,
            "seconds": time.monotonic() - start,
            "learning_rate": learning_rate(0),
        }
        if validation is not None:
            record |= evaluate(trainer.model, validation, batch_size=config.batch_size)
            schedule.update(record["p@3"])
        records.append(record)
        for callback in callbacks:
            callback.on_epoch_end(trainer, batches, records)
        if checkpoints and schedule.is_best:
            checkpoints.save_best(trainer)
        if checkpoints and time.monotonic() - saved > 60 * checkpoint_minutes:
            progress = {"records": records, "schedule": schedule.state(), "run": run}
            checkpoints.save_latest(trainer, progress)
            saved = time.monotonic()

    if checkpoints and schedule.keeps_best:
        checkpoints.restore_best(trainer)
    return records


def _train_epoch(trainer: Trainer, batches: Batches, epoch: int, learning_rate, callbacks) -> float:
    """Trains one epoch; returns the mean loss."""
    losses: list[jax.Array | float] = []
    for loss in trainer.epoch(batches, epoch, learning_rate):
        losses.append(loss)
        for callback in callbacks:
            callback.on_step(trainer, loss)
        # Waiting for the loss of some steps ago bounds the queue without emptying it.
        if len(losses) > _STEPS_UNDER_WAY:
            losses[-1 - _STEPS_UNDER_WAY] = _finite(losses, -1 - _STEPS_UNDER_WAY, epoch)
    return float(np.mean([_finite(losses, i, epoch) for i in range(len(losses))]))


def _finite(losses: list[jax.Array | float], i: int, epoch: int) -> float:
    loss = float(losses[i])
    if not math.isfinite(loss):
        step = (i % len(losses)) + 1
        raise FloatingPointError(
            f"the loss is {loss} at step {step} of epoch {epoch + 1}; training has stopped"
        )
    return loss
