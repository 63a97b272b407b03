"""Callbacks of the training loop: a progress bar, a record file, the density of gradients."""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from sparse_xmc.data.files import write_text
from sparse_xmc.evaluation import gradient_density
from sparse_xmc.train.trainer import Trainer


class Callback:
    """Base class of the callbacks of `fit`. Every method does nothing by default; override any of them."""

    def on_epoch_start(self, trainer: Trainer, batches: Any, epoch: int) -> None:
        """Called before the first step of an epoch.

        Args:
          trainer: the trainer.
          batches: the training points, as `Batches`.
          epoch: number of the epoch, from 0.
        """

    def on_step(self, trainer: Trainer, loss: jax.Array) -> None:
        """Called after each step.

        Args:
          trainer: the trainer.
          loss: float32 scalar, the loss of the step. Reading its value blocks until the step has run.
        """

    def on_epoch_end(self, trainer: Trainer, batches: Any, records: list[dict[str, Any]]) -> None:
        """Called after an epoch and its validation.

        Args:
          trainer: the trainer.
          batches: the training points, as `Batches`.
          records: one record for each epoch so far. A callback may add entries to the last one; their values
            must be serializable as JSON.
        """


class Progress(Callback):
    """A progress bar on a terminal, and a printed line for each epoch."""

    def __init__(self):
        self._bar: Any = None  # the bar of the current epoch

    def on_epoch_start(self, trainer, batches, epoch):
        first = trainer.step - epoch * batches.steps_per_epoch  # steps already taken, if the run was resumed
        if self._bar is None and trainer.step:
            where = f"step {first} of epoch {epoch + 1}" if first else f"epoch {epoch}"
            print(f"going on after {where}", flush=True)
        total = batches.steps_per_epoch * batches.batch_size
        self._points, self._losses = batches.batch_size, []
        self._bar = tqdm(
            total=total,
            initial=first * batches.batch_size,
            desc=f"epoch {epoch + 1}",
            unit=" points",
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def on_step(self, trainer, loss):
        self._losses.append(loss)
        # The loss of ten steps ago has been computed, so reading it does not block.
        if len(self._losses) == 10:
            self._bar.set_postfix(loss=f"{float(self._losses[0]):.3e}", refresh=False)
            self._bar.update(10 * self._points)
            self._losses.clear()

    def on_epoch_end(self, trainer, batches, records):
        self._bar.close()
        record = records[-1]
        line = f"epoch {record['epoch']:3d}  loss {record['loss']:.3e}"
        if "p@1" in record:
            line += "  validation P@1/3/5 " + "/".join(f"{100 * record[f'p@{k}']:.2f}" for k in (1, 3, 5))
        print(f"{line}  {record['seconds']:.1f} s", flush=True)


class GradientDensity(Callback):
    """A callback that records the `gradient_density` on a few training batches after each epoch.

    Args:
      batches: number of batches to measure on.
    """

    def __init__(self, batches: int = 4):
        self._count = batches

    def on_epoch_end(self, trainer, batches, records):
        # the first batches of the next epoch
        first = itertools.islice(batches.shuffled(trainer.seed, len(records)), self._count)
        records[-1]["gradient_density"] = gradient_density(trainer.model, first, trainer.config.loss)


class RecordFile(Callback):
    """A callback that writes the records of all epochs to a file after each epoch, as lines of JSON.

    Args:
      path: the file to write.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)

    def on_epoch_end(self, trainer, batches, records):
        # All records are rewritten: a run resumed from a checkpoint may repeat epochs that are in the file
        # already.
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in records))
