"""Tests of exit statuses and error messages of programs, and of flagfiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import experiments
from experiments.sweep import TABLES
from sparse_xmc.cli import flagfiles

ROOT = Path(experiments.__file__).parents[1]
PROGRAM = """
'''What --help prints.'''
from absl import flags
from sparse_xmc.cli import program
flags.DEFINE_integer("count", 1, "", 1)
flags.DEFINE_string("do", None, "", required=True)
flags.DEFINE_string("other", None, "", required=True)
def main():
    exec(flags.FLAGS.do)
program.start(main)
"""


def run(*arguments, cwd=ROOT):
    """Run a program that executes --do; return its exit status and the lines of its stdout and stderr."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    return finished.returncode, finished.stdout.splitlines(), finished.stderr.splitlines()


@pytest.mark.parametrize(
    ("statement", "status", "errors"),
    [
        ("raise ValueError('what, where')", 1, ["error: what, where"]),
        ("open('none')", 1, ["error: none: No such file or directory"]),
        ("raise MemoryError('too much:\\nof it')", 1, ["error: too much:", "of it"]),
        ("raise KeyboardInterrupt", 130, []),
        ("import sys; sys.exit(143)", 143, []),
        ("import logging; logging.info('of a backend')", 0, []),
    ],
)
def test_errors_are_printed_without_traceback(statement, status, errors):
    assert run(f"--do={statement}", "--other=") == (status, [], errors)


def test_unexpected_errors_and_verbose_runs_print_tracebacks():
    for arguments in (["--do=raise ValueError('what')", "--verbosity=1"], ["--do=raise TypeError('what')"]):
        status, _, errors = run(*arguments, "--other=")
        assert status == 1
        assert errors[0] == "Traceback (most recent call last):"
        assert errors[-1] in ("error: what", "TypeError: what")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--cuont=3"], "Unknown command line flag 'cuont'. Did you mean: count ?"),
        (["--count=x"], "flag --count=x: invalid literal for int() with base 10: 'x'"),
        ([], "required: --do, --other"),
        (["--do=pass", "--other=", "more"], "expected flags only, got more"),
        (["--flagfile=quikstart"], "quikstart: no such file; did you mean quickstart?"),
        (["--do=from absl import app; raise app.UsageError('no use')", "--other="], "no use"),
    ],
)
def test_flag_errors_exit_with_status_2(arguments, error):
    status, printed, errors = run(*arguments)
    assert (status, printed) == (2, [])
    assert errors == [f"error: {error} (--help lists the flags)"]


def test_help_exits_with_status_0():
    status, printed, errors = run("--help")
    assert (status, errors) == (0, [])
    assert printed[0] == "What --help prints."


def test_closed_output_pipe_ends_program_without_errors():
    loop = "--do=while True: print('line')"
    command = [sys.executable, "-c", PROGRAM, loop, "--other="]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_flagfiles_are_found_by_name_and_path_and_nested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = flagfiles.expand(["--seed=1", "--flagfile=quickstart", "--flagfile", "dense"])
    assert found[0] == "--seed=1"
    assert found[-2:] == ["--workdir=runs/quickstart", "--head=dense"]
    assert "--train=experiments/data/wordnet/train.tsv.xz" in found  # as written in the flagfile
    assert "--ngrams=2" in found  # from a nested flagfile
    assert flagfiles.find("experiments/data/wordnet/train.tsv.xz").samefile(
        ROOT / "sparse_xmc/cli/data/wordnet/train.tsv.xz"
    )
    assert flagfiles.expand(["--", "--flagfile=none"]) == ["--", "--flagfile=none"]

    (tmp_path / "dense").write_text("# mine\n\n  --head=bottleneck\n// too\n--flagfile=experiments/own.cfg\n")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.cfg").write_text("--seed=2")
    assert flagfiles.expand(["--flagfile=dense"]) == ["--head=bottleneck", "--seed=2"]  # a path comes first
    (tmp_path / "experiments" / "own.cfg").write_text("--flagfile=dense")
    with pytest.raises(
        ValueError, match=r"dense: flagfile includes itself: \S+dense -> \S+own.cfg -> \S+dense$"
    ):
        flagfiles.expand(["--flagfile=dense"])


def test_depth_and_number_of_flagfiles_are_limited(tmp_path):
    def write(number, times):
        following = f"--flagfile={tmp_path / str(number + 1)}\n"
        (tmp_path / str(number)).write_text(f"--seed={number}\n" + times * following)

    for number in range(1200):
        write(number, times=1)
    with pytest.raises(ValueError, match=r"/32: flagfiles must be nested at most 32 deep"):
        flagfiles.expand([f"--flagfile={tmp_path / '0'}"])
    status, _, errors = run(f"--flagfile={tmp_path / '0'}")
    assert (status, len(errors)) == (2, 1)
    for number in range(14):
        write(number, times=2)
    (tmp_path / "14").write_text("--seed=14\n")
    with pytest.raises(ValueError, match=r"expected at most 1000 flagfiles in total"):
        flagfiles.expand([f"--flagfile={tmp_path / '0'}"])
    (tmp_path / "14").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"/14: not UTF-8"):
        flagfiles.expand([f"--flagfile={tmp_path / '14'}"])


def test_flagfile_names_are_unique():
    names = [path.stem for path in flagfiles.FLAGFILES.rglob("*.cfg")]
    assert len(set(names)) == len(names)


def test_tables_are_found_by_name():
    assert flagfiles.find_named("wordnet", TABLES) == TABLES / "wordnet.toml"
    with pytest.raises(FileNotFoundError, match="wordnet_fll: no such file; did you mean wordnet_full"):
        flagfiles.find_named("wordnet_fll", TABLES)


def test_renamed_flags_work_with_a_warning(caplog):
    given = ["--direct=3", "-moments=bfloat16", "--direct_scale=2", "--epochs=4", "--output_rate", "direct"]
    expected = ["--direct_inputs=3", "-moment_dtype=bfloat16", "--direct_scale=2", "--epochs=4"]
    assert flagfiles.expand(given) == [*expected, "--output_lr_multiplier", "direct"]
    assert [record.getMessage() for record in caplog.records] == [
        f"--{old} is now --{new}; the old name will be removed in the next version"
        for old, new in (
            ("direct", "direct_inputs"),
            ("moments", "moment_dtype"),
            ("output_rate", "output_lr_multiplier"),
        )
    ]
