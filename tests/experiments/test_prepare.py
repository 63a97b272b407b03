"""Preparing small stand-ins of the public data sets, whole and broken."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

import experiments
from experiments import prepare
from sparse_xmc.cli import datasets
from sparse_xmc.data import Dataset, read_tsv, read_xmc_labels, write_xmc_labels, write_xmc_text

ROOT = Path(experiments.__file__).parents[1]
SIZES = {"train": 30, "test": 10}


def random_labels(points, seed):
    """Two labels out of 12 for each point."""
    rng = np.random.default_rng(seed)
    rows = np.array([rng.choice(12, 2, replace=False) for _ in range(points)])
    labels = np.zeros((points, 12), bool)
    np.put_along_axis(labels, rows, True, axis=1)
    return scipy.sparse.csr_array(labels)


LABELS = {split: random_labels(size, size) for split, size in SIZES.items()}


@pytest.fixture(autouse=True)
def small_datasets(monkeypatch):
    monkeypatch.setitem(prepare.DATASETS, "Amazon-670K", prepare.Statistics(30, 10, 12, 2.0, ("slice",)))
    monkeypatch.setitem(prepare.DATASETS, "LF-AmazonTitles-131K", prepare.Statistics(30, 10, 12, 2.0))


@pytest.fixture
def old(tmp_path):
    """A directory with a set in the old format, and dense features."""
    for split, labels in LABELS.items():
        write_xmc_text(tmp_path / f"{split}.txt", Dataset(np.ones((len_of(labels), 3), np.float32), labels))
        features = np.random.default_rng(0).normal(size=(len_of(labels), 512)).astype(np.float32)
        np.save(tmp_path / f"slice.{split}.npy", features)
    return tmp_path


@pytest.fixture
def raw(tmp_path):
    """A directory with a set of raw text and filters."""
    for split, labels in LABELS.items():
        points = [
            {
                "uid": f"B{row:03}",
                "title": f"a title\tof {row}",
                "content": "two\nlines",
                "target_ind": [*map(int, labels[[row]].indices[::-1])],
                "target_rel": [1.0, 1.0],
            }
            for row in range(len_of(labels))
        ]
        write_json(tmp_path / f"{prepare._SPLITS[split]}.json.gz", points)
        (tmp_path / f"filter_labels_{split}.txt").write_text("3 7\n5 0\n")
    return tmp_path


def len_of(labels):
    return labels.shape[0]


def write_json(path, points):
    write_lines(path, map(json.dumps, points))


def write_lines(path, lines):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def prepare_old(directory, features=("slice",)):
    return prepare.prepare("Amazon-670K", directory, features)


def prepare_raw(directory):
    return prepare.prepare("LF-AmazonTitles-131K", directory, ())


def test_the_old_format_becomes_label_files(old):
    assert prepare_old(old) == []
    for split, short in prepare._SPLITS.items():
        labels = read_xmc_labels(old / f"{short}_X_Y.txt")
        np.testing.assert_array_equal(labels.toarray(), LABELS[split].toarray())
    splits = datasets.load(
        str(old / "trn_X_Y.txt"),
        str(old / "tst_X_Y.txt"),
        train_features=str(old / "slice.train.npy"),
        test_features=str(old / "slice.test.npy"),
    )
    assert splits.train.features.shape == (30, 512)
    assert not list(old.glob(".partial-*"))


def test_label_files_alone_will_do_and_are_kept(old):
    for split, short in prepare._SPLITS.items():
        write_xmc_labels(old / f"{short}_X_Y.txt", LABELS[split])
        (old / f"{split}.txt").unlink()
    before = (old / "trn_X_Y.txt").stat().st_mtime_ns
    assert prepare_old(old) == []
    assert (old / "trn_X_Y.txt").stat().st_mtime_ns == before


def test_raw_text_becomes_tsv_and_label_files(raw):
    assert prepare_raw(raw) == []
    names, texts = read_tsv(raw / "train.tsv.gz")
    assert texts[4] == "a title of 4 two lines"
    assert sorted(map(int, names[4])) == LABELS["train"][[4]].indices.tolist()
    np.testing.assert_array_equal(read_xmc_labels(raw / "tst_X_Y.txt").toarray(), LABELS["test"].toarray())
    assert prepare_raw(raw) == []  # what is there is checked again
    splits = datasets.load(
        str(raw / "train.tsv.gz"),
        str(raw / "test.tsv.gz"),
        test_filter=str(raw / "filter_labels_test.txt"),
    )
    names = splits.label_encoder.names
    rows, columns = splits.test.excluded.nonzero()
    assert [(row, names[column]) for row, column in zip(rows, columns, strict=True)] == [(3, "7"), (5, "0")]


def test_all_that_is_missing_is_reported(tmp_path):
    assert prepare_old(tmp_path) == [
        f"{tmp_path / name}: missing"
        for name in ("train.txt", "slice.train.npy", "test.txt", "slice.test.npy")
    ]
    assert prepare_old(tmp_path, ()) == [f"{tmp_path / name}: missing" for name in ("train.txt", "test.txt")]
    assert prepare_raw(tmp_path) == [
        f"{tmp_path / name}: missing"
        for name in ("trn.json.gz", "filter_labels_train.txt", "tst.json.gz", "filter_labels_test.txt")
    ]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda d: cut(d / "train.txt", 200), r"train\.txt:\d+: expected"),
        (
            lambda d: write_xmc_labels(d / "trn_X_Y.txt", LABELS["test"]),
            r"trn_X_Y\.txt: expected 30 points and 12 labels, got 10 and 12$",
        ),
        (
            lambda d: write_xmc_labels(d / "trn_X_Y.txt", scipy.sparse.csr_array(np.eye(30, 12, dtype=bool))),
            r"trn_X_Y\.txt: expected 2\.0 labels per point, got 0\.40: another version\?$",
        ),
        (
            lambda d: cut(d / "slice.train.npy", 5000),
            r"slice\.train\.npy: .* expected 61,568 bytes, got 5,000: half-downloaded\?$",
        ),
        (lambda d: cut(d / "slice.train.npy", 4), r"slice\.train\.npy: not a whole \.npy file"),
        (
            lambda d: np.save(d / "slice.test.npy", np.zeros((10, 511), np.float32)),
            r"slice\.test\.npy: expected float32 \[10, 512\] in C order, got float32 \[10, 511\]$",
        ),
        (
            lambda d: np.save(d / "slice.test.npy", np.zeros((10, 512))),
            r"expected float32 \[10, 512\] in C order, got float64 \[10, 512\]$",
        ),
        (
            lambda d: np.save(d / "slice.test.npy", np.zeros((512, 10), np.float32).T),
            r"got float32 \[10, 512\] in Fortran order$",
        ),
        (
            lambda d: np.save(
                d / "slice.test.npy",
                np.where(np.arange(10) == 7, np.nan, 0)[:, None].repeat(512, 1).astype(np.float32),
            ),
            r"slice\.test\.npy: expected finite values, got inf or nan in row 7$",
        ),
    ],
)
def test_damage_to_the_old_format(old, damage, fault):
    damage(old)
    (message,) = prepare_old(old)
    assert re.search(fault, message), message
    assert not list(old.glob(".partial-*"))


def change_json(directory, **changes):
    """Changes the third point."""
    path = directory / "trn.json.gz"
    with gzip.open(path, "rt") as file:
        points = [json.loads(line) for line in file]
    points[2] |= changes
    write_json(path, [{k: v for k, v in point.items() if v is not None} for point in points])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda d: cut(d / "trn.json.gz", 300), r"trn\.json\.gz:\d+: damaged compressed file"),
        (
            lambda d: change_json(d, target_ind=[3, 12]),
            r"trn\.json\.gz:3: expected labels in 0\.\.11, got \[3, 12\]",
        ),
        (
            lambda d: change_json(d, target_ind=None),
            r"trn\.json\.gz:3: expected JSON with title",
        ),
        (
            lambda d: change_json(d, title=None),
            r"trn\.json\.gz:3: expected JSON with title",
        ),
        *(
            (
                lambda d, change=change: change_json(d, **change),
                rf"trn\.json\.gz:3: expected JSON .*: {fault}",
            )
            for change, fault in (
                ({"target_ind": [1.7]}, "target_ind must be a list of whole numbers"),
                ({"target_ind": [True]}, "target_ind must be a list of whole numbers"),
                ({"target_ind": "12"}, "target_ind must be a list of whole numbers"),
                ({"title": 5}, "sequence item 0: expected str instance, int found"),
                ({"title": "\ud800"}, "'utf-8' codec can't encode"),
            )
        ),
        (
            lambda d: write_lines(d / "trn.json.gz", ['{"title": null, "target_ind": [1, 2]}']),
            r"trn\.json\.gz:1: expected JSON with title",
        ),
        (lambda d: write_lines(d / "trn.json.gz", ["[" * 100_000]), r"trn\.json\.gz:1: expected JSON"),
        (lambda d: write_lines(d / "train.tsv.gz", ["1|x\ta"]), r"gz:1: expected numbers of labels, got"),
        (
            lambda d: (d / "tst.json.gz").rename(d / "trn.json.gz").with_name("tst.json.gz").touch(),
            r"trn\.json\.gz: expected 30 points and 12 labels, got 10 and 12",
        ),
        (
            lambda d: write_xmc_labels(d / "trn_X_Y.txt", random_labels(30, 99)),
            r"trn_X_Y\.txt: has other labels than .*train\.tsv\.gz",
        ),
        (
            lambda d: (d / "filter_labels_train.txt").write_text("30 0\n"),
            r"filter_labels_train\.txt:1: expected a row below 30, got 30",
        ),
    ],
)
def test_damage_to_raw_text(raw, damage, fault):
    damage(raw)
    faults = prepare_raw(raw)
    assert re.search(fault, faults[0]), faults
    assert not list(raw.glob(".partial-*"))


def test_statistics_agree_with_each_other():
    # Points per label, which the repository states beside labels per point.
    points_per_label = {"Eurlex-4K": 20.8, "Wiki10-31K": 8.5, "AmazonCat-13K": 448.6, "Wiki-500K": 16.9}
    for name, expected in points_per_label.items():
        s = prepare.DATASETS[name]
        assert s.train * s.labels_per_point / s.labels == pytest.approx(expected, rel=0.006)


def test_command_line_says_what_goes_where(tmp_path):
    command = [sys.executable, "-m", "experiments.prepare", "--dataset=Amazon-670K", f"--dir={tmp_path}"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 1
    assert f"Amazon-670K needs, in {tmp_path / 'amazon-670k'}:" in finished.stdout
    assert re.search(r"cascade\.test\.npy +float32 \[153,025 test points, 768\]", finished.stdout)
    assert f"{tmp_path / 'amazon-670k' / 'train.txt'}: missing" in finished.stderr


def test_every_flagfile_of_a_public_set_names_files_that_are_prepared():
    written = {"trn_X_Y.txt", "tst_X_Y.txt", "train.tsv.gz", "test.tsv.gz"}
    for name in ("Wiki10-31K", "Wiki-500K", "Amazon-3M", "LF-AmazonTitles-131K"):
        known = written | {file for file, _ in prepare.required_files(name, prepare.DATASETS[name].features)}
        flagfiles = list((ROOT / "sparse_xmc" / "cli" / "flags" / "data").glob(f"{name.lower()}*.cfg"))
        assert flagfiles
        for path in flagfiles:
            paths = re.findall(r"^--\w+=(data/.*)$", path.read_text(), re.MULTILINE)
            assert len(paths) == 4
            for file in map(Path, paths):
                assert file.parent == Path("data") / name.lower()
                assert file.name in known
