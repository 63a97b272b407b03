r"""Runs a table of experiments: every data set with every cell and seed that a table file lists.

    python -m experiments.sweep --table=wordnet --results=experiments/results/sweeps

Each run is a process of `experiments.run` with the flagfiles of the table, the data set and the cell, in that
order. Its result goes to RESULTS/DATA/CELL_seedN.json, for `experiments.tables`.

* A run whose result is there already, with the same flags, is skipped. One that was stopped goes on from its
  last checkpoint.
* Two entries with the same flags, such as a cell that is in two tables, share one run: what identifies a run
  is all of its flags but those that change no result. After a change of the code, remove the results.
* A run that fails does not stop the others. The last lines of its output are shown at the end, when the
  program exits with status 1.

A table file, by its path or by its name among those of `experiments/tables`, is TOML:

    title = "The shipped data set"
    data = ["wordnet"]                                        # experiments/flags/data/wordnet.cfg
    flagfiles = ["experiments/flags/text.cfg"]                # what all runs share

    [[runs]]
    cells = ["dense"]                                         # experiments/flags/cells/dense.cfg
    seeds = [0, 1, 2]
    flagfiles = ["experiments/flags/text_dense.cfg"]          # if these share more: after those of all runs
    grid = {dropout = [0, 0.2], loss = ["bce"]}               # if these vary flags: all combinations

A run of a grid is named by its cell and the flags that vary, as in dense_dropout_0.2_loss_bce.
"""

import hashlib
import itertools
import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import flags

from sparse_xmc.data.files import open_no_follow, write_text
from sparse_xmc.heads import HEADS

from . import flagfiles, program, reflection, run

_FLAGS = Path("experiments/flags")
_LAST_LINES = 15


class Entry(NamedTuple):
    """One run of a table.

    Attributes:
      data: the data set, a flagfile in experiments/flags/data.
      cell: its name in the table.
      seed: its seed.
      flagfiles: what it shares with others.
      base: the flagfile in experiments/flags/cells; the name of the cell where no grid varies it.
      varied: the flags of its grid, each as (name, value).
    """

    data: str
    cell: str
    seed: int
    flagfiles: tuple[str, ...]
    base: str
    varied: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return f"{self.data} {self.cell} seed {self.seed}"

    @property
    def flags(self) -> list[str]:
        """The flags of `experiments.run`, without a working directory."""
        files = [*self.flagfiles, _FLAGS / "data" / f"{self.data}.cfg", _FLAGS / "cells" / f"{self.base}.cfg"]
        varied = [f"--{name}={value}" for name, value in self.varied]
        return [*(f"--flagfile={file}" for file in files), *varied, f"--seed={self.seed}"]

    def result(self, results: Path) -> Path:
        """The path of its result below the directory of results."""
        return results / self.data / f"{self.cell}_seed{self.seed}.json"


def _combinations(grid: dict[str, list]) -> Iterator[tuple[tuple[str, object], ...]]:
    for values in itertools.product(*grid.values()):
        yield tuple(zip(grid, values, strict=True))


class Table(NamedTuple):
    """A table file's contents."""

    title: str
    entries: list[Entry]

    @property
    def data(self) -> list[str]:
        """The data sets, in order."""
        return list(dict.fromkeys(entry.data for entry in self.entries))

    @property
    def cells(self) -> list[str]:
        """The cells, in order."""
        return list(dict.fromkeys(entry.cell for entry in self.entries))


def read_table(path: str) -> Table:
    """Reads a table file.

    Raises:
      ValueError: the file is malformed, lists an entry twice, or names a flagfile that does not exist.
    """
    try:
        with open(flagfiles.find_named(path, "tables"), "rb") as file:
            table = tomllib.load(file)
        shared = tuple(table.pop("flagfiles", ()))
        title, data, runs = table.pop("title"), table.pop("data"), table.pop("runs")
        entries = [
            Entry(
                name,
                "_".join([cell, *(f"{flag}_{value}" for flag, value in varied)]),
                seed,
                shared + tuple(group.get("flagfiles", ())),
                cell,
                varied,
            )
            for name in data
            for group in runs
            for cell in group["cells"]
            for varied in _combinations(group.get("grid", {}))
            for seed in group["seeds"]
        ]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a table file (see experiments.sweep): {error!r}") from error
    if table:
        raise ValueError(f"{path}: unknown keys: {', '.join(table)}")
    names = [str(entry) for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: {twice} is listed twice")
    for entry in entries:
        try:
            flagfiles.expand(entry.flags)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: {entry}: {error}") from error
    return Table(title, entries)


def effective_flags(arguments: list[str]) -> dict:
    """What `experiments.run` would see of these arguments, but for flags that change no result."""
    return _that_matter(run.values_of(arguments))


def _that_matter(values: dict) -> dict:
    """Those that change a result, as they take effect; one that a result knows nothing of had its default."""
    values = {flag.name: flag.default for flag in run.own_flags()} | values
    head = reflection.kind_of("head", HEADS, values)
    values |= {name: head.get(name) for name in reflection.fields_of_kinds(HEADS)}
    return {name: value for name, value in values.items() if name not in run.INCIDENTAL_FLAGS}


def _directory(runs: Path, values: dict) -> Path:
    """The working directory of a run, named by its flags: those that are not at their defaults."""
    defaults = _that_matter({})
    special = {name: value for name, value in values.items() if value != defaults.get(name)}
    return runs / hashlib.sha256(json.dumps(special, sort_keys=True).encode()).hexdigest()[:12]


def sweep(table: Table, results: Path, runs: Path, dry_run: bool = False) -> dict[Entry, str]:
    """Runs what has no result yet.

    Returns:
      For each run that failed, the last lines of its output.
    """
    failures = {}
    for i, entry in enumerate(table.entries, start=1):
        values, result = effective_flags(entry.flags), entry.result(results)
        workdir = _directory(runs, values)
        command = [sys.executable, "-m", f"{__package__}.run", *entry.flags]
        command += [f"--workdir={workdir}", f"--name={entry.data} {entry.cell}"]
        print(f"[{i}/{len(table.entries)}] {entry}: ", end="", flush=True)
        if result.exists() and _that_matter(json.loads(result.read_text())["flags"]) == values:
            print(f"{result} is there")
            continue
        if dry_run:
            print(shlex.join(command))
            continue
        if (workdir / "result.json").exists():
            print(f"{workdir} has run")
        else:
            print(f"running, output in {workdir}.log", flush=True)
            if failure := _run(command, Path(f"{workdir}.log")):
                failures[entry] = failure
                print(f"    {failure.splitlines()[-1]}")
                continue
        result.parent.mkdir(parents=True, exist_ok=True)
        write_text(result, (workdir / "result.json").read_text())
    return failures


def _run(command: list[str], log: Path) -> str | None:
    """Runs a command to its end; returns the last lines of its output if it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8", opener=open_no_follow) as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return "\n".join([*lines, f"{how}: {shlex.join(command)}"])


def _report(failures: dict[Entry, str]) -> Iterator[str]:
    for entry, output in failures.items():
        yield f"\n{entry} failed:\n" + "".join(f"    {line}\n" for line in output.splitlines())
    yield f"{len(failures)} of the runs failed" if failures else "all runs have results"


def _define_flags() -> None:
    flags.DEFINE_string("table", None, "The table file.", required=True)
    flags.DEFINE_string("results", None, "Directory that results go to.", required=True)
    flags.DEFINE_string("runs", "runs/sweep", "Directory of the runs' working directories.")
    flags.DEFINE_bool("dry_run", False, "Show what would run, and run nothing.")


def main():
    """Runs the table."""
    values = flags.FLAGS
    failures = sweep(read_table(values.table), Path(values.results), Path(values.runs), values.dry_run)
    if not values.dry_run:
        print("\n".join(_report(failures)))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    _define_flags()  # not on import: experiments.tables, which imports this, has flags of the same names
    program.start(main)
