import collections
import pathlib
import subprocess
import sys

import pytest

from experiments import prepare_wordnet
from sparse_xmc.data import read_tsv

ROOT = pathlib.Path(prepare_wordnet.__file__).parents[1]
SHIPPED = ROOT / "sparse_xmc" / "cli" / "data" / "wordnet"

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by\n"
# A tiny WordNet: entity > living thing > animal > dog > poodle. The cat is another animal, and Lassie, with
# the second lemma "animal", is an instance of dog. Only n00000300, the id of the cat, has a hash below 0.1.
DICT = {
    "data.noun": LICENCE
    + """\
00000100 03 n 01 entity 0 001 ~ 00000200 n 0000 | what exists; "an entity is an entity"
00000200 03 n 02 living_thing 0 organism 0 002 @ 00000100 n 0000 ~ 00000400 n 0000 | what lives
00000300 05 n 01 cat 0 001 @ 00000400 n 0000 | a feline
00000400 05 n 01 animal 0 001 @ 00000200 n 0000 | what moves
00000500 05 n 02 dog 0 domestic_dog 0 001 @ 00000400 n 0000 | what barks; "dogs; they bark"- Anon.; a pet
00000600 05 n 01 poodle 0 001 @ 00000500 n 0000 | a breed
00000700 05 n 02 Lassie 0 animal 0 001 @i 00000500 n 0000 | a film star
""",
    "data.verb": LICENCE
    + """\
00000100 38 v 01 move 0 000 01 + 02 00 | change position
00000200 38 v 01 run 0 002 @ 00000100 v 0000 + 00000500 n 0101 02 + 02 00 + 08 00 | move fast
""",
    "data.adj": LICENCE
    + """\
00000100 00 a 01 fast(p) 0 001 ! 00000200 a 0101 | quick
00000200 00 s 0a slow 0 s2 0 s3 0 s4 0 s5 0 s6 0 s7 0 s8 0 s9 0 s10 0 001 ! 00000100 a 0101 | not quick
""",
    "data.adv": LICENCE + "00000100 02 r 01 quickly 0 001 \\ 00000100 a 0101 | with speed\n",
}

ANCESTORS = ["entity", "living thing", "organism"]


@pytest.fixture
def dict_dir(tmp_path):
    for name, content in DICT.items():
        (tmp_path / name).write_text(content.replace("\n", "  \n"))  # Lines of WordNet end with two spaces.
    return tmp_path


@pytest.fixture
def synsets(dict_dir):
    return prepare_wordnet.read_wordnet(dict_dir)


@pytest.fixture(scope="module")
def shipped():
    return {name: read_tsv(SHIPPED / f"{name}.tsv.xz") for name in ("train", "test")}


def labels_by_id(points):
    return {point.synset_id: point.labels for point in points}


def run(*flags):
    command = [sys.executable, "-m", "experiments.prepare_wordnet", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_read_wordnet(synsets):
    assert len(synsets) == 12
    assert synsets["n00000200"].lemmas == ["living thing", "organism"]
    assert synsets["n00000200"].pointers == [("@", "n00000100"), ("~", "n00000400")]
    assert synsets["v00000200"].pointers == [("@", "v00000100"), ("+", "n00000500")]
    assert synsets["a00000100"].lemmas == ["fast"]  # without its syntactic marker
    assert len(synsets["a00000200"].lemmas) == 10  # The number of words is hexadecimal.
    assert synsets["n00000500"].gloss == "what barks; a pet"


@pytest.mark.parametrize(
    ("gloss", "definition"),
    [
        ('a cat; "the cat sat"', "a cat"),
        ('a cat; "one"; "two; three";', "a cat"),
        ('a cat: "the cat sat"', "a cat"),
        ('a cat, "the cat sat"', "a cat"),
        ('a cat; "the cat sat', "a cat"),
        ('a cat; "the cat sat"- Poe; or a tiger', "a cat; or a tiger"),
        ('a "big" cat; or a tiger', 'a "big" cat; or a tiger'),
    ],
)
def test_read_wordnet_removes_examples(dict_dir, gloss, definition):
    (dict_dir / "data.adv").write_text(f"00000100 02 r 01 so 0 000 | {gloss}  \n")
    assert prepare_wordnet.read_wordnet(dict_dir)["r00000100"].gloss == definition


def test_build_shipped_data_set(synsets):
    train, test = prepare_wordnet.build(synsets, full=False)
    # "move" has only one training point, so "run" has no label; "entity" is four steps above "poodle".
    assert labels_by_id(train) == {
        "n00000200": ["entity"],
        "n00000400": ANCESTORS,
        "n00000500": ["animal", *ANCESTORS],
        "n00000600": ["animal", "dog", "domestic dog", "living thing", "organism"],
        "n00000700": ["dog", "domestic dog", "living thing", "organism"],
    }
    assert labels_by_id(test) == {"n00000300": ["animal", *ANCESTORS]}
    assert [point.text for point in train[1:3]] == [
        "animal: what moves",
        "dog, domestic dog: what barks; a pet",
    ]


def test_build_selects_training_points_with_lowest_hash(synsets, monkeypatch):
    monkeypatch.setattr(prepare_wordnet, "_TRAIN_POINTS", 3)
    train, test = prepare_wordnet.build(synsets, full=False)
    # SHA-256 of v00000200, n00000500 and n00000400 begin with 54, 65 and 76; all others are larger.
    assert labels_by_id(train) == {"n00000400": ANCESTORS, "n00000500": ANCESTORS}
    assert labels_by_id(test) == {"n00000300": ANCESTORS}


def test_build_full_data_set(synsets):
    train, test = prepare_wordnet.build(synsets, full=True)
    slow = ["s10", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "slow"]
    assert labels_by_id(train) == {
        "a00000100": slow,
        "a00000200": ["fast"],
        "n00000100": ["living thing", "organism"],
        "n00000200": ["animal", "entity"],
        "n00000400": ANCESTORS,
        "n00000500": ["animal", *ANCESTORS],
        "n00000600": ["animal", "dog", "domestic dog", "living thing", "organism"],
        "n00000700": ["dog", "domestic dog", "living thing", "organism"],
        "r00000100": ["fast"],
        "v00000200": ["dog", "domestic dog", "move"],
    }
    assert labels_by_id(test) == {"n00000300": ["animal", *ANCESTORS]}


def test_statistics():
    table = prepare_wordnet.statistics([["a", "b"], ["a"], ["c", "d", "b"]], [["a"]])
    assert table.splitlines() == [
        "| 4 labels | points | labels per point | points per label |",
        "|---|---|---|---|",
        "| training | 3 | 2.00 | 1.50 |",
        "| test | 1 | 1.00 | 0.25 |",
    ]


def test_program_is_deterministic(dict_dir):
    outs = [dict_dir / "one", dict_dir / "two"]
    for out in outs:
        result = run(f"--dict_dir={dict_dir}", f"--out={out}")
        assert result.returncode == 0, result.stderr
        assert "| training | 5 | 3.40 | 2.83 |" in result.stdout  # 17 pairs, 6 labels
        assert "| test | 1 | 4.00 | 0.67 |" in result.stdout
    for name in ("train.tsv.xz", "test.tsv.xz"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert read_tsv(outs[0] / "test.tsv.xz") == ([["animal", *ANCESTORS]], ["cat: a feline"])


def test_program_names_missing_package(tmp_path):
    result = run(f"--dict_dir={tmp_path}", f"--out={tmp_path}")
    assert result.returncode != 0
    assert f"no WordNet at {tmp_path / 'data.noun'}: install the Debian package wordnet-base" in result.stderr
    assert "--dict_dir" in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "00000100 02 r 01 so 0 000 gloss without a bar",
        "00000100 02 r 0x so 0 000 | the count of words is not a number",
        "00000100 02 r 02 so 0 000 | a word is missing",
        "00000100 02 r 01 so 0 001 ! 00000100 | a pointer is cut off",
        "",
    ],
)
def test_read_wordnet_raises_for_malformed_line(dict_dir, line):
    (dict_dir / "data.adv").write_text(f"{LICENCE}{line}\n")
    with pytest.raises(ValueError, match=r"data\.adv:2: not a synset in wndb format: "):
        prepare_wordnet.read_wordnet(dict_dir)


def test_read_wordnet_raises_for_dangling_pointer(dict_dir):
    (dict_dir / "data.adv").write_text("00000100 02 r 01 so 0 001 ! 00000900 r 0101 | thus\n")
    with pytest.raises(ValueError, match="synset r00000100 points to r00000900, which is in no data file"):
        prepare_wordnet.read_wordnet(dict_dir)


class TestShippedFiles:
    def test_statistics_match_readme(self, shipped):
        table = prepare_wordnet.statistics(shipped["train"][0], shipped["test"][0])
        assert table in (SHIPPED / "README.md").read_text()

    def test_files_are_small(self):
        assert sum(path.stat().st_size for path in SHIPPED.glob("*.xz")) < 3e6

    def test_labels_are_valid(self, shipped):
        counts = collections.Counter(label for names in shipped["train"][0] for label in names)
        assert min(counts.values()) >= 2
        assert {label for names in shipped["test"][0] for label in names} <= counts.keys()
        for labels, texts in shipped.values():
            for names, text in zip(labels, texts, strict=True):
                assert names
                assert names == sorted(set(names))
                assert not set(names) & set(text.split(": ")[0].split(", "))

    def test_license_is_from_wordnet(self):
        licence = (SHIPPED / "LICENSE").read_text()
        assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in licence
