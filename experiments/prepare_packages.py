"""Build an extreme classification data set from the descriptions of Debian's packages.

A point is a source package, its text consists of the descriptions of the packages built from it, and its
labels are the packages that they depend on:

  python -m experiments.prepare_packages --out=data/packages

uses all packages that apt offers. Needs apt, but not root; apt's own lists and the installed packages are
neither used nor changed. Equal versions of the packages always give identical files.
"""

import collections
import json
import os
import random
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from sparse_xmc.cli import program
from sparse_xmc.data import files, write_tsv

_TEST_FRACTION = 0.15
_MIN_LABEL_POINTS = 2
_DEPENDENCY = re.compile(r"\s*([a-z0-9][a-z0-9+.-]+)")

_README = """# Debian's packages as an extreme classification data set

Each point is a source package of Debian, and the task is to predict what the packages built from it depend
on. The text consists of the descriptions of these packages, without package names and repeated paragraphs.
The labels are the packages in the fields Depends and Pre-Depends, without versions, without packages built
from the same source, and only the first of alternatives. Sources with equal text are one point.

The texts are part of the packages, whose own licences apply to them. `statistics.json` lists all packages and
their versions.
"""
_FORMAT = """
{table}

`train.tsv.gz` and `test.tsv.gz` hold one point a line, UTF-8: the labels in sorted order, separated by `|`,
then a tab, then the text; points are in random order. A random {test:.0%} of them are test points (seed
{seed}). Labels that fewer than two training points have are dropped, and then points with no label left.
"""


class Point(NamedTuple):
    """A point of a data set."""

    labels: list[str]
    text: str


def run(*command: str | Path, cwd: Path | None = None, stdin: bytes | None = None) -> bytes:
    """Return the output of a command. Raises RuntimeError if it is missing or fails."""
    env = os.environ | {"LC_ALL": "C.UTF-8"}
    try:
        result = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=env)
    except FileNotFoundError as error:
        raise RuntimeError(f"no program {command[0]}: this needs apt and dpkg, as on Debian") from error
    if result.returncode != 0:
        output = (result.stderr or result.stdout).decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {result.returncode}: {output}")
    return result.stdout


def update_apt(directory: Path) -> list[str]:
    """Download the lists of packages into a directory; return options that make apt use them."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (directory / name).mkdir(parents=True)
    (directory / "status").touch()  # No packages count as installed.
    settings = {
        "Dir::State": directory / "state",
        "Dir::State::status": directory / "status",
        "Dir::Cache": directory / "cache",
        "Acquire::Languages": "en",
        "Acquire::GzipIndexes": "false",  # apt-cache is slow on compressed lists.
        "APT::Sandbox::User": "root",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    run("apt-get", *options, "update")
    return options


def read_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each stanza of a Debian control file; continuation lines are not changed."""
    for stanza in re.split(r"\n\n+", text):
        fields = re.findall(r"^([^\s:]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        if fields:
            yield dict(fields)


def build(stanzas: Iterable[dict[str, str]]) -> list[Point]:
    """Return the points with at least one label, sorted by text."""
    sources = collections.defaultdict(list)
    for stanza in sorted(stanzas, key=lambda stanza: stanza["Package"]):
        sources[stanza.get("Source", stanza["Package"]).split()[0]].append(stanza)
    labels: dict[str, set[str]] = collections.defaultdict(set)
    for binaries in sources.values():
        dependencies: set[str] = set()
        paragraphs: dict[str, None] = {}  # in order, each once
        for stanza in binaries:
            for field in (stanza.get("Pre-Depends", ""), stanza.get("Depends", "")):
                dependencies.update(match[1] for match in map(_DEPENDENCY.match, field.split(",")) if match)
            synopsis, _, description = stanza.get("Description-en", "").partition("\n")
            paragraphs |= dict.fromkeys([synopsis, *description.split("\n .\n")])
        dependencies -= {stanza["Package"] for stanza in binaries}
        if text := " ".join(" ".join(paragraphs).split()):
            labels[text] |= dependencies
    return [Point(sorted(labels[text]), text) for text in sorted(labels) if labels[text]]


def split(points: list[Point], seed: int) -> dict[str, list[Point]]:
    """Return training and test points in random order, without labels of fewer than two training points."""
    points = random.Random(seed).sample(points, len(points))
    num_test = round(_TEST_FRACTION * len(points))
    counts = collections.Counter(label for point in points[num_test:] for label in point.labels)
    points = [
        Point([label for label in labels if counts[label] >= _MIN_LABEL_POINTS], text)
        for labels, text in points
    ]
    parts = {"train": points[num_test:], "test": points[:num_test]}
    return {name: [point for point in part if point.labels] for name, part in parts.items()}


def describe(points: list[Point]) -> dict[str, float]:
    """Return the statistics of one part of a data set."""
    counts = collections.Counter(label for point in points for label in point.labels)
    words = [len(point.text.split()) for point in points]
    return {
        "points": len(points),
        "labels": len(counts),
        "labels per point": round(counts.total() / len(points), 2),
        "points per label": round(counts.total() / len(counts), 2),
        "words per text": round(statistics.mean(words), 1),
        "median": statistics.median(words),
    }


def write(out: Path, points: list[Point], seed: int, versions: dict[str, str], readme: str) -> None:
    """Split the points, write the files of the data set, and print its statistics.

    Args:
      out: directory for the files; it must exist.
      points: all points.
      seed: seed of the random split.
      versions: versions of the packages from which the points come.
      readme: beginning of README.md, before the statistics and the format.

    Raises:
      RuntimeError: one part would be empty.
    """
    parts = split(points, seed)
    if not all(parts.values()):
        raise RuntimeError(f"too few points, {len(points)}, or none that share labels")
    described = {name: describe(part) for name, part in parts.items()}
    rows = [["", *described["train"]], ["---"] * 7]
    rows += [[name, *(f"{value:,}" for value in row.values())] for name, row in described.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    for name, part in parts.items():
        write_tsv(out / f"{name}.tsv.gz", [p.labels for p in part], [p.text for p in part])
    summary = described | {"seed": seed, "packages": dict(sorted(versions.items()))}
    (out / "statistics.json").write_text(json.dumps(summary, indent=2) + "\n")
    form = _FORMAT.format(table=table, test=_TEST_FRACTION, seed=seed)
    (out / "README.md").write_text(readme + form)
    print(table)


def define_flags() -> None:
    """Define the common flags of the programs that build data sets from packages."""
    flags.DEFINE_string("out", None, "Directory to write the data set to; it must not exist.", required=True)
    flags.DEFINE_integer("seed", 0, "Seed of the random split.")


def check_out(out: str) -> None:
    """Raise UsageError if the output directory exists."""
    if Path(out).exists():
        raise app.UsageError(f"--out={out} exists: remove it, or name another directory")


def prepare(out: str | Path, seed: int) -> None:
    """Download the lists of packages, and write the data set to `out` atomically."""
    with tempfile.TemporaryDirectory() as directory:
        options = update_apt(Path(directory))
        text = run("apt-cache", *options, "show", "--no-all-versions", "?name(.)").decode()
    stanzas = list(read_stanzas(text))
    versions = {stanza["Package"]: stanza["Version"] for stanza in stanzas}
    with files.new_directory(out) as directory:
        write(directory, build(stanzas), seed, versions, _README)


def main():
    """Check the flags, and write the data set."""
    values = flags.FLAGS
    check_out(values.out)
    prepare(values.out, values.seed)


if __name__ == "__main__":
    define_flags()
    program.start(main)
