import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import app

from experiments import prepare_packages
from experiments.prepare_packages import Point
from sparse_xmc.data import read_tsv

ROOT = pathlib.Path(prepare_packages.__file__).parents[1]

STANZAS = """\
Package: dog
Version: 1.0-1
Pre-Depends: init (>= 2)
Depends: libdog1 (= 1.0-1), python3:any (>= 3.9), mailer | editor, libc6 (>= 2.34)
Description-en: barks
 The dog is a pet.
 .
 This package contains
 the program.

Package: libdog1
Source: dog (1.0)
Version: 1.0-1+b1
Depends: libc6
Description-en: barks
 The dog is a pet.
 .
 This package contains the library.


Package: cat
Version: 2:3
Depends:
Description-en: a pet that depends on nothing

Package: fish
Version: 4
Depends: libc6

Package: bird
Version: 5
Depends: libwing0, libc6
Description-en: sings

Package: canary
Version: 6
Depends: libwing1, libc6
Description-en: sings
"""
DOG = "barks The dog is a pet. This package contains the program. This package contains the library."


def write_program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def stanzas(num_packages):
    return "\n".join(
        f"Package: p{i}\nVersion: {i}\nDepends: libc6, rare{i}\nDescription-en: number {i}\n"
        for i in range(num_packages)
    )


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A directory of a fake apt-get, which records its arguments, and a fake apt-cache of 20 packages."""
    bin_dir = tmp_path / "bin"
    write_program(bin_dir / "apt-get", f'echo "$@" >> {tmp_path}/notes')
    write_program(bin_dir / "apt-cache", f"cat {tmp_path}/stanzas")
    (tmp_path / "stanzas").write_text(stanzas(20))
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    return bin_dir


def test_read_stanzas():
    first, second, *others = prepare_packages.read_stanzas(STANZAS)
    assert list(first) == ["Package", "Version", "Pre-Depends", "Depends", "Description-en"]
    assert first["Description-en"] == "barks\n The dog is a pet.\n .\n This package contains\n the program."
    assert second["Source"] == "dog (1.0)"
    assert [stanza["Package"] for stanza in others] == ["cat", "fish", "bird", "canary"]
    assert others[0]["Depends"] == ""


def test_read_stanzas_of_empty_text():
    assert list(prepare_packages.read_stanzas("\n\n")) == []


def test_build_makes_one_point_per_source():
    # cat has no dependencies, fish has no description, and bird and canary have equal descriptions.
    assert prepare_packages.build(prepare_packages.read_stanzas(STANZAS)) == [
        Point(["init", "libc6", "mailer", "python3"], DOG),
        Point(["libc6", "libwing0", "libwing1"], "sings"),
    ]


def test_build_ignores_order_of_stanzas():
    listed = list(prepare_packages.read_stanzas(STANZAS))
    assert prepare_packages.build(reversed(listed)) == prepare_packages.build(listed)


class TestSplit:
    POINTS = tuple(Point(["all", f"pair{i // 2}", f"only{i}"], f"text {i}") for i in range(20))

    def test_sizes_and_order(self):
        parts = prepare_packages.split(self.POINTS, seed=0)
        assert {name: len(part) for name, part in parts.items()} == {"train": 17, "test": 3}
        texts = [point.text for part in parts.values() for point in part]
        assert sorted(texts) == sorted(point.text for point in self.POINTS)
        assert texts[:17] != sorted(texts[:17])

    def test_depends_on_seed(self):
        parts = [prepare_packages.split(self.POINTS, seed) for seed in (0, 0, 1)]
        assert parts[0] == parts[1]
        assert parts[0] != parts[2]

    def test_drops_labels_of_fewer_than_two_training_points(self):
        parts = prepare_packages.split(self.POINTS, seed=0)
        numbers = {int(point.text.split()[1]) for point in parts["train"]}
        for point in parts["train"] + parts["test"]:
            pair = int(point.text.split()[1]) // 2
            both = {2 * pair, 2 * pair + 1} <= numbers
            assert point.labels == ["all", f"pair{pair}"] if both else ["all"]

    def test_drops_points_without_labels(self):
        points = [Point(["all"] if i < 10 else ["all", f"only{i}"], str(i)) for i in range(20)]
        points += [Point([f"alone{i}"], f"alone {i}") for i in range(20)]
        parts = prepare_packages.split(points, seed=0)
        kept = parts["train"] + parts["test"]
        assert sorted(point.text for point in kept) == sorted(map(str, range(20)))
        assert all(point.labels == ["all"] for point in kept)


def test_describe():
    points = [Point(["a", "b"], "one two three"), Point(["a"], "one"), Point(["a"], "one two")]
    assert prepare_packages.describe(points) == {
        "points": 3,
        "labels": 2,
        "labels per point": 1.33,
        "points per label": 2.0,
        "words per text": 2.0,
        "median": 2,
    }


def test_run_raises_for_failed_command():
    assert prepare_packages.run("cat", stdin=b"meow") == b"meow"
    with pytest.raises(RuntimeError, match="no program no-such-apt: this needs apt and dpkg"):
        prepare_packages.run("no-such-apt", "update")
    with pytest.raises(RuntimeError, match=r"sh -c .*: exit status 3: no network"):
        prepare_packages.run("sh", "-c", "echo no network >&2; exit 3")


class TestProgram:
    def test_writes_data_set(self, tmp_path, apt):
        command = [sys.executable, "-m", "experiments.prepare_packages", f"--out={tmp_path}/out", "--seed=7"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "Dir::State=" in (tmp_path / "notes").read_text()  # apt's own lists are not used
        out = tmp_path / "out"
        assert sorted(path.name for path in out.iterdir()) == [
            "README.md",
            "statistics.json",
            "test.tsv.gz",
            "train.tsv.gz",
        ]
        parts = {name: read_tsv(out / f"{name}.tsv.gz") for name in ("train", "test")}
        assert {name: len(texts) for name, (_, texts) in parts.items()} == {"train": 17, "test": 3}
        assert all(labels == [["libc6"]] * len(labels) for labels, _ in parts.values())
        statistics = json.loads((out / "statistics.json").read_text())
        assert statistics["seed"] == 7
        assert statistics["packages"] == {f"p{i}": str(i) for i in range(20)}
        assert statistics["train"] == {
            "points": 17,
            "labels": 1,
            "labels per point": 1.0,
            "points per label": 17.0,
            "words per text": 2,
            "median": 2,
        }
        assert "| train | 17 | 1 | 1.0 | 17.0 | 2 | 2 |" in result.stdout
        readme = (out / "README.md").read_text()
        assert result.stdout in readme
        assert "A random 15% of them are test points (seed\n7)" in readme

    def test_equal_packages_give_identical_files(self, tmp_path, apt):
        for name in ("a", "b"):
            prepare_packages.prepare(tmp_path / name, seed=0)
        for path in (tmp_path / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

    def test_raises_without_apt(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match="no program apt-get: this needs apt and dpkg, as on Debian"):
            prepare_packages.prepare(tmp_path / "out", seed=0)
        assert list(tmp_path.iterdir()) == []

    def test_raises_for_failed_update(self, tmp_path, apt):
        write_program(apt / "apt-get", "echo no network >&2; exit 100")
        with pytest.raises(RuntimeError, match=r"apt-get .* update: exit status 100: no network"):
            prepare_packages.prepare(tmp_path / "out", seed=0)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("num_packages", [0, 1, 3])
    def test_raises_for_too_few_points(self, tmp_path, apt, num_packages):
        (tmp_path / "stanzas").write_text(stanzas(num_packages))
        with pytest.raises(RuntimeError, match=f"too few points, {num_packages}, or none that share labels"):
            prepare_packages.prepare(tmp_path / "out", seed=0)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "notes", "stanzas"]

    def test_check_out_raises_if_directory_exists(self, tmp_path):
        prepare_packages.check_out(str(tmp_path / "new"))
        with pytest.raises(app.UsageError, match="exists: remove it, or name another directory"):
            prepare_packages.check_out(str(tmp_path))
