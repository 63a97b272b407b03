"""Tests of XMCClassifier, the estimator with the interface of scikit-learn."""

import collections
import copy
import dataclasses
import itertools
import json
import pickle

import jax
import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import CountVectorizer

from sparse_xmc import XMCClassifier
from sparse_xmc.mesh import make_mesh

WORDS = ["apple", "brook", "cloud", "dune", "ember", "fern", "grove", "heath"]
DENSE = {"penultimate": 32, "fan_in": 8, "epochs": 80, "batch_size": 8}
SMALL = DENSE | {"embedding": 16}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def make_points(size=60, seed=0):
    """Return texts of random words and filler, and their labels, the words in capitals."""
    rng = np.random.default_rng(seed)
    chosen = [sorted(rng.choice(WORDS, rng.integers(1, 4), replace=False)) for _ in range(size)]
    texts = [" ".join([*words, *rng.choice(["the", "of", "some"], 3)]) for words in chosen]
    return texts, [[word.upper() for word in words] for words in chosen]


def indicator(labels):
    return np.array([[word.upper() in names for word in WORDS] for names in labels])


def counts(texts):
    return np.array([[text.split().count(word) for word in [*WORDS, "the"]] for text in texts], np.float32)


@pytest.fixture(scope="module")
def fitted():
    with jax.numpy_dtype_promotion("standard"):
        return XMCClassifier(**SMALL).fit(*make_points())


@pytest.mark.usefixtures("x64")
def test_fit_and_predict_texts(fitted):
    texts, labels = make_points(20, seed=1)
    assert fitted.n_labels_ == 8
    assert fitted.classes_.tolist() == [word.upper() for word in WORDS]
    seen = [text.split() for text in make_points()[0]]
    pairs = collections.Counter(pair for words in seen for pair in set(itertools.pairwise(words)))
    assert fitted.n_features_in_ == 8 + 3 + sum(count >= 2 for count in pairs.values())
    assert len(fitted.history_) == 80
    names, scores = fitted.predict(texts, k=3)
    assert names.shape == scores.shape == (20, 3)
    assert np.all(np.diff(scores, axis=1) <= 0)
    right = [names[i, 0] in labels[i] for i in range(20)]
    assert np.mean(right) > 0.9
    assert fitted.score(texts, labels) == pytest.approx(np.mean(right))


def test_score_counts_unknown_labels_as_wrong(fitted):
    texts, labels = make_points(20, seed=1)
    assert fitted.score(texts, [["ELSE"]] * 20) == 0
    assert fitted.score(texts, [[*names, "ELSE"] for names in labels]) == fitted.score(texts, labels)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("features", ["dense", "csr_array", "csr_matrix", "coo"])
@pytest.mark.parametrize("labels", ["dense", "csr_matrix", "names"])
def test_fit_and_predict_matrices(features, labels):
    def convert(kind, matrix):
        constructors = {"csr_array": scipy.sparse.csr_array, "csr_matrix": scipy.sparse.csr_matrix}
        return matrix if kind == "dense" else constructors.get(kind, scipy.sparse.coo_array)(matrix)

    texts, names = make_points()
    X, y = convert(features, counts(texts)), names if labels == "names" else convert(labels, indicator(names))
    classifier = XMCClassifier(**DENSE if features == "dense" else SMALL).fit(X, y)
    assert classifier.score(X, y) > 0.9
    predicted, _ = classifier.predict(X, k=2)
    expected = [word.upper() for word in WORDS] if labels == "names" else np.arange(8)
    assert set(predicted.ravel().tolist()) <= set(np.asarray(expected).tolist())
    assert predicted.dtype == (object if labels == "names" else np.int64)


@pytest.mark.bit_for_bit
@pytest.mark.parametrize("convert", [np.asarray, scipy.sparse.csr_array])
@pytest.mark.parametrize("penultimate", [0, 32])
def test_scores_do_not_depend_on_feature_scale(convert, penultimate):
    texts, names = make_points()
    scores = []
    for scale in (2**-10, 1, 2**10):  # powers of two add no rounding errors
        X = convert(scale * counts(texts))
        classifier = XMCClassifier(**DENSE | {"penultimate": penultimate, "epochs": 5}).fit(X, names)
        scores.append(classifier.predict(X, k=8).scores)
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[2], scores[1])


def test_scikit_learn_conventions():
    classifier = XMCClassifier(fan_in=16, seed=3)
    assert clone(classifier).get_params() == classifier.get_params()
    assert classifier.set_params(fan_in=8) is classifier
    assert classifier.fan_in == 8
    assert repr(classifier) == "XMCClassifier(fan_in=8, seed=3)"
    assert not [name for name in vars(classifier) if name.endswith("_")]
    with pytest.raises(ValueError, match="Invalid parameter 'fanin'"):
        classifier.set_params(fanin=3)


@pytest.mark.bit_for_bit
def test_same_seed_gives_same_classifier():
    texts, labels = make_points()
    options = SMALL | {"epochs": 3}
    first, second = (XMCClassifier(**options).fit(texts, labels).predict(texts, k=8) for _ in range(2))
    np.testing.assert_array_equal(first.scores, second.scores)
    other = XMCClassifier(**options, seed=1).fit(texts, labels).predict(texts, k=8)
    assert np.any(first.scores != other.scores)


@pytest.mark.usefixtures("x64")
def test_save_and_load_round_trip(fitted, tmp_path):
    texts, labels = make_points(20, seed=1)
    fitted.save(tmp_path / "model")
    loaded = XMCClassifier.load(tmp_path / "model")
    assert loaded.get_params() == fitted.get_params()
    assert loaded.classes_.tolist() == fitted.classes_.tolist()
    for a, b in zip(loaded.predict(texts), fitted.predict(texts), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.score(texts, labels) == fitted.score(texts, labels)
    (tmp_path / "model" / "estimator.json").write_text(json.dumps(fitted.get_params() | {"epochs": 9}))
    with pytest.raises(ValueError, match=r"model: the saved model is damaged: estimator\.json has changed"):
        XMCClassifier.load(tmp_path / "model")
    dataclasses.replace(fitted.saved_, parameters={"fanin": 3}).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"estimator\.json: not the parameters of a classifier: .*fanin"):
        XMCClassifier.load(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"nowhere/model\.json: not there"):
        XMCClassifier.load(tmp_path / "nowhere")


def test_verbose_prints_progress(capsys):
    texts, labels = make_points()
    XMCClassifier(**SMALL | {"epochs": 1}).fit(texts, labels)
    assert capsys.readouterr().out == ""
    XMCClassifier(**SMALL | {"epochs": 1}, verbose=True).fit(texts, labels)
    assert capsys.readouterr().out.startswith("epoch   1  loss ")


TEXTS, LABELS = make_points(6)


@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        ("one text", LABELS, TypeError, "X must be a sequence of texts or .*, got a single str"),
        ([*TEXTS[:5], 3], LABELS, TypeError, "point 5 is 3, a int"),
        (TEXTS, LABELS[1:], ValueError, "X and y must be of the same points, got 6 in X and 5 in y"),
        (TEXTS, [*"ABCDEF"], TypeError, "sequence of names .* for each point, got 'A' for point 0"),
        (TEXTS, [["a"], ["b"], [1], [], [], []], TypeError, r"got \[1\] for point 2"),
        (
            TEXTS,
            np.zeros(6),
            ValueError,
            r"y must have shape \[N, L\], or be names for each point, got \[6\]",
        ),
        (TEXTS, [[]] * 6, ValueError, "expected points with labels, got 6 points and 0 labels"),
        (TEXTS, np.full((6, 3), np.nan), ValueError, "y must be finite, got NaN or infinity"),
        (TEXTS, [["a"], ["b\nc"], [], [], [], []], ValueError, r"line breaks, got 'b\\nc' for point 1"),
        (np.full((6, 3), np.nan), LABELS, ValueError, "X must be finite, got NaN or infinity"),
        (scipy.sparse.csr_array(np.full((6, 3), np.inf)), LABELS, ValueError, "X must be finite"),
        (np.zeros(6), LABELS, ValueError, r"X must have shape \[N, D\], got \[6\]"),
    ],
)
def test_fit_with_invalid_data_raises(X, y, error, message):
    with pytest.raises(error, match=message):
        XMCClassifier(**DENSE, min_df=1).fit(X, y)


def test_fit_with_invalid_settings_raises():
    for options, message in (
        ({"fan_in": 0}, "fan_in must be at least 1, or None, got 0"),
        ({"fan_in": 33}, "fan_in must be at most the number of units, 32, got 33"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"epochs": 0}, "epochs must be at least 1, or None, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            XMCClassifier(**SMALL | options, min_df=1).fit(TEXTS, LABELS)


def test_fan_in_and_embedding_fit_the_data():
    X = np.eye(4, dtype=np.float32)
    classifier = XMCClassifier(penultimate=0, epochs=1).fit(X, [["a"], ["b"], ["a"], ["c"]])
    assert classifier.saved_.config.head.fan_in == 4
    with pytest.raises(ValueError, match="embedding=8 is for texts and sparse features, but X is dense"):
        XMCClassifier(embedding=8).fit(X, [["a"], ["b"], ["a"], ["c"]])
    assert XMCClassifier(fan_in=np.int64(2), epochs=1).fit(X, [["a"]] * 4).saved_.config.head.fan_in == 2


def test_predict_and_score_with_invalid_data_raise(fitted):
    with pytest.raises(NotFittedError, match="not trained yet: call fit, or load one"):
        XMCClassifier().predict(TEXTS)
    with pytest.raises(TypeError, match="X must be texts, as the classifier was trained on, got features"):
        fitted.predict(np.zeros((3, 11), np.float32))
    with pytest.raises(ValueError, match="k must be between 1 and the number of labels, 8, got 9"):
        fitted.predict(TEXTS, k=9)
    with pytest.raises(ValueError, match="y must be names, got a matrix"):
        fitted.score(TEXTS, indicator(LABELS))
    dense = XMCClassifier(**DENSE | {"epochs": 1}).fit(counts(TEXTS), indicator(LABELS))
    with pytest.raises(ValueError, match="X must have 9 features, got 8"):
        dense.predict(counts(TEXTS)[:, 1:])
    with pytest.raises(TypeError, match="X must be dense, as the classifier was trained on, got csr_array"):
        dense.predict(scipy.sparse.csr_array(counts(TEXTS)))
    with pytest.raises(TypeError, match="X must be features, as the classifier was trained on, got texts"):
        dense.predict(TEXTS)
    with pytest.raises(ValueError, match=r"y must be a matrix \[N, 8\], got a matrix \[6, 7\]"):
        dense.score(counts(TEXTS), indicator(LABELS)[:, 1:])
    with pytest.raises(ValueError, match="y must be a matrix, as the classifier was trained with, got names"):
        dense.score(counts(TEXTS), LABELS)


def unsorted_counts():
    """Return word counts as `CountVectorizer` computes them: int64, with unsorted indices."""
    X = CountVectorizer(token_pattern=r"\w+").fit_transform(make_points()[0])
    assert not X.has_sorted_indices
    return X


def same_arrays(matrix, before):
    return all(np.array_equal(getattr(matrix, name), array) for name, array in before.items())


def copy_arrays(matrix):
    return {name: getattr(matrix, name).copy() for name in ("data", "indices", "indptr")}


def test_arguments_are_not_modified():
    X, y = unsorted_counts(), scipy.sparse.csr_matrix(indicator(make_points()[1]) * 2.0)[:, ::-1]
    y.has_sorted_indices = False
    before = copy_arrays(X), copy_arrays(y)
    classifier = XMCClassifier(**SMALL | {"epochs": 40}).fit(X, y)
    first, second = classifier.predict(X, k=8), classifier.predict(X, k=8)
    assert classifier.score(X, y) > 0.9
    assert same_arrays(X, before[0])
    assert same_arrays(y, before[1])
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.scores, second.scores)
    expected = classifier.predict(scipy.sparse.csr_array(X.toarray()), k=8)
    np.testing.assert_array_equal(first.labels, expected.labels)


def test_read_only_unsorted_matrices():
    X, y = unsorted_counts(), scipy.sparse.csr_matrix(indicator(make_points()[1]) * 2.0)[:, ::-1]
    for array in (X.data, X.indices, X.indptr, y.data, y.indices, y.indptr):
        array.flags.writeable = False  # as in joblib's memory maps
    classifier = XMCClassifier(**SMALL | {"epochs": 1}).fit(X, y)
    assert classifier.predict(X).labels.shape == (60, 5)


def test_numpy_scalars_are_valid_parameters(tmp_path):
    options = {
        "epochs": np.int64(1),
        "learning_rate": np.float32(0.5),
        "dropout": np.float64(0.25),
        "encoder_trainable": np.False_,
        "verbose": np.False_,
        "seed": np.int64(3),
    }
    classifier = XMCClassifier(**SMALL | options).fit(*make_points())
    classifier.save(tmp_path / "model")
    loaded = XMCClassifier.load(tmp_path / "model")
    assert loaded.get_params() == classifier.get_params()
    assert (loaded.epochs, loaded.learning_rate, loaded.seed) == (1, 0.5, 3)
    assert type(loaded.epochs) is int


def test_save_with_invalid_parameters_writes_nothing(fitted, tmp_path):
    classifier = copy.copy(fitted)
    classifier.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    classifier.set_params(epochs="many")
    with pytest.raises(ValueError, match=r"epochs must be .* got 'many'"):
        classifier.save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40, 1.5, "1", True])
def test_seed_out_of_range_raises(seed):
    with pytest.raises(ValueError, match=r"seed must be .*4294967295.*, got"):
        XMCClassifier(**SMALL, seed=seed).fit(TEXTS, LABELS)


@pytest.mark.bit_for_bit
def test_seed_none_draws_a_seed():
    options = SMALL | {"epochs": 1}
    XMCClassifier(**options, seed=2**32 - 1).fit(*make_points())
    drawn, other = (XMCClassifier(**options, seed=None).fit(*make_points()) for _ in range(2))
    assert drawn.seed is None
    assert drawn.seed_ != other.seed_
    again = XMCClassifier(**options, seed=drawn.seed_).fit(*make_points())
    np.testing.assert_array_equal(drawn.predict(TEXTS).scores, again.predict(TEXTS).scores)


def test_drawn_seed_is_saved(tmp_path):
    classifier = XMCClassifier(**SMALL | {"epochs": 1}, seed=None).fit(*make_points())
    classifier.save(tmp_path)
    loaded = XMCClassifier.load(tmp_path)
    assert (loaded.seed, loaded.seed_) == (None, classifier.seed_)


def test_fit_and_score_accept_iterators(fitted):
    texts, labels = make_points()
    names = (iter(names) for names in labels)
    classifier = XMCClassifier(**SMALL).fit(iter(texts), names)
    assert classifier.n_labels_ == 8
    assert classifier.score(texts, labels) > 0.9
    assert classifier.score(iter(texts), map(iter, labels)) == classifier.score(texts, labels)


def test_default_k_is_limited_by_number_of_labels():
    classifier = XMCClassifier(epochs=1).fit(np.eye(4, dtype=np.float32), [["a"], ["b"], ["a"], ["c"]])
    assert classifier.predict(np.eye(4)).labels.shape == (4, 3)
    with pytest.raises(ValueError, match="k must be between 1 and the number of labels, 3, got 5"):
        classifier.predict(np.eye(4), k=5)
    with pytest.raises(ValueError, match=r"k must be between 1 and the number of labels, 3, got 2\.0"):
        classifier.predict(np.eye(4), k=2.0)


@pytest.mark.parametrize("kind", ["texts", "dense", "sparse"])
def test_predict_and_score_without_points(kind):
    texts, names = make_points()
    X = {"texts": texts, "dense": counts(texts), "sparse": scipy.sparse.csr_array(counts(texts))}[kind]
    options = DENSE if kind == "dense" else SMALL
    classifier = XMCClassifier(**options | {"epochs": 1}).fit(X, names)
    for empty in ([], X[:0]):
        labels, scores = classifier.predict(empty, k=3)
        assert labels.shape == scores.shape == (0, 3)
        with pytest.raises(ValueError, match="X must have at least one point to score, got none"):
            classifier.score(empty, [])
    with pytest.raises(ValueError, match="expected points with labels, got 0 points"):
        XMCClassifier().fit([], [])


def test_fit_without_repeated_words_raises():
    with pytest.raises(ValueError, match="no word is in 2 of the 2 texts"):
        XMCClassifier().fit(["a b", "c d"], [["x"], ["y"]])


def test_pickle_round_trip_raises_only_with_a_mesh(fitted):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(TEXTS).scores, fitted.predict(TEXTS).scores)
    on_mesh = XMCClassifier(mesh=make_mesh(label=2), **SMALL | {"epochs": 1})
    assert clone(on_mesh).mesh is on_mesh.mesh
    message = "with a mesh cannot be pickled or copied, .*; use save and load, or mesh=None"
    with pytest.raises(TypeError, match=message):
        pickle.dumps(on_mesh)
    on_mesh.fit(*make_points()).set_params(mesh=None)
    with pytest.raises(TypeError, match=message):
        pickle.dumps(on_mesh)


def test_batch_size_above_number_of_points():
    texts, labels = make_points(40)
    classifier = XMCClassifier(**SMALL | {"batch_size": 10**9, "epochs": 1}).fit(texts, labels)
    assert classifier.predict(texts).labels.shape == (40, 5)


def test_data_frames_and_series():
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    pyarrow = pytest.importorskip("pyarrow")
    texts, names = make_points()
    label_names = [word.upper() for word in WORDS]
    columns = {name: indicator(names)[:, i].astype(int) for i, name in enumerate(label_names)}
    features = {str(i): column for i, column in enumerate(counts(texts).T)}
    options = DENSE | {"epochs": 30}
    expected = XMCClassifier(**options).fit(counts(texts), names).predict(counts(texts), k=8)
    for make in (pandas.DataFrame, polars.DataFrame, pyarrow.table):
        classifier = XMCClassifier(**options).fit(make(features), make(columns))
        assert classifier.classes_.tolist() == label_names
        np.testing.assert_array_equal(classifier.predict(make(features), k=8).scores, expected.scores)
        others = {"ELSE": columns["FERN"], **dict(reversed(columns.items()))}
        assert classifier.score(make(features), make(others)) == classifier.score(counts(texts), names)
    reference = XMCClassifier(**SMALL | {"epochs": 1}).fit(texts, names).predict(texts)
    for make in (pandas.Series, polars.Series, pyarrow.array):
        classifier = XMCClassifier(**SMALL | {"epochs": 1}).fit(make(texts), make(names))
        np.testing.assert_array_equal(classifier.predict(make(texts)).labels, reference.labels)
