"""XMCClassifier as scikit-learn's users meet it."""

import collections
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from sparse_xmc import XMCClassifier

WORDS = ["apple", "brook", "cloud", "dune", "ember", "fern", "grove", "heath"]
DENSE = {"penultimate": 32, "fan_in": 8, "epochs": 80, "batch_size": 8}
SMALL = DENSE | {"embedding": 16}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def make_points(size=60, seed=0):
    """Texts of some words and filler, labelled with the words in capitals."""
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
def test_texts_and_names(fitted):
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


def test_labels_that_fit_has_not_seen_are_wrong(fitted):
    texts, labels = make_points(20, seed=1)
    assert fitted.score(texts, [["ELSE"]] * 20) == 0
    assert fitted.score(texts, [[*names, "ELSE"] for names in labels]) == fitted.score(texts, labels)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("features", ["dense", "csr_array", "csr_matrix", "coo"])
@pytest.mark.parametrize("labels", ["dense", "csr_matrix", "names"])
def test_matrices(features, labels):
    def convert(kind, matrix):
        of = {"csr_array": scipy.sparse.csr_array, "csr_matrix": scipy.sparse.csr_matrix}
        return matrix if kind == "dense" else of.get(kind, scipy.sparse.coo_array)(matrix)

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
def test_the_scale_of_features_does_not_matter(convert, penultimate):
    texts, names = make_points()
    scores = []
    for scale in (2**-10, 1, 2**10):  # powers of two round alike
        X = convert(scale * counts(texts))
        classifier = XMCClassifier(**DENSE | {"penultimate": penultimate, "epochs": 5}).fit(X, names)
        scores.append(classifier.predict(X, k=8).scores)
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[2], scores[1])


def test_conventions_of_scikit_learn():
    classifier = XMCClassifier(fan_in=16, seed=3)
    assert clone(classifier).get_params() == classifier.get_params()
    assert classifier.set_params(fan_in=8) is classifier
    assert classifier.fan_in == 8
    assert repr(classifier) == "XMCClassifier(fan_in=8, seed=3)"
    assert not [name for name in vars(classifier) if name.endswith("_")]
    with pytest.raises(ValueError, match="Invalid parameter 'fanin'"):
        classifier.set_params(fanin=3)


@pytest.mark.bit_for_bit
def test_the_same_seed_gives_the_same_classifier():
    texts, labels = make_points()
    options = SMALL | {"epochs": 3}
    first, second = (XMCClassifier(**options).fit(texts, labels).predict(texts, k=8) for _ in range(2))
    np.testing.assert_array_equal(first.scores, second.scores)
    other = XMCClassifier(**options, seed=1).fit(texts, labels).predict(texts, k=8)
    assert np.any(first.scores != other.scores)


@pytest.mark.usefixtures("x64")
def test_saved_classifiers_come_back(fitted, tmp_path):
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


def test_progress_is_shown_when_asked_for(capsys):
    texts, labels = make_points()
    XMCClassifier(**SMALL | {"epochs": 1}).fit(texts, labels)
    assert capsys.readouterr().out == ""
    XMCClassifier(**SMALL | {"epochs": 1}, verbose=True).fit(texts, labels)
    assert capsys.readouterr().out.startswith("epoch   1  loss ")


TEXTS, LABELS = make_points(6)


@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        ("one text", LABELS, TypeError, "X must be a sequence of texts, got a single str"),
        ([*TEXTS[:5], 3], LABELS, TypeError, "point 5 is 3, a int"),
        (TEXTS, LABELS[1:], ValueError, "features have 6 rows but labels 5"),
        (TEXTS, "ABCDEF", TypeError, "sequence of names .* for each point, got 'A' for point 0"),
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
def test_what_cannot_be_fitted(X, y, error, message):
    with pytest.raises(error, match=message):
        XMCClassifier(**DENSE, min_df=1).fit(X, y)


def test_settings_are_checked():
    for options, message in (
        ({"fan_in": 0}, "fan_in must be at least 1, got 0"),
        ({"fan_in": 33}, "fan_in must be at most the number of units, 32, got 33"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            XMCClassifier(**SMALL | options, min_df=1).fit(TEXTS, LABELS)


def test_what_is_chosen_fits_the_data():
    X = np.eye(4, dtype=np.float32)
    classifier = XMCClassifier(penultimate=0, epochs=1).fit(X, [["a"], ["b"], ["a"], ["c"]])
    assert classifier.saved_.config.head.fan_in == 4
    with pytest.raises(ValueError, match="embedding=8 is for texts and sparse features, but X is dense"):
        XMCClassifier(embedding=8).fit(X, [["a"], ["b"], ["a"], ["c"]])
    assert XMCClassifier(fan_in=np.int64(2), epochs=1).fit(X, [["a"]] * 4).saved_.config.head.fan_in == 2


class Frame(list):
    columns = ("text",)


def test_what_cannot_be_predicted(fitted):
    with pytest.raises(TypeError, match="got a data frame: give one column"):
        fitted.predict(Frame(TEXTS))
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
