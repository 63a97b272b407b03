"""Tests of the console command, and of the contents of the wheel and the source distribution."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import sparse_xmc
from sparse_xmc.cli import __main__ as cli

ROOT = Path(sparse_xmc.__file__).parents[1]


def test_help_lists_all_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparse-xmc", "--help"])
    cli.main()
    printed = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert importlib.util.find_spec(f"sparse_xmc.cli.{command}") is not None
        assert f"\n  {command} " in printed


@pytest.mark.parametrize("arguments", [[], ["trian", "--seed=1"]])
def test_missing_or_unknown_command_exits_with_status_2(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["sparse-xmc", *arguments])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: trian: no such command" if arguments else "sparse-xmc COMMAND")


def test_reproduction_programs_tell_how_to_run_them(monkeypatch):
    for command in cli.REPRODUCTION:
        assert importlib.util.find_spec(f"experiments.{command}") is not None
        monkeypatch.setattr(sys, "argv", ["sparse-xmc", command])
        with pytest.raises(SystemExit, match=rf"error: {command}: run python -m experiments\.{command} in a"):
            cli.main()


def test_command_rejects_flags_of_other_commands(tmp_path):
    command = [sys.executable, "-m", "sparse_xmc.cli", "run", "--flagfile=quickstart", "--labels=5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: Unknown command line flag 'labels'")  # a flag of plan


def test_wheel_contains_programs_and_their_files(tmp_path):
    # build_py makes the files of the wheel except for the compiled modules.
    command = [sys.executable, "setup.py", "--quiet", "build_py", f"--build-lib={tmp_path}"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"sparse_xmc", "xla_ops"}
    programs = tmp_path / "sparse_xmc" / "cli"
    files = ("flags/quickstart.cfg", "flags/data/wordnet.cfg", "data/wordnet/train.tsv.xz", "run.py")
    for file in files:
        assert (programs / file).exists()
    assert (tmp_path / "sparse_xmc" / "py.typed").exists()
    assert (tmp_path / "xla_ops" / "py.typed").exists()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"sparse-xmc": "sparse_xmc.cli.__main__:main"}


def test_source_distribution_contains_sources_but_no_tests(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for name in ("sparse_xmc", "xla_ops", "tests"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results")
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "--quiet", "sdist", f"--dist-dir={out}"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=source)
    assert finished.returncode == 0, finished.stderr
    (path,) = out.iterdir()
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "xla_ops/csrc/cpu/kernels.cc", "sparse_xmc/__init__.pyi", "LICENSE"} <= names
    assert {"sparse_xmc/cli/data/wordnet/train.tsv.xz", "sparse_xmc/cli/flags/quickstart.cfg"} <= names
    assert not [name for name in names if name.startswith("tests")]
