import numpy as np
import pytest
import scipy.sparse

from sparse_xmc.cli import datasets
from sparse_xmc.data import Dataset, write_tsv, write_xmc_text

TRAIN = (
    "mammal|pet\tsmall furry cat\nmammal|pet\tlarge furry dog\nbird\tsmall yellow bird\nbird\tlarge bird\n"
)
TEST = "pet|fish\ta small gold fish\n\tlarge\nbird\tnothing known\n"


def random_dataset(size, num_features=6, num_labels=5, seed=0):
    rng = np.random.default_rng(seed)
    features = np.where(rng.random((size, num_features)) < 0.5, rng.random((size, num_features)), 0)
    labels = rng.random((size, num_labels)) < 0.4
    return Dataset(scipy.sparse.csr_array(features.astype(np.float32)), scipy.sparse.csr_array(labels))


def assert_equal(dataset, other):
    for field in ("features", "labels"):
        a, b = getattr(dataset, field), getattr(other, field)
        assert a.shape == b.shape
        np.testing.assert_array_equal(a.toarray(), b.toarray())


@pytest.fixture
def xmc(tmp_path):
    """Return a training and a test set, and the paths of their files."""
    splits = random_dataset(8), random_dataset(4, seed=1)
    paths = [str(tmp_path / name) for name in ("train.txt", "test.txt")]
    for path, dataset in zip(paths, splits, strict=True):
        write_xmc_text(path, dataset)
    return splits, paths


@pytest.fixture
def tsv(tmp_path):
    paths = tmp_path / "train.tsv", tmp_path / "test.tsv"
    for path, text in zip(paths, (TRAIN, TEST), strict=True):
        path.write_text(text)
    return [str(path) for path in paths]


def test_text_is_encoded_with_words_and_labels_of_training_points(tsv):
    splits = datasets.load(*tsv)
    assert splits.label_encoder.names == ["bird", "mammal", "pet"]
    np.testing.assert_array_equal(splits.train.labels.toarray(), [[0, 1, 1], [0, 1, 1], [1, 0, 0], [1, 0, 0]])
    # "fish" is not a label of the training points.
    np.testing.assert_array_equal(splits.test.labels.toarray(), [[0, 0, 1], [0, 0, 0], [1, 0, 0]])
    assert splits.unseen_labels == 1
    # The words in at least two training texts are bird, furry, large, small.
    assert splits.train.features.shape == (4, 4)
    np.testing.assert_array_equal(splits.test.features.toarray(), [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])


def test_text_with_bigrams(tmp_path):
    (tmp_path / "train.tsv").write_text("pet\tsmall furry cat\npet\tsmall furry dog\nbird\tfurry, small\n")
    (tmp_path / "test.tsv").write_text("pet\tfurry small furry\n")
    splits = datasets.load(str(tmp_path / "train.tsv"), str(tmp_path / "test.tsv"), ngrams=2)
    # The words and pairs in at least two training texts are furry, small, "small furry".
    np.testing.assert_array_equal(splits.train.features.toarray() > 0, [[1, 1, 1], [1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(splits.test.features.toarray() > 0, [[1, 1, 1]])


def test_xmc_repository_format(xmc, tmp_path):
    (train, test), paths = xmc
    for cache_dir in (None, tmp_path / "cache", tmp_path / "cache"):
        splits = datasets.load(*paths, cache_dir=cache_dir)
        assert_equal(splits.train, train)
        assert_equal(splits.test, test)
        assert splits.unseen_labels == np.sum(test.labels.sum(axis=0) > 10 * train.labels.sum(axis=0))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert splits.inputs is splits.label_encoder is None


def test_dense_features_with_label_files(xmc, tmp_path):
    (train, test), paths = xmc
    dense = []
    for name, dataset in (("train", train), ("test", test)):
        dense.append(np.random.default_rng(len(dataset)).normal(size=(len(dataset), 3)).astype(np.float32))
        np.save(tmp_path / f"{name}.npy", dense[-1])
    splits = datasets.load(
        *paths, train_features=str(tmp_path / "train.npy"), test_features=str(tmp_path / "test.npy")
    )
    for split, features, labels in zip(
        (splits.train, splits.test), dense, (train.labels, test.labels), strict=True
    ):
        np.testing.assert_array_equal(split.features, features)
        np.testing.assert_array_equal(split.labels.toarray(), labels.toarray())


def test_filters_with_numbered_labels(xmc, tmp_path):
    (train, test), paths = xmc
    (tmp_path / "train_filter.txt").write_text("7 4\n")
    (tmp_path / "test_filter.txt").write_text("0 1\n3 2\n")
    splits = datasets.load(
        *paths,
        train_filter=str(tmp_path / "train_filter.txt"),
        test_filter=str(tmp_path / "test_filter.txt"),
    )
    for excluded, pairs, labels in (
        (splits.train.excluded, [(7, 4)], train.labels),
        (splits.test.excluded, [(0, 1), (3, 2)], test.labels),
    ):
        assert excluded.shape == labels.shape
        assert list(zip(*(axis.tolist() for axis in excluded.nonzero()), strict=True)) == pairs


def test_filters_with_text_match_numeric_label_names(tmp_path):
    (tmp_path / "train.tsv").write_text("10|9\ta b\n9|200\ta b\n")
    (tmp_path / "test.tsv").write_text("10\ta\n9\tb\n")
    (tmp_path / "filter.txt").write_text("1 200\n0 9\n0 7\n")  # no training point has label 7
    paths = [str(tmp_path / f"{name}.tsv") for name in ("train", "test")]
    splits = datasets.load(*paths, test_filter=str(tmp_path / "filter.txt"))
    assert splits.label_encoder.names == ["10", "200", "9"]
    np.testing.assert_array_equal(splits.test.excluded.toarray(), [[0, 0, 1], [0, 1, 0]])
    assert splits.train.excluded is None


def test_filter_with_other_label_names_raises(tsv, tmp_path):
    (tmp_path / "filter.txt").write_text("0 1\n")
    with pytest.raises(ValueError, match=r"expected names of training labels, such as 'bird', found none"):
        datasets.load(*tsv, test_filter=str(tmp_path / "filter.txt"))


def test_filter_without_any_labels_raises(tmp_path):
    for name, content in (("train.tsv", "\ta b\n\ta b\n"), ("test.tsv", "\ta\n"), ("filter.txt", "0 1\n")):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"filter\.txt: expected names of training labels, found none$"):
        datasets.load(
            *(str(tmp_path / name) for name in ("train.tsv", "test.tsv")),
            test_filter=str(tmp_path / "filter.txt"),
        )


def test_text_file_without_repeated_words_raises(tsv, tmp_path):
    (tmp_path / "train.tsv").write_text("a\tone\nb\ttwo\n")
    with pytest.raises(ValueError, match=r"train\.tsv: no word occurs in at least two of its texts$"):
        datasets.load(*tsv)


@pytest.mark.parametrize("name", ["train.tsv", "test.tsv"])
def test_text_file_without_points_raises(tsv, tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"{name}: expected points, got none$"):
        datasets.load(*tsv)


@pytest.mark.parametrize("name", ["train.txt", "test.txt"])
def test_feature_file_without_points_raises(tmp_path, name):
    paths = [tmp_path / "train.txt", tmp_path / "test.txt"]
    for path in paths:
        path.write_text("0 2 2\n" if path.name == name else "1 2 2\n0 1:1.0\n")
    with pytest.raises(ValueError, match=rf"{name}: expected points, got none$"):
        datasets.load(*map(str, paths))


def test_format_of_text_file_follows_from_its_name(tmp_path):
    for name in ("texts.tsv", "texts.tsv.gz"):
        write_tsv(tmp_path / name, [["a", "b"], []], ["one", "two"])
        assert list(datasets.read_texts(str(tmp_path / name))) == [(["a", "b"], "one"), ([], "two")]
    for name in ("texts.txt", "texts", "texts.tsv.old"):
        (tmp_path / name).write_text("a\tone\n\n")
        assert list(datasets.read_texts(str(tmp_path / name))) == [([], "a\tone"), ([], "")]


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz"])
def test_comma_separated_values_raise(tsv, tmp_path, name):
    (tmp_path / name).write_text("label,text\n")
    with pytest.raises(ValueError, match=rf"{name}: expected a \.tsv of label.*, got comma-separated values"):
        datasets.load(str(tmp_path / name), tsv[1])


@pytest.mark.parametrize("missing", ["train", "test", "train_features", "test_features"])
def test_missing_file_raises(xmc, tmp_path, missing):
    _, (train, test) = xmc
    np.save(tmp_path / "x.npy", np.zeros((8, 2), np.float32))
    files = {
        "train": train,
        "test": test,
        "train_features": tmp_path / "x.npy",
        "test_features": tmp_path / "x.npy",
    }
    files = {name: str(path) for name, path in files.items()} | {missing: "nowhere/file.txt"}
    with pytest.raises(FileNotFoundError, match=r"^nowhere/file\.txt: no such file$"):
        datasets.load(**files)


def test_dense_features_for_one_split_raise(xmc, tmp_path):
    _, paths = xmc
    np.save(tmp_path / "x.npy", np.zeros((8, 2), np.float32))
    with pytest.raises(ValueError, match="expected both train_features and test_features, or neither"):
        datasets.load(*paths, train_features=str(tmp_path / "x.npy"))


def test_different_formats_of_splits_raise(xmc, tsv):
    _, (train, _) = xmc
    with pytest.raises(ValueError, match=r"must be in the same format, got .*train\.txt and .*test\.tsv"):
        datasets.load(train, tsv[1])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_features": 7}, r"num_features differ: 6 in .*train\.txt, 7 in .*test\.txt"),
        ({"num_labels": 4}, r"num_labels differ: 5 in .*train\.txt, 4 in .*test\.txt"),
    ],
)
def test_different_sizes_of_splits_raise(xmc, sizes, message):
    _, (train, test) = xmc
    write_xmc_text(test, random_dataset(4, **sizes))
    with pytest.raises(ValueError, match=message):
        datasets.load(train, test)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_text_files_are_recognized_by_name(suffix):
    assert datasets._is_text(f"a/b.tsv{suffix}")
    assert not datasets._is_text(f"a.tsv/b.txt{suffix}")


def test_printable_escapes_control_characters():
    assert datasets.printable("caf\u00e9 \x1b[2J\ta\nb") == "caf\u00e9 \\x1b[2J\\ta\\nb"
    assert datasets.printable(7) == "7"
