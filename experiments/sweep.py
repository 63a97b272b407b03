r"""Run a table of experiments: each data set with each model and seed that a table file lists.

    python -m experiments.sweep --table=wordnet --results=experiments/results/sweeps

Each run is a process of `experiments.run` with the flagfiles of the table, the data set and the model, in
this order. Its result is written to RESULTS/DATA/MODEL_seedN.json, for `experiments.tables`.

* A run is skipped if a result with the same flags exists. A stopped run is resumed from its last checkpoint.
* Entries with equal flags, such as a model in two tables, share one run: a run is identified by all of its
  flags that affect results. After a change of the code, remove the results.
* A failed run does not stop the other runs. The last lines of its output are shown at the end, and the
  program exits with status 1.

A table file, given by its path or by its name in `experiments/tables`, is TOML:

    title = "The shipped data set"
    data = ["wordnet"]                                        # sparse_xmc/cli/flags/data/wordnet.cfg
    flagfiles = ["experiments/flags/text.cfg"]                # flagfiles of all runs

    [[runs]]
    models = ["dense"]                                        # sparse_xmc/cli/flags/models/dense.cfg
    seeds = [0, 1, 2]
    flagfiles = ["experiments/flags/text_dense.cfg"]          # optional: further flagfiles of these runs
    grid = {dropout = [0, 0.2], loss = ["bce"]}               # optional: all combinations of these flags

A path that begins with `experiments/flags` is looked up in `sparse_xmc/cli/flags` (`flagfiles.find`).
A run of a grid is named by its model and the varied flags, as in dense_dropout_0.2_loss_bce.
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

from sparse_xmc.cli import flagfiles, program, run_flags
from sparse_xmc.data.files import open_no_follow, write_text
from sparse_xmc.settings import rename_settings

TABLES = Path(__file__).parent / "tables"
# The directory of the flagfiles up to version 0.1, which results record. `flagfiles.find` looks up its files
# in `sparse_xmc/cli/flags`.
_FLAGS = Path("experiments/flags")
_LAST_LINES = 15


class Entry(NamedTuple):
    """One run of a table.

    Attributes:
      data: the data set, a flagfile in sparse_xmc/cli/flags/data.
      model: name of the run in the table.
      seed: seed of the run.
      flagfiles: flagfiles shared with other runs.
      base: flagfile in sparse_xmc/cli/flags/models; equal to `model` without a grid.
      varied: the flags of the grid, as pairs (name, value).
    """

    data: str
    model: str
    seed: int
    flagfiles: tuple[str, ...]
    base: str
    varied: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return f"{self.data} {self.model} seed {self.seed}"

    @property
    def flags(self) -> list[str]:
        """The flags of `experiments.run`, without a working directory."""
        files = [
            *self.flagfiles,
            _FLAGS / "data" / f"{self.data}.cfg",
            _FLAGS / "models" / f"{self.base}.cfg",
        ]
        varied = [f"--{name}={value}" for name, value in self.varied]
        return [*(f"--flagfile={file}" for file in files), *varied, f"--seed={self.seed}"]

    def result(self, results: Path) -> Path:
        """Return the path of the result within the directory of results."""
        return results / self.data / f"{self.model}_seed{self.seed}.json"


def _combinations(grid: dict[str, list]) -> Iterator[tuple[tuple[str, object], ...]]:
    for values in itertools.product(*grid.values()):
        yield tuple(zip(grid, values, strict=True))


class Table(NamedTuple):
    """The contents of a table file."""

    title: str
    entries: list[Entry]

    @property
    def data(self) -> list[str]:
        """The data sets, in order."""
        return list(dict.fromkeys(entry.data for entry in self.entries))

    @property
    def models(self) -> list[str]:
        """The models, in order."""
        return list(dict.fromkeys(entry.model for entry in self.entries))


def read_table(path: str) -> Table:
    """Read a table file.

    Raises:
      ValueError: the file is malformed, lists an entry twice, or names a flagfile that does not exist.
    """
    try:
        with open(flagfiles.find_named(path, TABLES), "rb") as file:
            table = tomllib.load(file)
        shared = tuple(table.pop("flagfiles", ()))
        title, data, runs = table.pop("title"), table.pop("data"), table.pop("runs")
        entries = [
            Entry(
                name,
                "_".join([model, *(f"{flag}_{value}" for flag, value in varied)]),
                seed,
                shared + tuple(group.get("flagfiles", ())),
                model,
                varied,
            )
            for name in data
            for group in runs
            for model in group["models"]
            for varied in _combinations(group.get("grid", {}))
            for seed in group["seeds"]
        ]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a table file (see experiments.sweep): {error!r}") from error
    if table:
        raise ValueError(f"{path}: unknown keys: {', '.join(table)}")
    names = [str(entry) for entry in entries]
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: {duplicate} is listed twice")
    for entry in entries:
        try:
            flagfiles.expand(entry.flags)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: {entry}: {error}") from error
    return Table(title, entries)


def effective_flags(arguments: list[str]) -> dict:
    """Return the values of the flags of `experiments.run` that affect results, for given arguments."""
    return run_flags.effective_values(run_flags.values_of(arguments))


def _flags_of(result: Path) -> dict:
    """Return the values of the flags of a result, as `effective_flags` does."""
    return run_flags.effective_values(rename_settings(json.loads(result.read_text())["flags"]))


def _directory(runs: Path, values: dict) -> Path:
    """Return the working directory of a run, named by a hash of its flags that differ from the defaults."""
    defaults = run_flags.effective_values({})
    changed = {name: value for name, value in values.items() if value != defaults.get(name)}
    return runs / hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


def sweep(table: Table, results: Path, runs: Path, dry_run: bool = False) -> dict[Entry, str]:
    """Run all entries without a result.

    Args:
      table: the table.
      results: directory of the results.
      runs: directory of the working directories.
      dry_run: whether to print the commands instead of running them.

    Returns:
      The last lines of the output of each failed run.
    """
    failures = {}
    for i, entry in enumerate(table.entries, start=1):
        values, result = effective_flags(entry.flags), entry.result(results)
        workdir = _directory(runs, values)
        command = [sys.executable, "-m", "experiments.run", *entry.flags]
        command += [f"--workdir={workdir}", f"--name={entry.data} {entry.model}"]
        print(f"[{i}/{len(table.entries)}] {entry}: ", end="", flush=True)
        if result.exists() and _flags_of(result) == values:
            print(f"{result} already exists")
            continue
        if dry_run:
            print(shlex.join(command))
            continue
        if (workdir / "result.json").exists():
            print(f"{workdir} is already finished")
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
    """Run a command; return the last lines of its output if it failed, else None."""
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
    flags.DEFINE_string(
        "table", None, "Table file: its path, or its name in experiments/tables.", required=True
    )
    flags.DEFINE_string("results", None, "Directory to write results to.", required=True)
    flags.DEFINE_string("runs", "runs/sweep", "Directory for the working directories of runs.")
    flags.DEFINE_bool("dry_run", False, "Print the commands without running them.")


def main():
    """Run the table."""
    values = flags.FLAGS
    failures = sweep(read_table(values.table), Path(values.results), Path(values.runs), values.dry_run)
    if not values.dry_run:
        print("\n".join(_report(failures)))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    _define_flags()  # not on import: experiments.tables imports this module and has flags of the same names
    program.start(main)
