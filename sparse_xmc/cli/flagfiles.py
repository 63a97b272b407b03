"""Lookup of the flagfiles and data of this package, by name and from any working directory.

`--flagfile=quickstart` means `flags/quickstart.cfg`, and `--flagfile=wordnet` means `flags/data/wordnet.cfg`.
A path such as `experiments/data/wordnet/train.tsv.xz` is first looked up relative to the working directory,
and then in this package. Such paths begin with `experiments/`, where these files once were, because results
and working directories contain them.
"""

import difflib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparse_xmc.settings import RENAMED

PACKAGE = Path(__file__).parent
FLAGFILES = PACKAGE / "flags"
_log = logging.getLogger(__name__)
_COMMENTS = ("#", "//")
_MAX_DEPTH, _MAX_FILES = 32, 1000  # maximum nesting depth, and total number, of flagfiles


def find(path: str) -> Path:
    """Return a path, or if it does not exist and begins with `experiments/`, the path in this package."""
    found = Path(path).expanduser()
    first, *others = found.parts or ("",)
    packaged = PACKAGE.joinpath(*others)
    return packaged if first == "experiments" and not found.exists() and packaged.exists() else found


def find_named(name: str, directory: Path) -> Path:
    """Return a file given by its path, or by its name within a directory.

    Raises:
      FileNotFoundError: there is no such file; the message suggests similar names.
    """
    path = find(name)
    if path.exists() and not path.is_dir():
        return path
    known = {path.stem: path for path in sorted(directory.rglob("*.*"))}
    if name in known:
        return known[name]
    similar = difflib.get_close_matches(path.stem, known, n=4)
    hint = f"did you mean {', '.join(similar)}?" if similar else f"the files of {directory} have names"
    raise FileNotFoundError(f"{name}: no such file; {hint}")


def expand(arguments: Sequence[str]) -> list[str]:
    """Replace each `--flagfile=FILE` in arguments by the lines of the file, recursively.

    Raises:
      FileNotFoundError: a flagfile does not exist.
      ValueError: flagfiles include each other in a cycle, too deeply or too often.
    """
    return rename_flags(_expand(arguments, (), itertools.count(1)))


def rename_flags(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the current names of renamed flags, and log a warning for each renamed flag."""
    renamed = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        old = flag.lstrip("-")
        new = RENAMED.get(old, old) if flag.startswith("-") else old
        if new != old:
            _log.warning("--%s is now --%s; the old name will be removed in the next version", old, new)
        renamed.append(f"{flag.removesuffix(old)}{new}{equals}{value}")
    return renamed


def _expand(arguments: Sequence[str], within: tuple[Path, ...], count: Iterator[int]) -> list[str]:
    """Expand the arguments of the innermost of nested flagfiles; `count` counts all files read."""
    expanded: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, name = argument.partition("=")
        if argument == "--":
            return [*expanded, argument, *remaining]
        if flag not in ("--flagfile", "-flagfile"):
            expanded.append(argument)
            continue
        path = find_named(name if equals else next(remaining, ""), FLAGFILES).resolve()
        if path in within:
            cycle = " -> ".join(map(str, (*within[within.index(path) :], path)))
            raise ValueError(f"{path}: flagfile includes itself: {cycle}")
        if len(within) == _MAX_DEPTH:
            raise ValueError(f"{path}: flagfiles must be nested at most {_MAX_DEPTH} deep")
        if next(count) > _MAX_FILES:
            raise ValueError(
                f"{path}: expected at most {_MAX_FILES} flagfiles in total, counting repeated ones"
            )
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from error
        settings = [line for line in lines if line and not line.startswith(_COMMENTS)]
        expanded += _expand(settings, (*within, path), count)
    return expanded
