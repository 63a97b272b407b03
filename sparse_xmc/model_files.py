"""The files of a saved model, which a save replaces atomically.

A save writes the new model into `.new_model.partial`, and renames this directory to `.new_model`. From this
renaming on, readers get the new model; before it, the old one. The files are then moved to their final
places, the checksums last. If a process is killed before it has moved all files, readers find the remaining
ones in `.new_model`, and the next save moves them.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from sparse_xmc.data.files import checksums, difference, remove, write_text
from sparse_xmc.inputs import FROZEN_FILE, TOKENIZER_FILE, WORDS_FILE
from sparse_xmc.weights import wait_for_all

CONFIG, MODEL, LABELS = "model.json", "model", "labels.txt"
CALIBRATION, LABEL_STATISTICS = "calibration.json", "label_statistics.npz"
PARAMETERS = "estimator.json"
PARTS = (
    *(CONFIG, MODEL, WORDS_FILE, LABELS, FROZEN_FILE, TOKENIZER_FILE),
    *(CALIBRATION, LABEL_STATISTICS, PARAMETERS),
)
CHECKSUMS = "checksums.json"

_FORMAT = 1  # format version of saved models; models of other versions are rejected
_NEW, _PARTIAL = ".new_model", ".new_model.partial"


@contextlib.contextmanager
def new_files(directory: Path) -> Iterator[Path]:
    """Yield a directory for the parts of a model, which replace the parts in `directory` at the end.

    All processes must call it; the first one moves the files. If the block raises an exception, the old model
    stays in place.

    Args:
      directory: directory of the model; created if missing. Other files in it are not changed.
    """
    scratch = directory / _PARTIAL
    if jax.process_index() != 0:
        yield scratch
        wait_for_all("saved model")
        return
    directory.mkdir(parents=True, exist_ok=True)
    remove(scratch)
    scratch.mkdir()
    try:
        yield scratch
        record = {"format": _FORMAT, "files": checksums(scratch, PARTS)}
        write_text(scratch / CHECKSUMS, json.dumps(record, indent=2) + "\n")
        # First finish an earlier save that was interrupted. Damaged checksums do not matter: its files are
        # replaced.
        with contextlib.suppress(ValueError):
            _move(directory)
        remove(directory / _NEW)
        scratch.rename(directory / _NEW)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(scratch)
        raise
    _move(directory)
    wait_for_all("saved model")


def find_files(directory: Path) -> dict[str, Path]:
    """Return the paths of the existing parts of a saved model and of its checksums, by name."""
    new = directory / _NEW
    if not _is_whole(new):
        return {name: directory / name for name in (*PARTS, CHECKSUMS) if (directory / name).exists()}
    names = {CHECKSUMS, *_parts_of(_read_record(new / CHECKSUMS))}
    # The last path of a name counts: if both files exist, the file in `.new_model` wins.
    both = {name: [directory / name, new / name] for name in names}
    return {name: path for name, paths in both.items() for path in paths if path.exists()}


def check_files(directory: Path, files: dict[str, Path]) -> None:
    """Raise ValueError if files of a saved model, from `find_files`, do not match their checksums."""
    path = files.get(CHECKSUMS, directory / CHECKSUMS)
    if not path.exists():
        raise ValueError(f"{path}: not there: the model was saved only in part, or by another version")
    expected = _read_record(path)
    actual: dict[str, str] = {}
    for name, part in files.items():
        # Older models have an `estimator.json` without a checksum.
        if name != CHECKSUMS and (name != PARAMETERS or PARAMETERS in expected):
            actual |= checksums(part.parent, [name])
    if wrong := difference(expected, actual):
        raise ValueError(f"{directory}: the saved model is damaged: {wrong} since it was saved")


def _is_whole(new: Path) -> bool:
    return not new.is_symlink() and (new / CHECKSUMS).is_file()


def _move(directory: Path) -> None:
    """Move the files of a new model, if there is one, to their final places, and delete the old files."""
    new = directory / _NEW
    if _is_whole(new):
        names = _parts_of(_read_record(new / CHECKSUMS))
        for name in PARTS:
            source, target = new / name, directory / name
            if source.exists() or name not in names:
                remove(target)
            if source.exists():
                source.rename(target)
        os.replace(new / CHECKSUMS, directory / CHECKSUMS)
    remove(new)


def _parts_of(expected: dict[str, str]) -> set[str]:
    return {name.partition("/")[0] for name in expected}


def _read_record(path: Path) -> dict[str, str]:
    """Read the checksums of a saved model, by file name.

    Raises:
      ValueError: the file does not contain checksums, or is of another format version.
    """
    try:
        record = json.loads(path.read_bytes())
        version, expected = record["format"], dict(record["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not the checksums of a saved model: {error!r}") from error
    if version != _FORMAT:
        raise ValueError(f"{path.parent}: a saved model of format {version}; this version reads {_FORMAT}")
    return expected
