"""Checkpoints of a training run, by Orbax: all that it needs to go on as if it had never stopped."""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparse_xmc.data.files import checksums, differing_file, write_text
from sparse_xmc.heads import Head
from sparse_xmc.saving import check_sizes, shapes_of
from sparse_xmc.train.trainer import Trainer

_KEPT = 2
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a directory: the latest two of the whole state, and the best weights.

    Writes are atomic: a run that is killed while saving finds the checkpoint before. Each has a checksum of
    every file, so that one that was damaged is passed over, with a warning, for the one before. A context
    manager, which on leaving deletes what killed processes have left. A save takes as much memory as the two
    largest arrays; it is not asynchronous, which would take that of all.

    Args:
      directory: where they are; made if missing.
    """

    def __init__(self, directory: str | os.PathLike):
        directory = Path(directory).absolute()
        self._latest = _Numbered(directory / "latest", _KEPT)
        self._best = _Numbered(directory / "best", 1)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._latest.tidy()
        self._best.tidy()

    @property
    def directory(self) -> Path:
        """Where the latest ones are."""
        return self._latest.directory

    def save_latest(self, trainer: Trainer, progress: dict) -> None:
        """Saves all of a trainer, and `progress`, which must be ready for JSON.

        Raises:
          OSError: it could not be written; what was saved before is still there.
        """
        self._latest.save(trainer.step, trainer.state, progress, trainer.head)

    def restore_latest(self, trainer: Trainer) -> dict | None:
        """Puts a trainer into the state last saved and returns its progress; None where nothing was saved.

        Raises:
          ValueError: what was saved is of another model, or all of it is damaged.
        """
        for step in self._latest.intact():
            self._latest.check(step, trainer.state, trainer.head)
            trainer.state = shapes_of(trainer.state)  # the arrays make room
            state, progress = self._latest.restore(step, trainer.state)
            trainer.restore(state)
            trainer.step = step
            return progress
        return None

    def save_best(self, trainer: Trainer) -> None:
        """Saves the weights, in place of those saved before."""
        # Numbered by saves: a run that goes on from an earlier checkpoint passes the same steps again.
        number = max(self._best.numbers(), default=0) + 1
        self._best.save(number, _weights(trainer.state), {}, trainer.head)

    def restore_best(self, trainer: Trainer) -> None:
        """Puts the best weights back; the moments stay as they are."""
        for number in self._best.intact():
            self._best.check(number, _weights(trainer.state), trainer.head)
            trainer.state |= shapes_of(_weights(trainer.state))  # the arrays make room
            weights, _ = self._best.restore(number, _weights(trainer.state))
            trainer.restore(trainer.state | weights)
            return
        raise FileNotFoundError(f"{self._best.directory}: no weights were saved")


class _Numbered:
    """Checkpoints in a directory, each in one of its own with a number, of which the last few are kept.

    A file beside each has its checksums, and how many labels it is of. It is written last: without it the
    checkpoint is none.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory, self._keep = directory, keep
        directory.mkdir(parents=True, exist_ok=True)

    def numbers(self) -> list[int]:
        """Those of all checkpoints, ascending."""
        return sorted(int(path.stem) for path in self.directory.glob("*.json") if path.stem.isdigit())

    def restore(self, number: int, shapes: Any) -> tuple[Any, dict]:
        """The state of these shapes, and the progress."""
        state = ocp.args.StandardRestore(shapes, strict=False)
        with _orbax(shapes) as orbax:
            args = ocp.args.Composite(state=state, progress=ocp.args.JsonRestore())
            restored = orbax.restore(self.directory / str(number), args=args)
        return restored["state"], restored["progress"]

    def check(self, number: int, expected: Any, head: Head) -> None:
        """Raises ValueError unless a checkpoint is of a model with the sizes of this state and its head."""
        path, record = self.directory / str(number), json.loads(self._record(number).read_text())
        if record["num_labels"] != head.num_labels:
            raise ValueError(f"{path}: is of {record['num_labels']} labels, expected {head.num_labels}")
        with _orbax(expected) as orbax:
            metadata = orbax.metadata(path).item_metadata["state"]
        check_sizes(metadata, expected, path, head, record["label_rows"])

    def save(self, number: int, state: Any, progress: dict, head: Head) -> None:
        """Writes a checkpoint, then deletes those that are not to be kept."""
        if number in self.numbers():
            return
        path = self.directory / str(number)
        try:
            progress_args = ocp.args.JsonSave(progress)
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=progress_args)
            with _orbax(state) as orbax:
                orbax.save(path, args=args, force=True)  # over what a killed process left
            if jax.process_index() == 0:
                record = {"num_labels": head.num_labels, "label_rows": head.label_rows}
                write_text(self._record(number), json.dumps(record | {"files": checksums(path)}))
        except Exception as error:  # of many types, by what failed
            reason = str(error).partition("\n")[0][:300] or type(error).__name__
            kept = self.numbers()
            before = f"that of step {kept[-1]} is still there" if kept else "there is none before it"
            raise OSError(f"{path}: the checkpoint could not be written: {reason}; {before}") from error
        self.tidy()

    def tidy(self) -> None:
        """Deletes all but the last few, with what killed processes left; records before what they are of."""
        kept = {str(number) for number in self.numbers()[-self._keep :]}
        if jax.process_index() != 0 or not kept:
            return
        for path in sorted(self.directory.iterdir(), key=Path.is_dir):
            number = path.name.partition(".")[0]
            if not number.isdigit() or number in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def intact(self) -> Iterator[int]:
        """Yields the numbers of checkpoints whose files are as they were written, the latest first.

        Raises:
          ValueError: there are some, and none is.
        """
        numbers, found, wrong = self.numbers(), False, ""
        damaged: list[Path] = []
        for number in reversed(numbers):
            path = self.directory / str(number)
            try:
                wrong = differing_file(path, json.loads(self._record(number).read_text())["files"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                wrong = f"{self._record(number)}: {error}"
            if not wrong:
                found = True
                if jax.process_index() == 0:
                    for other in damaged:  # so that it can be written anew
                        other.rename(other.with_suffix(".damaged"))
                damaged = []
                yield number
            else:
                damaged.append(self._record(number))
                _log.warning("%s is damaged (%s): the checkpoint before it is used", path, wrong)
        if numbers and not found:
            raise ValueError(
                f"{self.directory}: all checkpoints are damaged: {wrong}; remove them to start anew"
            )

    def _record(self, number: int) -> Path:
        return self.directory / f"{number}.json"


def _orbax(state: Any) -> ocp.Checkpointer:
    """Orbax for a state of such arrays or shapes: it copies no more of it at once than the largest takes."""
    most = max(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(state))
    gb = (most + 2**20) / 1e9
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=gb, restore_concurrent_gb=gb)
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(state=handler, progress=ocp.JsonCheckpointHandler())
    )


def _weights(state: dict) -> dict:
    return {"params": state["params"], "other": state["other"]}
