"""The working directory of a run: its lock, and checks of whether a run can start or be resumed in it."""

import fcntl
import json
from pathlib import Path
from typing import IO

from absl import flags

from sparse_xmc.cli.run_flags import current_values, effective_values, values_of
from sparse_xmc.data.files import open_no_follow
from sparse_xmc.train import SCHEDULES

FLAGS = flags.FLAGS


def lock(workdir: Path) -> IO[str]:
    """Lock a working directory for this process. The lock is held while the returned file is open.

    Raises:
      ValueError: another process holds the lock.
    """
    file = open(workdir / ".lock", "w", opener=open_no_follow)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"{workdir}: another run is using this directory; choose another --workdir"
        ) from error
    return file


def check_flags(workdir: Path) -> None:
    """Raise ValueError if the directory contains a run with other flags that affect results.

    The number of epochs may be higher than before if the schedule allows it.
    """
    path = workdir / "flags.cfg"
    has_checkpoint = any((workdir / "checkpoints" / "latest").glob("*.json"))
    if not path.exists() or not (has_checkpoint or (workdir / "result.json").exists()):
        return  # There is no run to resume.
    lines = [line for line in path.read_text().splitlines() if line.startswith("-")]
    try:
        saved, given = effective_values(values_of(lines)), effective_values(current_values())
    except flags.Error as error:
        raise ValueError(f"{path}: not the flags of a run: {error}; choose another --workdir") from error
    epochs = saved["epochs"]
    is_raised = epochs < FLAGS.epochs
    if is_raised:
        del saved["epochs"]
    if different := [name for name in sorted(saved) if saved[name] != given[name]]:
        listed = " ".join(f"--{name}={values[name]}" for name in different for values in (saved, given))
        raise ValueError(f"{path} was written by a run with other flags ({listed}); choose another --workdir")
    if is_raised and not SCHEDULES[FLAGS.schedule].can_go_on:
        raise ValueError(
            f"{path} was written by a run of {epochs} epochs, at whose end the learning rate of "
            f"--schedule={FLAGS.schedule} is 0, so it cannot be continued; choose another --workdir, or "
            "--init_from this one"
        )


def finished(workdir: Path) -> str | None:
    """Return a message if the directory contains a finished run that is not to be continued, else None."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    planned, done = result["training"]["epochs"], result["epochs"]
    if planned >= FLAGS.epochs:
        note = ""
    elif done < planned:
        note = f" It stopped early, after {done} epochs, so more epochs change nothing."
    else:
        return None
    return f"{path}: this run has finished.{note} Choose another --workdir."
