"""Tests of tables and figures of made-up results."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments import figures, result_tables, sweep, tables
from experiments.published import read_paper

ROOT = Path(experiments.__file__).parents[1]


def make_result(p1=0.5, *, commit="abc", epochs=3, seconds=2.0, density=True):
    history = [
        {"epoch": e + 1, "p@1": p1 * e, "p@3": 0.2, "p@5": 0.1, "gradient_density": 0.5**e}
        for e in range(epochs)
    ]
    if not density:
        history = [{k: v for k, v in record.items() if k != "gradient_density"} for record in history]
    return {
        "test": {"p@1": p1, "p@3": 0.4, "p@5": 0.3},
        "train": {"p@1": 0.9},
        "test_p@1_by_group": {"head": 0.6, "middle": 0.3, "tail": None},
        "labels_by_group": [2, 30, 1400],
        "peak_memory_bytes": 3 << 29,
        "peak_memory_measured_as": "peak of something",
        "epochs": epochs,
        "seconds_per_epoch": seconds,
        "environment": {
            "cpu": "a processor",
            "cores": 2,
            "threads": 4,
            "memory_bytes": 8 << 30,
            "device": "cpu",
            "versions": {"jax": "1.2"},
            "commit": commit,
        },
        "history": history,
    }


def make_table(*entries):
    return sweep.Table("A title", [sweep.Entry(*entry, (), entry[1]) for entry in entries])


def write(results, table, *contents):
    for entry, content in zip(table.entries, contents, strict=True):
        if content is not None:
            path = entry.result(results)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))


@pytest.fixture
def report(tmp_path):
    """Return a function that writes the report of a table and results, and returns its directory."""

    def make(table, *contents):
        write(tmp_path / "results", table, *contents)
        tables.report(table, result_tables.read_rows(table, tmp_path / "results"), "name", tmp_path / "out")
        return tmp_path / "out"

    return make


MODEL = "fixed_fan_in_32_16k"
TABLE = make_table(
    ("amazon-670k_slice", MODEL, 0),
    ("amazon-670k_slice", MODEL, 1),
    ("amazon-670k_slice", "dense", 0),
    ("amazon-670k_slice", "fixed_fan_in_32_8k", 0),
)


def test_markdown_shows_paper_columns(report):
    text = (
        report(TABLE, make_result(0.3), make_result(0.34), None, make_result(0.25)) / "name.md"
    ).read_text()
    lines = [[field.strip() for field in line.strip("|").split("|")] for line in text.splitlines()]
    heading = (
        "system|P@1|paper|P@3|paper|P@5|paper|train P@1|paper|memory, GiB|paper|epochs|paper|s/epoch|paper"
    )
    assert [*heading.split("|"), "seeds"] in lines
    # The mean of 30 and 34, and the standard deviation sqrt(2 * 2^2 / 1).
    ours = ["fixed fan-in 32 16k", "32.00 ± 2.83", "31.73", "40.00 ± 0.00", "27.86", "30.00 ± 0.00", "25.02"]
    ours += ["90.00 ± 0.00", "98.22", "1.50 ± 0.00", "1.11", "3.0 ± 0.0", "42.0", "2.0 ± 0.0", "259.0"]
    assert [*ours, "2 of 2"] in lines
    dense = "dense|missing|33.76|missing|29.62|missing|26.58|missing|99.18|missing|8.96|missing|27.2|missing"
    assert [*dense.split("|"), "472.0", "0 of 1"] in lines
    unpublished = "fixed fan-in 32 8k|25.00||40.00||30.00||90.00||1.50||3.0||2.0|"
    assert [*unpublished.split("|"), "1 of 1"] in lines


def test_markdown_omits_paper_columns_without_published_numbers(report):
    table = make_table(("wordnet", "dense", 0))
    out = report(table, make_result(0.3))
    assert "| system | P@1 | P@3 | P@5 |" in (out / "name.md").read_text()
    assert (
        "| dense | 30.00 | 40.00 | 30.00 | 90.00 | 1.50 | 3.0 | 2.0 | 1 of 1 |"
        in (out / "name.md").read_text()
    )


def test_markdown_lists_machines_and_commits(report):
    text = (
        report(TABLE, make_result(), make_result(), None, make_result(commit="def")) / "name.md"
    ).read_text()
    machine = "a processor, 2 cores, 4 threads, 8 GiB of memory, device cpu; jax 1.2."
    memory = "Memory is the peak of something."
    assert f"- {machine} {memory} Runs by commit: 2 at abc, 1 at def.\n" in text


def test_csv_values(report):
    out = report(TABLE, make_result(0.3), make_result(0.34), None, make_result(0.25))
    with open(out / "name.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == [MODEL, "dense", "fixed_fan_in_32_8k"]
    assert [rows[0][f"test_p1{end}"] for end in ("", "_std", "_paper")] == ["32", "2.82843", "31.73"]
    assert [rows[1][f"test_p1{end}"] for end in ("", "_std", "_paper")] == ["", "", "33.76"]
    assert [rows[2][f"test_p1{end}"] for end in ("", "_std", "_paper")] == ["25", "", ""]


def test_latex_table(report):
    tex = (report(TABLE, make_result(0.3), make_result(0.34), None, None) / "name.tex").read_text()
    assert r"fixed fan-in 32 16k & 32.00 $\pm$ 2.83 & 31.73 &" in tex
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 4
    assert {line.count("&") for line in body} == {15}  # one less than the number of columns
    assert r"\begin{tabular}{l" + 15 * "r" + "}" in tex


def test_latex_escapes_special_characters():
    assert r"50\% \_ \& & b \\" in result_tables.latex([["50% _ &", "b"]])


def test_report_draws_and_links_figures(report):
    out = report(TABLE, make_result(), make_result(epochs=2), None, make_result(density=False))
    figure_names = {path.name for path in out.glob("*.png")}
    assert figure_names == {f"name_{kind}.png" for kind in ("memory", "epochs", "density", "groups")}
    text = (out / "name.md").read_text()
    for name in figure_names:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


def test_report_without_results_draws_only_memory_of_paper(report):
    out = report(TABLE, None, None, None, None)
    assert [path.name for path in out.glob("*.png")] == ["name_memory.png"]
    nothing = report(make_table(("wordnet", "dense", 0)), None)
    assert "missing" in (nothing / "name.md").read_text()


def test_draw_curves_averages_over_available_seeds():
    axes = figures._new_figure().subplots()
    row = result_tables.Row("d", "c", [make_result(0.2), make_result(0.4, epochs=4)], 2, None)
    figures._draw_curves(axes, [row], "p@1", scale=100)
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(line.get_ydata(), [0, 30, 60, 120])


def test_draw_memory_shows_means_and_paper():
    reported = read_paper()["amazon-670k_slice", "dense"]
    row = result_tables.Row("d", "c", [make_result(0.2), make_result(0.4)], 2, reported)
    ours, paper = figures._draw_memory([row]).axes[0].lines
    np.testing.assert_allclose([*ours.get_xdata(), *ours.get_ydata()], [1.5, 30])
    np.testing.assert_allclose([*paper.get_xdata(), *paper.get_ydata()], [8.96, 33.76])


def test_report_has_section_and_figures_per_data_set(report):
    table = make_table(("wordnet", "dense", 0), ("wordnet_full", "dense", 0))
    out = report(table, make_result(), make_result())
    assert (out / "name.md").read_text().count("\n## ") == 2
    assert {"name_wordnet_memory.png", "name_wordnet_full_memory.png"} <= {
        path.name for path in out.glob("*")
    }


def test_read_rows_raises_for_damaged_result(tmp_path):
    table = make_table(("wordnet", "dense", 0))
    write(tmp_path, table, make_result())
    path = table.entries[0].result(tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"dense_seed0\.json: not a result"):
        result_tables.read_rows(table, tmp_path)


def test_published_rows_match_table_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    reported = read_paper()
    assert len(reported) == 58 + 5 + 4  # Names of rows are unique.
    listed = {}
    for path in Path("experiments/tables").glob("*.toml"):
        listed |= {(entry.data, entry.model): entry for entry in sweep.read_table(str(path)).entries}
    assert reported.keys() <= listed.keys()
    for key, row in reported.items():
        values = sweep.effective_flags(listed[key].flags)
        assert values["head"] == row["output_layer"]
        assert (values["penultimate"] or 0) == int(row["intermediate"])
        assert values["loss"] == row["loss"]
        assert (values["fan_in"] or 0) == int(row["fan_in"])


def test_program_writes_tables(tmp_path):
    (tmp_path / "probe.toml").write_text(
        'title = "Probe"\ndata = ["wordnet"]\n[[runs]]\nmodels = ["dense"]\nseeds = [0]\n'
    )
    write(tmp_path / "results", make_table(("wordnet", "dense", 0)), make_result(0.31))
    command = [sys.executable, "-m", "experiments.tables", f"--table={tmp_path / 'probe.toml'}"]
    command += [f"--results={tmp_path / 'results'}", f"--out={tmp_path / 'out'}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "| dense | 31.00 |" in printed
    assert (tmp_path / "out" / "probe.csv").exists()
