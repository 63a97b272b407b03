"""Tables of the results of a sweep, as text in Markdown and LaTeX, and as CSV."""

import collections
import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparse_xmc.data.files import new_path

from . import sweep
from .published import read_paper

MISSING = "missing"


class Column(NamedTuple):
    """A column of the table.

    Attributes:
      title: heading, with the unit.
      value: function from a result, as read from JSON, to the value.
      reported: name of the column in the paper's file.
      digits: number of decimals.
    """

    title: str
    value: Callable[[dict], float]
    reported: str
    digits: int


def _precision(k: int) -> Column:
    return Column(f"P@{k}", lambda result: 100 * result["test"][f"p@{k}"], f"test_p{k}", 2)


COLUMNS = (
    *map(_precision, (1, 3, 5)),
    Column("train P@1", lambda result: 100 * result["train"]["p@1"], "train_p1", 2),
    Column("memory, GiB", lambda result: result["peak_memory_bytes"] / 2**30, "peak_memory_gib", 2),
    Column("epochs", lambda result: result["epochs"], "epochs", 1),
    Column("s/epoch", lambda result: result["seconds_per_epoch"], "seconds_per_epoch", 1),
)


class Row(NamedTuple):
    """A row of the table: a model of a sweep on a data set.

    Attributes:
      data: the data set.
      model: the model.
      results: the existing results of its seeds, as read from JSON.
      wanted: number of seeds in the table file.
      paper: the paper's numbers by column name, or None.
    """

    data: str
    model: str
    results: list[dict]
    wanted: int
    paper: dict[str, str] | None

    @property
    def name(self) -> str:
        """The name of the model as text."""
        return model_title(self.model)

    def values(self, column: Column) -> np.ndarray:
        """Return the values of a column, one for each result."""
        return np.array([column.value(result) for result in self.results])

    def reported(self, column: Column) -> float | None:
        """Return the paper's value of a column, or None."""
        text = self.paper and self.paper[column.reported]
        return float(text) if text else None


def model_title(model: str) -> str:
    """Return the name of a model as text."""
    return model.replace("fixed_fan_in", "fixed fan-in").replace("_", " ")


def read_rows(table: sweep.Table, results: Path) -> list[Row]:
    """Return the rows of a table with all existing results.

    Raises:
      ValueError: a result file is malformed; the message names it.
    """
    paper = read_paper()
    rows = []
    for data in table.data:
        for model in table.models:
            entries = [entry for entry in table.entries if (entry.data, entry.model) == (data, model)]
            found = [read_result(path) for entry in entries if (path := entry.result(results)).exists()]
            rows.append(Row(data, model, found, len(entries), paper.get((data, model))))
    return rows


def read_result(path: Path) -> dict:
    """Read a result file.

    Raises:
      ValueError: it is malformed.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a result: {error}") from error


def text_lines(rows: list[Row]) -> list[list[str]]:
    """Return the table as text, with the heading first, and the paper's columns if any row has them."""
    with_paper = any(row.paper for row in rows)
    heading = ["system"]
    for column in COLUMNS:
        heading += [column.title, "paper"] if with_paper else [column.title]
    lines = [[*heading, "seeds"]]
    for row in rows:
        line = [row.name]
        for column in COLUMNS:
            line.append(_mean_and_spread(row.values(column), column.digits))
            if with_paper:
                reported = row.reported(column)
                line.append("" if reported is None else f"{reported:.{column.digits}f}")
        lines.append([*line, f"{len(row.results)} of {row.wanted}"])
    return lines


def _mean_and_spread(values: np.ndarray, digits: int) -> str:
    if len(values) == 0:
        return MISSING
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def markdown(lines: list[list[str]]) -> str:
    """Return a Markdown table of lines of text, of which the first is the heading."""
    heading, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([heading, "|---" + "|---:" * (len(lines[0]) - 1) + "|", *rest])


def latex(lines: list[list[str]]) -> str:
    r"""Return a LaTeX `tabular` (for the package booktabs) of lines of text, of which the first is the
    heading."""
    escape = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "±": r"$\pm$"})
    heading, *rest = (" & ".join(field.translate(escape) for field in line) + r" \\" for line in lines)
    columns = "l" + "r" * (len(lines[0]) - 1)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", heading, r"\midrule", *rest, r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"])


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write means, standard deviations and the paper's numbers; missing values are empty."""
    names = ["data", "model", "seeds"]
    for column in COLUMNS:
        names += [column.reported, f"{column.reported}_std", f"{column.reported}_paper"]
    lines = [names]
    for row in rows:
        line = [row.data, row.model, str(len(row.results))]
        for column in COLUMNS:
            values, reported = row.values(column), row.reported(column)
            line.append(f"{values.mean():.6g}" if len(values) else "")
            line.append(f"{values.std(ddof=1):.6g}" if len(values) > 1 else "")
            line.append("" if reported is None else f"{reported:g}")
        lines.append(line)
    write_lines(path, lines)


def write_lines(path: Path, lines: list[list[str]]) -> None:
    """Write lines of text to a CSV file."""
    with new_path(path) as partial, open(partial, "x", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def provenance(results: Iterable[dict]) -> list[str]:
    """Return the machines, versions, commits and memory measurements of results, as Markdown lines."""
    commits: dict[str, collections.Counter] = {}
    for result in results:
        e = result["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
        line = (
            f"{e['cpu']}, {e['cores']} cores, {e['threads']} threads, {e['memory_bytes'] / 2**30:.0f} GiB of "
            f"memory, device {e['device']}; {versions}. Memory is the {result['peak_memory_measured_as']}."
        )
        commits.setdefault(line, collections.Counter())[e["commit"]] += 1
    return [
        f"- {line} Runs by commit: {', '.join(f'{count} at {commit}' for commit, count in counts.items())}."
        for line, counts in commits.items()
    ]
