"""Figures of the results of a sweep, and of the label scale."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_xmc.data.files import new_file
from sparse_xmc.metrics import LABEL_GROUPS

from . import prepare
from .published import read_paper
from .result_tables import COLUMNS, Row, model_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FOUR_GB = 4.0  # GiB, the memory of a commodity GPU according to the paper
_TITLES = {
    "dense": "dense: each label reads all 768 features",
    "bottleneck_64": "bottleneck: each label reads all of 64 hidden units",
    "fixed_fan_in_32_32k": "fixed fan-in: 32 inputs per label, of 32,768 hidden units",
}


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
            paths.append(save_figure(figure, out / f"{prefix}_{name}.png"))
    return paths


def _new_figure(**options: Any) -> "Figure":
    """Return an empty figure of matplotlib, an optional dependency that is imported only here."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            "figures need matplotlib: pip install 'sparse-xmc[experiments]', "
            "or in a clone pip install -e '.[experiments]'"
        ) from error
    return Figure(**options)


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure to a file, and return its path."""
    with new_file(path) as file:
        # The version of matplotlib is omitted, so that equal figures are identical files.
        figure.savefig(
            file, format=path.suffix[1:], dpi=100, bbox_inches="tight", metadata={"Software": None}
        )
    return path


def _draw_curves(axes: "Axes", rows: list[Row], name: str, scale: float = 1) -> None:
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
    axes.set(yscale="log", ylabel="fraction of logits with a gradient")
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


def draw_label_scale(results: list[dict]) -> "Figure":
    """Draw memory, with a line at 4 GiB and the paper's results, and time, by number of labels.

    Each model has a colour. Error bars of times are from the first to the third quartile over the steps.
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
        memory.plot(labels, gib, label=_TITLES.get(model, model_title(model)), **style)
        seconds.errorbar(labels, median, yerr=(median - first, third - median), capsize=3, **style)
    for (_, model), row in read_paper().items():
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
