"""Orbax checkpoints of a training run, with everything needed to resume it exactly."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparse_xmc.data.files import checksums, differing_file, read_sealed_json, remove, write_sealed_json
from sparse_xmc.heads import Head, label_rows, with_label_rows
from sparse_xmc.train.trainer import Trainer
from sparse_xmc.weights import check_sizes, reading, shapes_of, writing

_KEPT = 2
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a directory: the latest two of the whole training state, and the best weights.

    Writes are atomic: if a run is killed while saving, the previous checkpoint stays intact. Each checkpoint
    has a checksum of every file; a damaged checkpoint is skipped with a warning, and the one before it is
    used. Used as a context manager, the object deletes files left over from killed processes on exit. A save
    needs twice the size of the largest array as additional memory. It is synchronous, because an asynchronous
    save would need a copy of all arrays.

    Args:
      directory: directory of the checkpoints; created if missing.
    """

    def __init__(self, directory: str | os.PathLike):
        directory = Path(directory).absolute()
        self._latest = _Numbered(directory / "latest", _KEPT)
        self._best = _Numbered(directory / "best", 1)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._latest.tidy()
        self._best.tidy()

    @property
    def directory(self) -> Path:
        """The directory of the latest checkpoints."""
        return self._latest.directory

    def save_latest(self, trainer: Trainer, progress: dict) -> None:
        """Save the whole state of a trainer.

        Args:
          trainer: the trainer.
          progress: further values to save, serializable as JSON.

        Raises:
          OSError: the checkpoint could not be written; earlier checkpoints are kept.
        """
        self._latest.save(trainer.step, trainer.state, progress, trainer.head)

    def restore_latest(self, trainer: Trainer) -> dict | None:
        """Restore the state of a trainer from the latest intact checkpoint.

        Args:
          trainer: the trainer; its state and step are replaced.

        Returns:
          The `progress` saved with the state, or None if there are no checkpoints.

        Raises:
          ValueError: the checkpoint is of a model of another structure or size, or all checkpoints are
            damaged.
        """
        for step in self._latest.intact():
            self._latest.check(step, trainer.state, trainer.head)
            # Free the arrays before the new ones are read.
            trainer.state = shapes_of(trainer.state)
            state, progress = self._latest.restore(step, trainer.state)
            trainer.restore(state)
            trainer.step = step
            return progress
        return None

    def save_best(self, trainer: Trainer) -> None:
        """Save the weights of a trainer as the best ones, replacing the previous best."""
        # The number counts saves, not steps: a run resumed from an earlier checkpoint repeats steps.
        number = max(self._best.numbers(), default=0) + 1
        self._best.save(number, _weights(trainer.state), {}, trainer.head)

    def replace_lost_best(self, trainer: Trainer) -> bool:
        """Save the current weights as the best, with a warning, if the best weights are damaged or missing.

        Returns:
          Whether the best weights were replaced.
        """
        try:
            is_there = next(self._best.intact(), None) is not None
        except ValueError:
            is_there = False
        if not is_there:
            _log.warning(
                "%s: the best weights so far are lost; those of the latest checkpoint take their place",
                self._best.directory,
            )
            self.save_best(trainer)
        return not is_there

    def restore_best(self, trainer: Trainer) -> None:
        """Restore the best weights; the moments of the optimizers are not changed.

        Raises:
          FileNotFoundError: no best weights were saved.
          ValueError: the checkpoint is of a model of another structure or size, or it is damaged.
        """
        for number in self._best.intact():
            self._best.check(number, _weights(trainer.state), trainer.head)
            # Free the arrays before the new ones are read.
            trainer.state |= shapes_of(_weights(trainer.state))
            weights, _ = self._best.restore(number, _weights(trainer.state))
            trainer.restore(trainer.state | weights)
            return
        raise FileNotFoundError(f"{self._best.directory}: no weights were saved")


class _Numbered:
    """Numbered checkpoints in a directory, of which the last few are kept.

    Each checkpoint is a subdirectory named by its number, with a record file beside it. The record has the
    checksums of all files and the number of labels. It is written last: a checkpoint without it is
    incomplete, and is ignored.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory, self._keep = directory, keep
        directory.mkdir(parents=True, exist_ok=True)

    def numbers(self) -> list[int]:
        """Return the numbers of all complete checkpoints, ascending."""
        return sorted(int(path.stem) for path in self.directory.glob("*.json") if path.stem.isdecimal())

    def restore(self, number: int, shapes: Any) -> tuple[Any, dict]:
        """Read the state, as arrays of the given shapes, dtypes and shardings, and the progress."""
        state = ocp.args.StandardRestore(shapes, strict=False)
        with reading(self.directory) as directory, _orbax(shapes) as orbax:
            args = ocp.args.Composite(state=state, progress=ocp.args.JsonRestore())
            restored = orbax.restore(directory / str(number), args=args)
        return restored["state"], restored["progress"]

    def check(self, number: int, expected: Any, head: Head) -> None:
        """Raise ValueError unless a checkpoint has the same array sizes as `expected` and fits the head."""
        path, record = self.directory / str(number), self._read_record(number)
        if record["num_labels"] != head.num_labels:
            raise ValueError(f"{path}: is of {record['num_labels']} labels, expected {head.num_labels}")
        with reading(self.directory) as directory, _orbax(expected) as orbax:
            metadata = orbax.metadata(directory / str(number)).item_metadata["state"]
        check_sizes(metadata, with_label_rows(expected, head, record["label_rows"]), path)

    def save(self, number: int, state: Any, progress: dict, head: Head) -> None:
        """Write a checkpoint, then delete all but the last few."""
        if number in self.numbers():
            return
        path = self.directory / str(number)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        try:
            with writing(path) as target, _orbax(state) as orbax:
                orbax.save(target, args=args)
                check_sizes(orbax.metadata(target).item_metadata["state"], state, path)
            if jax.process_index() == 0:
                sizes = {"num_labels": head.num_labels, "label_rows": label_rows(head)}
                write_sealed_json(self._record(number), sizes | {"files": checksums(path)})
        except OSError as error:
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            kept = self.numbers()
            remaining = f"checkpoint {kept[-1]} is still there" if kept else "there is no earlier checkpoint"
            raise OSError(f"{text}; {remaining}") from None
        self.tidy()

    def tidy(self) -> None:
        """Delete all but the last few checkpoints, and files left over from killed processes.

        Record files are deleted before their checkpoints, so that no record is without its checkpoint.
        """
        kept = {str(number) for number in self.numbers()[-self._keep :]}
        if jax.process_index() != 0 or not kept:
            return
        for path in sorted(self.directory.iterdir(), key=Path.is_dir):
            number = path.name.partition(".")[0]
            if not number.isdecimal() or number in kept:
                continue
            with contextlib.suppress(OSError):
                remove(path)

    def intact(self) -> Iterator[int]:
        """Yield the numbers of the checkpoints whose files match their checksums, the latest first.

        Raises:
          ValueError: there are checkpoints, but all of them are damaged.
        """
        numbers, found, wrong = self.numbers(), False, ""
        damaged: list[Path] = []
        for number in reversed(numbers):
            path = self.directory / str(number)
            try:
                wrong = differing_file(path, self._read_record(number)["files"])
            except (OSError, ValueError) as error:
                wrong = str(error)
            if not wrong:
                found = True
                if jax.process_index() == 0:
                    # Frees the number for a new checkpoint.
                    for other in damaged:
                        other.rename(other.with_suffix(".damaged"))
                damaged = []
                yield number
            else:
                damaged.append(self._record(number))
                _log.warning("%s is damaged (%s), and is not used", path, wrong)
        if numbers and not found:
            raise ValueError(
                f"{self.directory}: all checkpoints are damaged: {wrong}; remove them to start anew"
            )

    def _record(self, number: int) -> Path:
        return self.directory / f"{number}.json"

    def _read_record(self, number: int) -> dict[str, Any]:
        """Read the record of a checkpoint.

        Raises:
          OSError: the record cannot be read.
          ValueError: the record is damaged, or lacks a field.
        """
        record = read_sealed_json(self._record(number))
        if missing := sorted({"num_labels", "label_rows", "files"} - record.keys()):
            raise ValueError(f"{self._record(number)}: expected a field {missing[0]!r}, got none")
        return record


def _orbax(state: Any) -> ocp.Checkpointer:
    """Make an Orbax checkpointer that copies at most the size of the largest array at once.

    Besides the copies, Orbax holds their encoded form until it is written, which takes as much again.

    Args:
      state: pytree of the arrays, or of their shapes, to be saved or restored.
    """
    most = max(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(state))
    gb = (most + 2**20) / 1e9
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=gb, restore_concurrent_gb=gb)
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(state=handler, progress=ocp.JsonCheckpointHandler())
    )


def _weights(state: dict) -> dict:
    return {"params": state["params"], "other": state["other"]}
