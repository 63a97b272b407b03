"""Checkpoints of a training run, by Orbax: all that it needs to go on as if it had never stopped."""

import json
import logging
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
    manager, which on leaving gives back what Orbax holds.

    Args:
      directory: where they are; made if missing.
    """

    def __init__(self, directory: str | os.PathLike):
        directory = Path(directory).absolute()
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(), progress=ocp.JsonCheckpointHandler()
        )
        self._latest = _Numbered(directory / "latest", handler, _KEPT)
        self._best = _Numbered(directory / "best", ocp.StandardCheckpointHandler(), 1)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._latest.close()
        self._best.close()

    @property
    def directory(self) -> Path:
        """Where the latest ones are."""
        return self._latest.directory

    def save_latest(self, trainer: Trainer, progress: dict) -> None:
        """Saves all of a trainer, and `progress`, which must be ready for JSON.

        Raises:
          OSError: it could not be written; what was saved before is still there.
        """
        state, progress_args = ocp.args.StandardSave(trainer.state), ocp.args.JsonSave(progress)
        self._latest.save(trainer.step, ocp.args.Composite(state=state, progress=progress_args), trainer.head)

    def restore_latest(self, trainer: Trainer) -> dict | None:
        """Puts a trainer into the state last saved and returns its progress; None where nothing was saved.

        Raises:
          ValueError: what was saved is of another model, or all of it is damaged.
        """
        for step in self._latest.intact():
            self._latest.check(step, self._latest.metadata(step)["state"], trainer.state, trainer.head)
            # Shapes in place of the arrays, so that the state is never there twice.
            trainer.state = shapes_of(trainer.state)
            state = ocp.args.StandardRestore(trainer.state, strict=False)
            args = ocp.args.Composite(state=state, progress=ocp.args.JsonRestore())
            restored = self._latest.restore(step, args)
            trainer.restore(restored["state"])
            trainer.step = step
            return restored["progress"]
        return None

    def save_best(self, trainer: Trainer) -> None:
        """Saves the weights, in place of those saved before."""
        # Numbered by saves: a run that goes on from an earlier checkpoint passes the same steps again.
        number = max(self._best.numbers(), default=0) + 1
        self._best.save(number, ocp.args.StandardSave(_weights(trainer.state)), trainer.head)

    def restore_best(self, trainer: Trainer) -> None:
        """Puts the best weights back; the moments stay as they are."""
        for number in self._best.intact():
            weights = shapes_of(_weights(trainer.state))
            trainer.state |= weights  # the arrays make room
            self._best.check(number, self._best.metadata(number), weights, trainer.head)
            args = ocp.args.StandardRestore(weights, strict=False)
            trainer.restore(trainer.state | self._best.restore(number, args))
            return
        raise FileNotFoundError(f"{self._best.directory}: no weights were saved")


class _Numbered:
    """Checkpoints in a directory, each in one of its own with a number, of which the last few are kept.

    A file beside each has its checksums, and how many labels it is of. It is written last: without it the
    checkpoint is none.
    """

    def __init__(self, directory: Path, handler: Any, keep: int):
        self.directory, self._keep = directory, keep
        self._orbax = ocp.Checkpointer(handler)
        directory.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        self._tidy()
        self._orbax.close()

    def numbers(self) -> list[int]:
        """Those of all checkpoints, ascending."""
        return sorted(int(path.stem) for path in self.directory.glob("*.json") if path.stem.isdigit())

    def metadata(self, number: int) -> Any:
        return self._orbax.metadata(self.directory / str(number)).item_metadata

    def restore(self, number: int, args: Any) -> Any:
        return self._orbax.restore(self.directory / str(number), args=args)

    def check(self, number: int, metadata: Any, expected: Any, head: Head) -> None:
        """Raises ValueError unless a checkpoint is of a model with the sizes of this state and its head."""
        path, record = self.directory / str(number), json.loads(self._record(number).read_text())
        if record["num_labels"] != head.num_labels:
            raise ValueError(f"{path}: is of {record['num_labels']} labels, expected {head.num_labels}")
        check_sizes(metadata, expected, path, head, record["label_rows"])

    def save(self, number: int, args: Any, head: Head) -> None:
        """Writes a checkpoint, then deletes those that are not to be kept."""
        if number in self.numbers():
            return
        path = self.directory / str(number)
        try:
            self._orbax.save(path, args=args, force=True)  # over what a killed process left
            if jax.process_index() == 0:
                record = {"num_labels": head.num_labels, "label_rows": head.label_rows}
                write_text(self._record(number), json.dumps(record | {"files": checksums(path)}))
        except Exception as error:  # of many types, by what failed
            reason = str(error).partition("\n")[0][:300] or type(error).__name__
            kept = self.numbers()
            before = f"that of step {kept[-1]} is still there" if kept else "there is none before it"
            raise OSError(f"{path}: the checkpoint could not be written: {reason}; {before}") from error
        self._tidy()

    def _tidy(self) -> None:
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


def _weights(state: dict) -> dict:
    return {"params": state["params"], "other": state["other"]}
