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

from pathlib import Path

from absl import app, flags

from sparse_xmc.cli import program
from sparse_xmc.data.files import write_text

from . import sweep
from .figures import draw, draw_label_scale, save_figure
from .published import read_end_to_end
from .result_tables import (
    Row,
    latex,
    markdown,
    model_title,
    provenance,
    read_result,
    read_rows,
    text_lines,
    write_csv,
    write_lines,
)

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
    published = read_end_to_end()
    for data in table.data:
        data_rows = [row for row in rows if row.data == data]
        lines = text_lines(data_rows)
        tex += [f"% {data}", latex(lines)]
        text += [f"## {data}", markdown(lines)]
        if data in published:
            text += [
                "Published results of encoders trained end to end:",
                markdown(_end_to_end_lines(published[data])),
            ]
        for path in draw(data_rows, f"{name}_{data}" if len(table.data) > 1 else name, out):
            text.append(f"![{path.stem}]({path.name})\n\n{_CAPTIONS[path.stem.rpartition('_')[2]]}")
    notes = provenance(result for row in rows for result in row.results)
    text.append("\n".join(["P@k in percent, on the test points.", "", *notes]))
    write_text(out / f"{name}.md", "\n\n".join(text) + "\n")
    write_text(out / f"{name}.tex", "\n".join(tex) + "\n")
    write_csv(out / f"{name}.csv", rows)


def _end_to_end_lines(rows: list[dict[str, str]]) -> list[list[str]]:
    """Return rows of `read_end_to_end` as a table of text, with the heading first."""
    columns = {"system": "system", "encoder": "encoder", "P@1": "test_p1", "memory, GiB": "peak_memory_gib"}
    columns |= {"s/epoch": "seconds_per_epoch", "source": "source"}
    return [list(columns), *([row[column] for column in columns.values()] for row in rows)]


# ---- label scale ----

_PARTS = ("features", "loss", "gradients", "step", "step, all gradients", "rewiring")


def read_label_scale(results: Path) -> list[dict]:
    """Read the results of `experiments.label_scale`, sorted by number of labels and model.

    Raises:
      ValueError: there are no results, or one is malformed.
    """
    found = [read_result(path) for path in sorted(results.glob("*.json"))]
    if not found:
        raise ValueError(f"{results}: no results")
    return sorted(found, key=lambda result: (result["scale"]["labels"], result["model"]))


def report_label_scale(results: list[dict], out: Path) -> None:
    """Write label_scale.md, .csv and .tex, and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    heading = ["labels", "system", "memory, GiB", *(f"{part}, ms" for part in _PARTS), "epoch, min"]
    lines = [heading]
    for result in results:
        line = [f"{result['scale']['labels']:,}", model_title(result["model"])]
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
        "are quartiles, hollow marks the paper's memory of the same models. Times are cumulative: features; "
        "plus the loss; plus gradients; plus the update. Nearly no logit has a gradient, except in the "
        "column `step, all gradients`.",
        "\n".join(provenance(finished)),
    ]
    write_text(out / "label_scale.md", "\n\n".join(text) + "\n")
    write_text(out / "label_scale.tex", latex(lines) + "\n")
    write_lines(out / "label_scale.csv", lines)
    save_figure(draw_label_scale(finished), out / "label_scale.png")


def _define_flags() -> None:
    flags.DEFINE_string("table", None, "Table file: its path, or its name in experiments/tables.")
    flags.DEFINE_string("results", None, "Directory of the results of experiments.sweep.")
    flags.DEFINE_string("label_scale", None, "Directory of the results of experiments.label_scale.")
    flags.DEFINE_string("out", None, "Directory to write tables and figures to.", required=True)


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
