r"""Build an extreme classification data set from WordNet 3.0.

A point is a synset, its text consists of the synset's lemmas and gloss, and its labels are lemmas of related
synsets:

  python -m experiments.prepare_wordnet --out=sparse_xmc/cli/data/wordnet

writes the data set that is shipped in that directory. The labels are the lemmas of the hypernyms up to three
steps above, and only a part of WordNet is used, to keep the files small. With --full, all of WordNet is used,
and the labels also include the lemmas of all synsets to which the synset points.

WordNet's files come from the Debian package wordnet-base; their format is described in its manual page
wndb(5).
"""

import collections
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import flags

from sparse_xmc.cli import program
from sparse_xmc.data import write_tsv

_DICT_DIR = flags.DEFINE_string(
    "dict_dir", "/usr/share/wordnet", "Directory of the files of WordNet 3.0, such as data.noun."
)
_OUT = flags.DEFINE_string("out", None, "Directory to write train.tsv.xz and test.tsv.xz to.", required=True)
_FULL = flags.DEFINE_bool("full", False, "Use all of WordNet, and labels along every kind of pointer.")

_FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}
_HYPERNYMS = ("@", "@i")  # hypernym and instance hypernym
_HYPERNYM_STEPS = 3
_TEST_FRACTION = 0.1
_TRAIN_POINTS = 50_000
_MIN_LABEL_POINTS = 2


class Synset(NamedTuple):
    """A synset: its lemmas, its gloss without quoted examples, and `(symbol, synset id)` of its pointers."""

    lemmas: list[str]
    gloss: str
    pointers: list[tuple[str, str]]


class Point(NamedTuple):
    """A point of the data set, identified by the id of its synset."""

    synset_id: str
    labels: list[str]
    text: str


def read_wordnet(dict_dir: str) -> dict[str, Synset]:
    """Read all synsets, keyed by id: part of speech and offset, such as `n00001740`.

    Raises:
      FileNotFoundError: `dict_dir` does not hold WordNet.
      ValueError: a line is malformed; the message names it.
    """
    synsets = {}
    for part_of_speech, name in _FILES.items():
        path = Path(dict_dir) / name
        if not path.is_file():
            raise FileNotFoundError(
                f"no WordNet at {path}: install the Debian package wordnet-base, or give the directory of "
                "WordNet 3.0's data files as --dict_dir"
            )
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.startswith("  "):  # the licence
                    continue
                try:
                    offset, synset = _parse_synset(line)
                except (ValueError, IndexError) as error:
                    raise ValueError(
                        f"{path}:{number}: not a synset in wndb format: {line[:60]!r}"
                    ) from error
                synsets[part_of_speech + offset] = synset
    for synset_id, synset in synsets.items():
        for _, target in synset.pointers:
            if target not in synsets:
                raise ValueError(
                    f"{dict_dir}: synset {synset_id} points to {target}, which is in no data file"
                )
    return synsets


def _parse_synset(line: str) -> tuple[str, Synset]:
    """Parse `offset file type #words (word lex_id)... #pointers (symbol offset pos fields)... | gloss`."""
    head, gloss = line.split(" | ", 1)
    offset, _, _, hex_words, *fields = head.split()
    num_words = int(hex_words, 16)
    # An adjective may carry a syntactic marker, as in galore(ip).
    lemmas = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in fields[: 2 * num_words : 2]]
    num_pointers, *fields = fields[2 * num_words :]
    pointers = []
    for i in range(0, 4 * int(num_pointers), 4):
        symbol, target, part_of_speech = fields[i : i + 3]
        pointers.append((symbol, part_of_speech + target))
    return offset, Synset(lemmas, _without_examples(gloss), pointers)


def _without_examples(gloss: str) -> str:
    """Remove the quoted example sentences after a definition, and the sources that follow them."""
    return re.sub(r'[;:,]\s*"[^"]*("[^;]*|$)', "", gloss).strip(" ;\n")


def related_lemmas(synsets: dict[str, Synset], synset_id: str, full: bool) -> list[str]:
    """Return the sorted lemmas of a synset's hypernyms up to three steps above, other than its own.

    Args:
      synsets: all of WordNet.
      synset_id: id of the synset.
      full: whether to include the lemmas of all synsets one pointer of any kind away.
    """
    related = {target for _, target in synsets[synset_id].pointers} if full else set()
    frontier = {synset_id}
    for _ in range(_HYPERNYM_STEPS):
        frontier = {t for s in frontier for symbol, t in synsets[s].pointers if symbol in _HYPERNYMS}
        related |= frontier
    lemmas = {lemma for s in related for lemma in synsets[s].lemmas}
    return sorted(lemmas - set(synsets[synset_id].lemmas))


def _hash(synset_id: str) -> float:
    """Return a hash of the id as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(synset_id.encode()).digest()[:8]) / 2**64


def build(synsets: dict[str, Synset], full: bool) -> tuple[list[Point], list[Point]]:
    """Return the training and the test points, sorted by synset id.

    Points with a hash below 0.1 are test points. Of the others, the shipped data set contains the 50,000 with
    the lowest hash, the full one all. Labels that fewer than two (full: one) training points have are
    dropped, and then points without labels.
    """
    points = []
    for synset_id, synset in sorted(synsets.items()):
        labels = related_lemmas(synsets, synset_id, full)
        if labels:
            points.append(Point(synset_id, labels, f"{', '.join(synset.lemmas)}: {synset.gloss}"))
    test = [point for point in points if _hash(point.synset_id) < _TEST_FRACTION]
    train = [point for point in points if _hash(point.synset_id) >= _TEST_FRACTION]
    if not full:
        train = sorted(sorted(train, key=lambda point: _hash(point.synset_id))[:_TRAIN_POINTS])
    counts = collections.Counter(label for point in train for label in point.labels)
    kept = {label for label, count in counts.items() if count >= (1 if full else _MIN_LABEL_POINTS)}
    return list(_restrict(train, kept)), list(_restrict(test, kept))


def _restrict(points: list[Point], kept: set[str]) -> Iterator[Point]:
    for point in points:
        labels = [label for label in point.labels if label in kept]
        if labels:
            yield point._replace(labels=labels)


def statistics(train: list[list[str]], test: list[list[str]]) -> str:
    """Return statistics of a data set as a Markdown table, given the labels of each of its points."""
    labels = {label for names in train for label in names}
    rows = [f"| {len(labels):,} labels | points | labels per point | points per label |", "|---|---|---|---|"]
    for name, points in (("training", train), ("test", test)):
        pairs = sum(map(len, points))
        rows.append(f"| {name} | {len(points):,} | {pairs / len(points):.2f} | {pairs / len(labels):.2f} |")
    return "\n".join(rows)


def main():
    """Read WordNet, write both files, and print their statistics."""
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    splits = build(read_wordnet(_DICT_DIR.value), _FULL.value)
    for name, points in zip(("train", "test"), splits, strict=True):
        write_tsv(out / f"{name}.tsv.xz", [p.labels for p in points], [p.text for p in points])
    print(statistics(*([p.labels for p in points] for points in splits)))


if __name__ == "__main__":
    program.start(main)
