"""The files of a saved model, all of which a save replaces at once.

A save writes the new model into `.new_model.partial`, and renames that to `.new_model`. Until then the
directory has the model that was there, and from then on the new one. Its files are then moved to their
places, the checksums last. Readers find the files that a killed process has not moved, and the next save
moves them.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from sparse_xmc.data.files import checksums, difference, remove, write_text
from sparse_xmc.weights import wait_for_all

CONFIG, MODEL, TEXT_ENCODER, LABELS = "model.json", "model", "text_encoder.json", "labels.txt"
FROZEN, TOKENIZER = "frozen_encoder.json", "tokenizer.json"
CALIBRATION, LABEL_STATISTICS = "calibration.json", "label_statistics.npz"
PARAMETERS = "estimator.json"
PARTS = (CONFIG, MODEL, TEXT_ENCODER, LABELS, FROZEN, TOKENIZER, CALIBRATION, LABEL_STATISTICS, PARAMETERS)
CHECKSUMS = "checksums.json"

_FORMAT = 1  # of a saved model: a higher one is refused, and so is a lower one
_NEW, _PARTIAL = ".new_model", ".new_model.partial"


@contextlib.contextmanager
def new_files(directory: Path) -> Iterator[Path]:
    """Yields a directory for the parts of a model, which take the place of those in `directory` at the end.

    Of several processes all call it, and the first one moves the files. When the block ends with an
    exception, the model that was there is still there.

    Args:
      directory: made if missing; other files in it stay.
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
        with contextlib.suppress(ValueError):  # of damaged checksums, of files that are replaced now
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
    """The paths of a saved model's parts, and of its checksums, by their names; of those that are there."""
    new = directory / _NEW
    if not _is_whole(new):
        return {name: directory / name for name in (*PARTS, CHECKSUMS) if (directory / name).exists()}
    names = {CHECKSUMS, *_parts_of(_read_record(new / CHECKSUMS))}
    both = {name: [new / name, directory / name] for name in names}
    return {name: path for name, paths in both.items() for path in paths[::-1] if path.exists()}


def check_files(directory: Path, files: dict[str, Path]) -> None:
    """Raises ValueError unless a saved model's files, as of `find_files`, are those that were saved."""
    path = files.get(CHECKSUMS, directory / CHECKSUMS)
    if not path.exists():
        raise ValueError(f"{path}: not there: the model was saved only in part, or by another version")
    expected = _read_record(path)
    actual: dict[str, str] = {}
    for name, part in files.items():
        # Models that were saved before `estimator.json` had a checksum are read too.
        if name != CHECKSUMS and (name != PARAMETERS or PARAMETERS in expected):
            actual |= checksums(part.parent, [name])
    if wrong := difference(expected, actual):
        raise ValueError(f"{directory}: the saved model is damaged: {wrong} since it was saved")


def _is_whole(new: Path) -> bool:
    return not new.is_symlink() and (new / CHECKSUMS).is_file()


def _move(directory: Path) -> None:
    """Moves the files of a new model, if there is one, to their places; deletes those of the old one."""
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
    """The checksums of a saved model's files, by their names.

    Raises:
      ValueError: the file has none, or those of another format.
    """
    try:
        record = json.loads(path.read_bytes())
        version, expected = record["format"], dict(record["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not the checksums of a saved model: {error!r}") from error
    if version != _FORMAT:
        raise ValueError(f"{path.parent}: a saved model of format {version}; this version reads {_FORMAT}")
    return expected
