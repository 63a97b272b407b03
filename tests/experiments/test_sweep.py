"""Tests of `experiments.sweep` on tiny runs, and of all flagfiles and table files of the project."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

import experiments
from experiments import sweep
from sparse_xmc.cli.run_flags import effective_values
from sparse_xmc.data import write_tsv

ROOT = Path(experiments.__file__).parents[1]


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """Run in the root of the repository, to which paths in flagfiles are relative."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with flagfiles for tiny runs, and a link to the programs."""
    rng = np.random.default_rng(0)
    for name, size in (("train", 30), ("test", 10)):
        labels = [[f"{i}" for i in sorted(rng.choice(12, 2, replace=False))] for _ in range(size)]
        write_tsv(tmp_path / f"{name}.tsv", labels, [" ".join(f"word{i}" for i in row) for row in labels])
    files = {
        "shared.cfg": ["--embedding=4", "--penultimate=0", "--fan_in=2", "--batch_size=10", "--epochs=1"],
        "experiments/flags/data/tiny.cfg": ["--train=train.tsv", "--test=test.tsv", "--dropout=0.2"],
        "experiments/flags/models/dense.cfg": ["--head=dense"],
        "experiments/flags/models/sparse.cfg": ["--head=fixed_fan_in"],
        "experiments/flags/models/alias.cfg": ["--fan_in=2", "--head=dense"],
        "experiments/flags/models/broken.cfg": ["--fan_in=1000"],
    }
    for name, lines in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def write_table(path, models, seeds="[0]"):
    runs = f"[[runs]]\nmodels = {json.dumps(models)}\nseeds = {seeds}\n"
    path.write_text(f'title = "Tiny"\ndata = ["tiny"]\nflagfiles = ["shared.cfg"]\n{runs}')
    return str(path)


def run_sweep(*arguments):
    command = [sys.executable, "-m", "experiments.sweep", "--results=results", "--runs=runs", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_sweep_continues_after_failures_and_skips_finished_runs(project):
    table = write_table(project / "table.toml", ["broken", "dense", "alias", "sparse"])
    finished = run_sweep(f"--table={table}")
    assert finished.returncode == 1
    assert "1 of the runs failed" in finished.stdout
    assert "tiny broken seed 0 failed:" in finished.stdout
    assert "fan_in must be between 1 and in_features" in finished.stdout
    results = sorted(path.relative_to(project / "results").as_posix() for path in project.glob("results/*/*"))
    assert results == [f"tiny/{name}_seed0.json" for name in ("alias", "dense", "sparse")]
    assert len(list(project.glob("runs/*/result.json"))) == 2  # dense and alias are one run
    assert finished.stdout.count("is already finished") == 1

    times = {path: path.stat().st_mtime_ns for path in project.glob("runs/*/result.json")}
    (project / "results" / "tiny" / "dense_seed0.json").unlink()
    again = run_sweep(f"--table={table}")
    assert again.stdout.count("already exists") == 2
    assert again.stdout.count("is already finished") == 1
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (project / "results" / "tiny" / "dense_seed0.json").exists()

    # A stopped run is resumed in the same directory.
    (stopped,) = (path for path in times if json.loads(path.read_text())["name"] == "tiny sparse")
    stopped.unlink()
    (project / "results" / "tiny" / "sparse_seed0.json").unlink()
    resumed = run_sweep(f"--table={write_table(project / 'resumed.toml', ['sparse'])}")
    assert resumed.returncode == 0
    assert "all runs have results" in resumed.stdout
    assert stopped.exists()


def test_dry_run_prints_commands(project):
    finished = run_sweep("--dry_run", f"--table={write_table(project / 'table.toml', ['dense'])}")
    assert finished.returncode == 0
    assert "--flagfile=experiments/flags/models/dense.cfg --seed=0 --workdir=runs/" in finished.stdout
    assert not (project / "runs").exists()


def test_effective_flags_use_last_value(project):
    entry = sweep.Entry("tiny", "sparse", 3, ("shared.cfg",), "sparse")
    before = flags.FLAGS["fan_in"].value
    values = sweep.effective_flags([*entry.flags, "--name=other", "--workdir=elsewhere"])
    assert values["seed"] == 3
    assert values["dropout"] == 0.2
    assert values["fan_in"] == 2
    assert values["batch_size"] == 10
    assert not values.keys() & {"name", "workdir", "checkpoint_minutes"}
    assert flags.FLAGS["fan_in"].value == before


def test_effective_flags_ignore_command_line():
    flag, before = flags.FLAGS["batch_size"], sweep.effective_flags([])
    try:
        flag.parse("5")
        assert sweep.effective_flags([]) == before
    finally:
        flag.unparse()


def test_directory_depends_only_on_flags_that_affect_results():
    def directory(*arguments):
        return sweep._directory(Path("runs"), sweep.effective_flags(["--train=a", "--test=b", *arguments]))

    assert directory() == directory("--workdir=x", "--fan_in=32", "--name=y")
    assert directory() != directory("--fan_in=33")
    assert directory("--seed=1") != directory("--seed=2")


def test_effective_flags_ignore_flags_of_other_heads():
    values = sweep.effective_flags(["--head=dense", "--train=a"])
    assert sweep.effective_flags(["--head=dense", "--train=a", "--fan_in=5"]) == values
    assert values["fan_in"] is None
    assert sweep.effective_flags(["--head=bottleneck"])["penultimate"] == 64
    assert sweep.effective_flags([])["penultimate"] == 8192


def test_grid_expands_to_all_combinations(project):
    (project / "table.toml").write_text(
        'title = "x"\ndata = ["tiny"]\nflagfiles = ["shared.cfg"]\n'
        '[[runs]]\nmodels = ["dense"]\nseeds = [0]\n'
        '[[runs]]\nmodels = ["sparse"]\nseeds = [0, 1]\ngrid = { dropout = [0, 0.5], loss = ["bce"] }\n'
    )
    entries = sweep.read_table("table.toml").entries
    assert [str(entry) for entry in entries] == [
        "tiny dense seed 0",
        *(f"tiny sparse_dropout_{d}_loss_bce seed {seed}" for d in (0, 0.5) for seed in (0, 1)),
    ]
    values = sweep.effective_flags(entries[-1].flags)
    assert (values["dropout"], values["loss"], values["seed"], values["embedding"]) == (0.5, "bce", 1, 4)


def test_flagfiles_of_runs_follow_shared_flagfiles(project):
    (project / "own.cfg").write_text("--embedding=5\n--dropout=0.3\n")
    (project / "table.toml").write_text(
        'title = "x"\ndata = ["tiny"]\nflagfiles = ["shared.cfg"]\n'
        '[[runs]]\nmodels = ["dense"]\nseeds = [0]\nflagfiles = ["own.cfg"]\n'
        '[[runs]]\nmodels = ["sparse"]\nseeds = [0]\n'
    )
    dense, sparse = (sweep.effective_flags(e.flags) for e in sweep.read_table("table.toml").entries)
    assert (dense["embedding"], sparse["embedding"]) == (5, 4)  # after the flagfiles of all runs
    assert (dense["dropout"], sparse["dropout"]) == (0.2, 0.2)  # before the flagfile of the data


def test_result_flags_use_default_of_missing_flag():
    values = sweep.effective_flags(["--train=a", "--test=b"])
    older = {name: value for name, value in values.items() if name != "test_filter"}
    assert effective_values(older) == values
    assert effective_values(older | {"fan_in": 8}) != values
    assert effective_values(older | {"no_longer_there": 1}) != values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title =", "not a table file"),
        ('title = "x"\ndata = ["tiny"]', "not a table file .*runs"),
        ('extra = 1\ntitle = "x"\ndata = []\nruns = []', "unknown keys: extra"),
        (
            'title = "x"\ndata = ["tiny"]\n[[runs]]\nmodels = ["dense", "dense"]\nseeds = [0]',
            "tiny dense seed 0 is listed twice",
        ),
        (
            'title = "x"\ndata = ["tiny"]\n[[runs]]\nmodels = ["dense"]\nseeds = [0]\n'
            '[[runs]]\nmodels = ["dense"]\nseeds = [0]\nflagfiles = ["shared.cfg"]',
            "tiny dense seed 0 is listed twice",
        ),
        (
            'title = "x"\ndata = ["tiny"]\n[[runs]]\nmodels = ["none"]\nseeds = [0]',
            r"experiments/flags/models/none\.cfg: no such file",
        ),
    ],
)
def test_read_table_raises_for_malformed_file(project, text, message):
    (project / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.toml: .*{message}"):
        sweep.read_table("bad.toml")


TABLES = sorted((ROOT / "experiments" / "tables").glob("*.toml"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_table_files_are_valid(path):
    entries = sweep.read_table(str(path)).entries
    different = {sweep._directory(Path(), sweep.effective_flags(entry.flags)) for entry in entries}
    # The grid over dropout contains the default value of each of the four data sets.
    assert len(different) == len(entries) - (4 if path.stem == "paper_ablations" else 0)


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "sparse_xmc" / "cli" / "flags").rglob("*.cfg")),
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_flagfiles_are_valid(path):
    values = sweep.effective_flags([f"--flagfile={path.relative_to(ROOT)}"])
    if path.parent.name == "data":
        assert values["train"]
        assert values["test"]
    if path.parent.name == "models":
        assert values["train"] is None  # Flagfiles of models set no data.
        assert path.stem.startswith(values["head"])


def test_paper_cfg_has_published_settings():
    def settings(data):
        files = ["paper.cfg", f"data/{data}.cfg", "models/unstructured_32.cfg"]
        return sweep.effective_flags([f"--flagfile=experiments/flags/{file}" for file in files])

    published = {
        "validate_on_test": True,
        "loss": "squared_hinge",
        "learning_rate": 1e-3,
        "embedding_lr_multiplier": 1.0,
        "penultimate_lr_multiplier": 1.0,
        "epsilon": 1e-7,
        "batch_size": 32,
        "epochs": 100,
        "schedule": "plateau",
        "rewire_interval": 1000,
        "rewire_distinct": False,
        "rewire_zero_weights": False,
        "output_bias": 0.0,
        "output_bound": None,
        "dropout": 0.1,
        "rewire_fraction": 0.01,  # for unstructured layers without a penultimate layer
    }
    values = settings("amazon-670k_cascade")
    assert {name: values[name] for name in published} == published
    assert settings("wiki-500k_cascade")["dropout"] == 0.2
    assert settings("wiki10-31k_cascade")["epochs"] == 200
