"""Checkpoints of a training run, by Orbax: all that it needs to go on as if it had never stopped."""

import os
from pathlib import Path

import orbax.checkpoint as ocp

from sparse_xmc.saving import check_sizes, shapes_of
from sparse_xmc.train.trainer import Trainer


class Checkpoints:
    """The checkpoints in a directory: the latest of the whole state, and the best weights.

    Writes are atomic: a run that is killed while saving finds the checkpoint before. A context manager, which
    on leaving gives back what Orbax holds.

    Args:
      directory: where they are; made if missing.
    """

    def __init__(self, directory: str | os.PathLike):
        directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
        self._latest = ocp.CheckpointManager(directory / "latest", options=options, item_handlers=handlers)
        self._best = ocp.CheckpointManager(directory / "best", options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._latest.close()
        self._best.close()

    def save_latest(self, trainer: Trainer, progress: dict) -> None:
        """Saves all of a trainer, and `progress`, which must be ready for JSON."""
        if self._latest.latest_step() == trainer.step:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(trainer.state), progress=ocp.args.JsonSave(progress)
        )
        self._latest.save(trainer.step, args=args)

    def restore_latest(self, trainer: Trainer) -> dict | None:
        """Puts a trainer into the state last saved and returns its progress; None where nothing was saved."""
        step = self._latest.latest_step()
        if step is None:
            return None
        check_sizes(
            self._latest.item_metadata(step)["state"],
            trainer.state,
            trainer.num_labels,
            self._latest.directory,
        )
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes_of(trainer.state), strict=False),
            progress=ocp.args.JsonRestore(),
        )
        restored = self._latest.restore(step, args=args)
        trainer.restore(restored["state"])
        trainer.step = step
        return restored["progress"]

    def save_best(self, trainer: Trainer) -> None:
        """Saves the weights, in place of those saved before."""
        # Numbered by saves: a run that goes on from an earlier checkpoint passes the same steps again, and
        # Orbax takes no number twice.
        number = (self._best.latest_step() or 0) + 1
        self._best.save(number, args=ocp.args.StandardSave(_weights(trainer.state)))

    def restore_best(self, trainer: Trainer) -> None:
        """Puts the best weights back; the moments stay as they are."""
        step = self._best.latest_step()
        if step is None:
            raise FileNotFoundError(f"{self._best.directory}: no weights were saved")
        weights = self._best.restore(
            step, args=ocp.args.StandardRestore(shapes_of(_weights(trainer.state)), strict=False)
        )
        trainer.restore(trainer.state | weights)


def _weights(state: dict) -> dict:
    return {"params": state["params"], "other": state["other"]}
