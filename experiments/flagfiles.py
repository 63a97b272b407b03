"""Flagfiles, tables and data of this package: by name, and from any directory.

`--flagfile=quickstart` is `flags/quickstart.cfg`, and `--flagfile=wordnet` `flags/data/wordnet.cfg`. A path
such as `experiments/data/wordnet/train.tsv.xz`, from the root of the repository, is also found where there
is no such file: then it is this package's, wherever that is installed.
"""

import difflib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
_COMMENTS = ("#", "//")
_DEEPEST, _MOST = 32, 1000  # flagfiles within each other, and in all


def find(path: str) -> Path:
    """A path, or that of this package's file where it begins with `experiments/` and is not there."""
    found = Path(path).expanduser()
    first, *others = found.parts or ("",)
    ours = PACKAGE.joinpath(*others)
    return ours if first == "experiments" and not found.exists() and ours.exists() else found


def find_named(name: str, directory: str) -> Path:
    """A file by its path, or by its name among those in a directory of this package and below.

    Raises:
      FileNotFoundError: there is none; the message has names that are like it.
    """
    path = find(name)
    if path.exists() and not path.is_dir():
        return path
    known = {path.stem: path for path in sorted((PACKAGE / directory).rglob("*.*"))}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(path.stem, known, n=4)
    like = f"did you mean {', '.join(near)}?" if near else f"those in {PACKAGE / directory} have names"
    raise FileNotFoundError(f"{name}: no such file; {like}")


def expand(arguments: Sequence[str]) -> list[str]:
    """Arguments with the lines of a flagfile in the place of each `--flagfile=FILE`, in flagfiles too.

    Raises:
      FileNotFoundError: there is no such flagfile.
      ValueError: flagfiles include each other in a circle, too deeply or too often.
    """
    return _expand(arguments, (), itertools.count(1))


def _expand(arguments: Sequence[str], within: tuple[Path, ...], count: Iterator[int]) -> list[str]:
    """Expands the arguments in the innermost of nested flagfiles; `count` numbers all that are read."""
    expanded: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, is_one, name = argument.partition("=")
        if argument == "--":
            return [*expanded, argument, *remaining]
        if flag not in ("--flagfile", "-flagfile"):
            expanded.append(argument)
            continue
        path = find_named(name if is_one else next(remaining, ""), "flags").resolve()
        if path in within:
            circle = " -> ".join(map(str, (*within[within.index(path) :], path)))
            raise ValueError(f"{path}: a flagfile within itself: {circle}")
        if len(within) == _DEEPEST:
            raise ValueError(f"{path}: flagfiles within each other must be at most {_DEEPEST} deep")
        if next(count) > _MOST:
            raise ValueError(f"{path}: expected at most {_MOST} flagfiles in all, each as often as included")
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from error
        settings = [line for line in lines if line and not line.startswith(_COMMENTS)]
        expanded += _expand(settings, (*within, path), count)
    return expanded
