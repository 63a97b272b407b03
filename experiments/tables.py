r"""Render the tables and figures of a sweep from its result files.

    python -m experiments.tables --table=wordnet --results=experiments/results/sweeps \
        --out=experiments/results/tables

writes to OUT a Markdown, a CSV and a LaTeX file named like the table file, and the figures of the Markdown
file. The paper's numbers (experiments/paper) are shown beside ours where it reports the data set and the
model; published results of encoders trained on the same raw text are shown below. Numbers are means over
seeds, with the standard deviation between seeds after a ±. Missing results are marked.

    python -m experiments.tables --label_scale=experiments/results/label_scale \
        --out=experiments/results/tables

renders the results of `experiments.label_scale`.
"""

import collections
import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import app, flags

from sparse_xmc.data.files import new_file, new_path, write_text
from sparse_xmc.metrics import LABEL_GROUPS

from . import prepare, program, sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = Path(__file__).parent / "paper" / "reported_results.csv"
END_TO_END = PAPER.with_name("end_to_end.csv")
MISSING = "missing"
_FOUR_GB = 4.0  # GiB, the memory of a commodity GPU according to the paper


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
        return _words(self.model)

    def values(self, column: Column) -> np.ndarray:
        """Return the values of a column, one for each result."""
        return np.array([column.value(result) for result in self.results])

    def reported(self, column: Column) -> float | None:
        """Return the paper's value of a column, or None."""
        text = self.paper and self.paper[column.reported]
        return float(text) if text else None


def _words(model: str) -> str:
    return model.replace("fixed_fan_in", "fixed fan-in").replace("_", " ")


def read_reported() -> dict[tuple[str, str], dict[str, str]]:
    """Read the paper's rows, by our names of the data set and the model."""
    with open(PAPER, encoding="utf-8", newline="") as file:
        return {(_data_name(row), _cell_name(row)): row for row in csv.DictReader(file)}


def _data_name(row: dict[str, str]) -> str:
    return f"{row['dataset']}_{row['features']}".lower()


def read_end_to_end() -> dict[str, list[dict[str, str]]]:
    """Read published results of encoders trained end to end, by our names of the raw text."""
    found: dict[str, list[dict[str, str]]] = {}
    with open(END_TO_END, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            name = row["dataset"].lower()
            found.setdefault(name if name.startswith("lf-") else f"raw_{name}", []).append(row)
    return found


def _cell_name(row: dict[str, str]) -> str:
    width = int(row["intermediate"])
    parts = [row["output_layer"]]
    if row["output_layer"] == "bottleneck":
        parts.append(str(width))
    elif row["output_layer"] != "dense":
        parts.append(row["fan_in"])
        if width:
            parts.append(f"{width // 1024}k" if width % 1024 == 0 else f"{width // 1000}k")
    if row["loss"] != "squared_hinge":
        parts.append(f"loss_{row['loss']}")
    return "_".join(parts)


def read_rows(table: sweep.Table, results: Path) -> list[Row]:
    """Return the rows of a table with all existing results.

    Raises:
      ValueError: a result file is malformed; the message names it.
    """
    reported = read_reported()
    rows = []
    for data in table.data:
        for model in table.models:
            entries = [entry for entry in table.entries if (entry.data, entry.model) == (data, model)]
            found = [_read(path) for entry in entries if (path := entry.result(results)).exists()]
            rows.append(Row(data, model, found, len(entries), reported.get((data, model))))
    return rows


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a result: {error}") from error


# ---- text ----


def cells_of(rows: list[Row]) -> list[list[str]]:
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
    with new_path(path) as side, open(side, "x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            line = [row.data, row.model, len(row.results)]
            for column in COLUMNS:
                values, reported = row.values(column), row.reported(column)
                line.append(f"{values.mean():.6g}" if len(values) else "")
                line.append(f"{values.std(ddof=1):.6g}" if len(values) > 1 else "")
                line.append("" if reported is None else f"{reported:g}")
            writer.writerow(line)


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


def end_to_end_lines(rows: list[dict[str, str]]) -> list[list[str]]:
    """Return rows of `read_end_to_end` as a table of text, with the heading first."""
    columns = {"system": "system", "encoder": "encoder", "P@1": "test_p1", "memory, GiB": "peak_memory_gib"}
    columns |= {"s/epoch": "seconds_per_epoch", "source": "source"}
    return [list(columns), *([row[column] for column in columns.values()] for row in rows)]


# ---- figures ----


def draw(rows: list[Row], prefix: str, out: Path) -> list[Path]:
    """Draw all figures that the results of one data set allow, and return their paths."""
    finished = [row for row in rows if row.results]
    figures = {
        "memory": _draw_memory(rows),
        "epochs": _draw_epochs(finished),
        "density": _draw_density(finished),
        "groups": _draw_groups(finished),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(_save(figure, out / f"{prefix}_{name}.png"))
    return paths


def _new_figure(**options: Any) -> "Figure":
    """Return an empty figure of matplotlib, an optional dependency that is imported only here."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'sparse-xmc[experiments]', "
            "or in a clone pip install -e '.[experiments]'"
        ) from error
    return Figure(**options)


def _save(figure: "Figure", path: Path) -> Path:
    with new_file(path) as file:
        # The version of matplotlib is omitted, so that equal figures are identical files.
        figure.savefig(
            file, format=path.suffix[1:], dpi=100, bbox_inches="tight", metadata={"Software": None}
        )
    return path


def _draw_curves(axes, rows: list[Row], name: str, scale: float = 1) -> None:
    """Draw a field of the history by epoch, as the mean over the seeds that reached the epoch."""
    for i, row in enumerate(rows):
        series = [[scale * record[name] for record in result["history"]] for result in row.results]
        longest = max(map(len, series))
        padded = np.array([[*values, *[np.nan] * (longest - len(values))] for values in series])
        linestyle = ("-", "--", ":", "-.")[i // 10 % 4]
        axes.plot(
            np.arange(1, longest + 1),
            np.nanmean(padded, axis=0),
            label=row.name,
            color=f"C{i % 10}",
            linestyle=linestyle,
        )
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)


def _draw_memory(rows: list[Row]) -> "Figure | None":
    """Draw P@k against peak memory; the paper's results have hollow markers."""
    rows = [row for row in rows if row.results or row.paper]
    if not rows:
        return None
    figure = _new_figure(figsize=(15, 4.5))
    (memory,) = (column for column in COLUMNS if column.title.startswith("memory"))
    for axes, column in zip(figure.subplots(1, 3), COLUMNS[:3], strict=True):
        for i, row in enumerate(rows):
            style = {"color": f"C{i % 10}", "marker": "os^D"[i // 10 % 4], "linestyle": ""}
            label: str | None = row.name
            if row.results:
                axes.plot(row.values(memory).mean(), row.values(column).mean(), label=label, **style)
                label = None
            if row.paper:
                at = row.reported(memory), row.reported(column)
                axes.plot(*at, label=label, markerfacecolor="none", **style)
        axes.set(xlabel="peak memory, GiB", ylabel=f"test {column.title}, %")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def _draw_epochs(rows: list[Row]) -> "Figure | None":
    """Draw P@k on the validation points after each epoch."""
    if not rows:
        return None
    figure = _new_figure(figsize=(15, 4.5))
    for axes, k in zip(figure.subplots(1, 3), (1, 3, 5), strict=True):
        _draw_curves(axes, rows, f"p@{k}", scale=100)
        axes.set_ylabel(f"validation P@{k}, %")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def _draw_density(rows: list[Row]) -> "Figure | None":
    """Draw the fraction of logits with a gradient after each epoch."""
    rows = [row for row in rows if "gradient_density" in row.results[0]["history"][0]]
    if not rows:
        return None
    figure = _new_figure(figsize=(7, 4.5))
    axes = figure.subplots()
    _draw_curves(axes, rows, "gradient_density")
    axes.set(yscale="log", ylabel="logits with a gradient, as a part of all")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def _draw_groups(rows: list[Row]) -> "Figure | None":
    """Draw P@1 within head, middle and tail labels."""
    if not rows:
        return None
    figure = _new_figure(figsize=(10, 4.5))
    axes = figure.subplots()
    width = 0.9 / len(rows)
    for i, row in enumerate(rows):
        values = [
            np.mean([100 * (result["test_p@1_by_group"][group] or 0) for result in row.results])
            for group in LABEL_GROUPS
        ]
        axes.bar(
            np.arange(3) + (i - len(rows) / 2 + 0.5) * width,
            values,
            width,
            label=row.name,
            color=f"C{i % 10}",
            hatch=("", "//", "..", "xx")[i // 10 % 4],
        )
    sizes = rows[0].results[0]["labels_by_group"]
    axes.set_xticks(range(3), [f"{g}: {n:,} labels" for g, n in zip(LABEL_GROUPS, sizes, strict=True)])
    axes.set_ylabel("test P@1 among the group's labels, %")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


# ---- reports ----

_CAPTIONS = {
    "memory": "Test P@k against peak memory; hollow marks are the paper's.",
    "epochs": "P@k on the validation points after each epoch.",
    "density": "The part of the logits at which the squared hinge has a gradient, on a few training "
    "batches after each epoch.",
    "groups": "Test P@1 among head, middle and tail labels. Each group has a third of all label occurrences "
    "in the training set; counted are the points with a label of the group, by the best label of the group.",
}


def report(table: sweep.Table, rows: list[Row], name: str, out: Path) -> None:
    """Write `name`.md, .csv and .tex, and the figures."""
    out.mkdir(parents=True, exist_ok=True)
    text = [f"# {table.title}"]
    tex = []
    others = read_end_to_end()
    for data in table.data:
        of_data = [row for row in rows if row.data == data]
        lines = cells_of(of_data)
        tex += [f"% {data}", latex(lines)]
        text += [f"## {data}", markdown(lines)]
        if data in others:
            text += [
                "Encoders trained end to end, as others report them:",
                markdown(end_to_end_lines(others[data])),
            ]
        for path in draw(of_data, f"{name}_{data}" if len(table.data) > 1 else name, out):
            text.append(f"![{path.stem}]({path.name})\n\n{_CAPTIONS[path.stem.rpartition('_')[2]]}")
    notes = provenance(result for row in rows for result in row.results)
    text.append("\n".join(["P@k in percent, on the test points.", "", *notes]))
    write_text(out / f"{name}.md", "\n\n".join(text) + "\n")
    write_text(out / f"{name}.tex", "\n".join(tex) + "\n")
    write_csv(out / f"{name}.csv", rows)


# ---- label scale ----

_LONG_NAMES = {
    "dense": "dense: each label reads all 768 features",
    "bottleneck_64": "bottleneck: each label reads all of 64 hidden units",
    "fixed_fan_in_32_32k": "fixed fan-in: 32 inputs per label, of 32,768 hidden units",
}
_PARTS = ("features", "loss", "gradients", "step", "step, all gradients", "rewiring")


def read_label_scale(results: Path) -> list[dict]:
    """Read the results of `experiments.label_scale`, sorted by number of labels and system.

    Raises:
      ValueError: there are no results, or one is malformed.
    """
    found = [_read(path) for path in sorted(results.glob("*.json"))]
    if not found:
        raise ValueError(f"{results}: no results")
    return sorted(found, key=lambda result: (result["scale"]["labels"], result["model"]))


def report_label_scale(results: list[dict], out: Path) -> None:
    """Write label_scale.md, .csv and .tex, and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    heading = ["labels", "system", "memory, GiB", *(f"{part}, ms" for part in _PARTS), "epoch, min"]
    lines = [heading]
    for result in results:
        line = [f"{result['scale']['labels']:,}", _words(result["model"])]
        if "failed" in result:
            line += [result["failed"], *[""] * (len(heading) - 3)]
        else:
            line.append(f"{result['peak_memory_bytes'] / 2**30:.2f}")
            line += [f"{1000 * result['seconds'][part]:.1f}" for part in _PARTS]
            line.append(f"{result['epoch_seconds'] / 60:.1f}")
        lines.append(line)
    finished = [result for result in results if "failed" not in result]
    text = [
        "# Label scale",
        markdown(lines),
        "![label_scale](label_scale.png)",
        "Peak memory and the median time of a step against the number of labels, on synthetic points; bars "
        "are quartiles, hollow marks the paper's memory of the same systems. Each part of a step is timed "
        "with all before it: features, with the loss, with gradients, with the update. Unless it says all, "
        "nearly no logit has a gradient.",
        "\n".join(provenance(finished)),
    ]
    write_text(out / "label_scale.md", "\n\n".join(text) + "\n")
    write_text(out / "label_scale.tex", latex(lines) + "\n")
    with new_path(out / "label_scale.csv") as side, open(side, "x", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    _save(_draw_label_scale(finished), out / "label_scale.png")


def _draw_label_scale(results: list[dict]) -> "Figure":
    """Draw memory, with a line at 4 GiB and the paper's results, and time, by number of labels.

    Each system has a colour. Error bars of times are from the first to the third quartile over the steps.
    """
    figure = _new_figure(figsize=(11, 4.8), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    models = dict.fromkeys(result["model"] for result in results)
    colors = {model: f"C{i}" for i, model in enumerate(models)}
    for model, color in colors.items():
        ours = [result for result in results if result["model"] == model]
        labels = [result["scale"]["labels"] for result in ours]
        gib = [result["peak_memory_bytes"] / 2**30 for result in ours]
        first, median, third = np.transpose([result["seconds_quartiles"]["step"] for result in ours])
        style = {"color": color, "marker": "o", "markersize": 4}
        memory.plot(labels, gib, label=_LONG_NAMES.get(model, _words(model)), **style)
        seconds.errorbar(labels, median, yerr=(median - first, third - median), capsize=3, **style)
    for (_, model), row in read_reported().items():
        published = float(row["peak_memory_gib"])
        if model in colors and published > 0:  # 0.0 cannot be shown on a logarithmic axis.
            at = prepare.DATASETS[row["dataset"]].labels
            memory.plot(at, published, color=colors[model], marker="o", linestyle="", markerfacecolor="none")
    memory.plot([], color="grey", marker="o", linestyle="", markerfacecolor="none", label="paper, GPU memory")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    memory.axhline(_FOUR_GB, color="grey", linestyle="--", linewidth=1)
    memory.annotate("4 GiB", (1e4, _FOUR_GB), xytext=(0, 4), textcoords="offset points", color="grey")
    memory.set_ylabel("peak memory of a training step, GiB")
    seconds.set_ylabel("time of a training step, s")
    for axes in (memory, seconds):
        axes.set(xscale="log", yscale="log", xlabel="number of labels")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _define_flags() -> None:
    flags.DEFINE_string("table", None, "The table file, as for experiments.sweep.")
    flags.DEFINE_string("results", None, "Directory of the results of experiments.sweep.")
    flags.DEFINE_string("label_scale", None, "Directory of the results of experiments.label_scale.")
    flags.DEFINE_string("out", None, "Directory that tables and pictures go to.", required=True)


def main():
    """Write the report that the flags describe."""
    values = flags.FLAGS
    out = Path(values.out)
    if (values.table is None) == (values.label_scale is None):
        raise app.UsageError("expected either --table, with --results, or --label_scale")
    if values.table is None:
        name = "label_scale"
        report_label_scale(read_label_scale(Path(values.label_scale)), out)
    else:
        if values.results is None:
            raise app.UsageError("--table needs --results")
        table = sweep.read_table(values.table)
        name = Path(values.table).stem
        report(table, read_rows(table, Path(values.results)), name, out)
    print((out / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    _define_flags()
    program.start(main)
