"""Tests of `experiments.prepare` on small files in the formats of the public data sets, valid and damaged."""

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
    """Return a label matrix [points, 12] with two random labels for each point."""
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
def xmc_dir(tmp_path):
    """A directory with a data set in the repository's text format, and dense features."""
    for split, labels in LABELS.items():
        write_xmc_text(
            tmp_path / f"{split}.txt", Dataset(np.ones((num_points(labels), 3), np.float32), labels)
        )
        features = np.random.default_rng(0).normal(size=(num_points(labels), 512)).astype(np.float32)
        np.save(tmp_path / f"slice.{split}.npy", features)
    return tmp_path


@pytest.fixture
def json_dir(tmp_path):
    """A directory with a data set as JSON lines of raw text, and filter files."""
    for split, labels in LABELS.items():
        points = [
            {
                "uid": f"B{row:03}",
                "title": f"a title\tof {row}",
                "content": "two\nlines",
                "target_ind": [*map(int, labels[[row]].indices[::-1])],
                "target_rel": [1.0, 1.0],
            }
            for row in range(num_points(labels))
        ]
        write_json(tmp_path / f"{prepare._SPLITS[split]}.json.gz", points)
        (tmp_path / f"filter_labels_{split}.txt").write_text("3 7\n5 0\n")
    return tmp_path


def num_points(labels):
    return labels.shape[0]


def write_json(path, points):
    write_lines(path, map(json.dumps, points))


def write_lines(path, lines):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def prepare_xmc(directory, features=("slice",)):
    return prepare.prepare("Amazon-670K", directory, features)


def prepare_json(directory):
    return prepare.prepare("LF-AmazonTitles-131K", directory, ())


def test_prepare_converts_xmc_text(xmc_dir):
    assert prepare_xmc(xmc_dir) == []
    for split, short in prepare._SPLITS.items():
        labels = read_xmc_labels(xmc_dir / f"{short}_X_Y.txt")
        np.testing.assert_array_equal(labels.toarray(), LABELS[split].toarray())
    splits = datasets.load(
        str(xmc_dir / "trn_X_Y.txt"),
        str(xmc_dir / "tst_X_Y.txt"),
        train_features=str(xmc_dir / "slice.train.npy"),
        test_features=str(xmc_dir / "slice.test.npy"),
    )
    assert splits.train.features.shape == (30, 512)
    assert not list(xmc_dir.glob(".partial-*"))


def test_prepare_keeps_existing_label_files(xmc_dir):
    for split, short in prepare._SPLITS.items():
        write_xmc_labels(xmc_dir / f"{short}_X_Y.txt", LABELS[split])
        (xmc_dir / f"{split}.txt").unlink()
    before = (xmc_dir / "trn_X_Y.txt").stat().st_mtime_ns
    assert prepare_xmc(xmc_dir) == []
    assert (xmc_dir / "trn_X_Y.txt").stat().st_mtime_ns == before


def test_prepare_converts_raw_text(json_dir):
    assert prepare_json(json_dir) == []
    names, texts = read_tsv(json_dir / "train.tsv.gz")
    assert texts[4] == "a title of 4 two lines"
    assert sorted(map(int, names[4])) == LABELS["train"][[4]].indices.tolist()
    np.testing.assert_array_equal(
        read_xmc_labels(json_dir / "tst_X_Y.txt").toarray(), LABELS["test"].toarray()
    )
    assert prepare_json(json_dir) == []  # Existing files are checked again.
    splits = datasets.load(
        str(json_dir / "train.tsv.gz"),
        str(json_dir / "test.tsv.gz"),
        test_filter=str(json_dir / "filter_labels_test.txt"),
    )
    names = splits.label_encoder.names
    rows, columns = splits.test.excluded.nonzero()
    assert [(row, names[column]) for row, column in zip(rows, columns, strict=True)] == [(3, "7"), (5, "0")]


def test_prepare_reports_missing_files(tmp_path):
    assert prepare_xmc(tmp_path) == [
        f"{tmp_path / name}: missing"
        for name in ("train.txt", "slice.train.npy", "test.txt", "slice.test.npy")
    ]
    assert prepare_xmc(tmp_path, ()) == [f"{tmp_path / name}: missing" for name in ("train.txt", "test.txt")]
    assert prepare_json(tmp_path) == [
        f"{tmp_path / name}: missing"
        for name in ("trn.json.gz", "filter_labels_train.txt", "tst.json.gz", "filter_labels_test.txt")
    ]


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: truncate(d / "train.txt", 200), r"train\.txt:\d+: expected"),
        (
            lambda d: write_xmc_labels(d / "trn_X_Y.txt", LABELS["test"]),
            r"trn_X_Y\.txt: expected 30 points and 12 labels, got 10 and 12$",
        ),
        (
            lambda d: write_xmc_labels(d / "trn_X_Y.txt", scipy.sparse.csr_array(np.eye(30, 12, dtype=bool))),
            r"trn_X_Y\.txt: expected 2\.0 labels per point, got 0\.40: another version\?$",
        ),
        (
            lambda d: truncate(d / "slice.train.npy", 5000),
            r"slice\.train\.npy: .* expected 61,568 bytes, got 5,000: half-downloaded\?$",
        ),
        (lambda d: truncate(d / "slice.train.npy", 4), r"slice\.train\.npy: not a whole \.npy file"),
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
def test_prepare_reports_damaged_xmc_text(xmc_dir, damage, expected):
    damage(xmc_dir)
    (message,) = prepare_xmc(xmc_dir)
    assert re.search(expected, message), message
    assert not list(xmc_dir.glob(".partial-*"))


def change_json(directory, **changes):
    """Change fields of the third training point; None removes a field."""
    path = directory / "trn.json.gz"
    with gzip.open(path, "rt") as file:
        points = [json.loads(line) for line in file]
    points[2] |= changes
    write_json(path, [{k: v for k, v in point.items() if v is not None} for point in points])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: truncate(d / "trn.json.gz", 300), r"trn\.json\.gz:\d+: damaged compressed file"),
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
def test_prepare_reports_damaged_raw_text(json_dir, damage, expected):
    damage(json_dir)
    messages = prepare_json(json_dir)
    assert re.search(expected, messages[0]), messages
    assert not list(json_dir.glob(".partial-*"))


def test_statistics_are_consistent():
    # Points per label, as published in the repository.
    points_per_label = {"Eurlex-4K": 20.8, "Wiki10-31K": 8.5, "AmazonCat-13K": 448.6, "Wiki-500K": 16.9}
    for name, expected in points_per_label.items():
        s = prepare.DATASETS[name]
        assert s.train * s.labels_per_point / s.labels == pytest.approx(expected, rel=0.006)


def test_program_lists_required_files(tmp_path):
    command = [sys.executable, "-m", "experiments.prepare", "--dataset=Amazon-670K", f"--dir={tmp_path}"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 1
    assert f"Amazon-670K requires these files in {tmp_path / 'amazon-670k'}:" in finished.stdout
    assert re.search(r"cascade\.test\.npy +float32 \[153,025 test points, 768\]", finished.stdout)
    assert f"{tmp_path / 'amazon-670k' / 'train.txt'}: missing" in finished.stderr


def test_data_flagfiles_name_prepared_files():
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
