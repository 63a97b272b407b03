"""Tests of the validation of points and labels that callers pass."""

import decimal

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from sparse_xmc.data.validation import LabelMatrix, read_labels, read_points, to_binary, to_canonical
from sparse_xmc.metrics import LabelStatistics

VALUES = np.array([[0, 2, 3], [4, 0, 0], [0, 0, 0], [1, 5, 0]])
FORMATS = ["bsr", "coo", "csc", "csr", "dia", "dok", "lil"]


def reversed_csr(values=VALUES):
    """Return a CSR matrix with descending indices in each row."""
    return scipy.sparse.csr_matrix(values[:, ::-1])[:, ::-1]


def with_duplicates():
    """Return a CSR matrix with duplicate entries: 1 + 2 and 3 - 3."""
    data, indices = np.array([3, 1, 2, -3]), np.array([1, 0, 0, 1])
    return scipy.sparse.csr_array((data, indices, np.array([0, 4])), shape=(1, 3))


def read_only(matrix):
    """Make the arrays of a sparse matrix read-only; return it."""
    for name in ("data", "indices", "indptr"):
        getattr(matrix, name).flags.writeable = False
    return matrix


@pytest.mark.parametrize("convert", [to_canonical, to_binary, read_points, read_labels])
@pytest.mark.parametrize("make", [reversed_csr, with_duplicates])
def test_matrices_are_not_modified(convert, make):
    matrix = make()
    before = {name: getattr(matrix, name).copy() for name in ("data", "indices", "indptr")}
    for given in (matrix, read_only(make())):
        result = convert(given)
        result = result.values if isinstance(result, LabelMatrix) else result
        expected = make().toarray() != 0 if result.dtype == bool else make().toarray()
        assert result.has_canonical_format
        np.testing.assert_array_equal(result.toarray(), expected)
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(matrix, name), array)


def test_canonical_matrices_are_not_copied():
    matrix = scipy.sparse.csr_array(VALUES.astype(np.float32))
    features, labels = read_points(matrix), read_labels(matrix)
    assert np.shares_memory(features.data, matrix.data)
    assert np.shares_memory(features.indices, matrix.indices)
    assert np.shares_memory(labels.values.indices, matrix.indices)
    dense = VALUES.astype(np.float32)
    assert read_points(dense) is dense


def test_label_statistics_do_not_modify_labels():
    labels = read_only(reversed_csr())
    statistics = LabelStatistics.of(labels)
    np.testing.assert_array_equal(
        statistics.groups, LabelStatistics.of(scipy.sparse.csr_array(VALUES)).groups
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_all_sparse_formats_are_read(kind):
    matrix = scipy.sparse.csr_array(VALUES).asformat(kind)
    np.testing.assert_array_equal(read_points(matrix).toarray(), VALUES)
    np.testing.assert_array_equal(read_labels(matrix).values.toarray(), VALUES != 0)


@pytest.mark.parametrize(
    "X",
    [
        jnp.asarray(VALUES, jnp.bfloat16),
        jnp.asarray(VALUES, jnp.float32),
        VALUES.astype(np.float64),
        VALUES.astype(object),
        np.asmatrix(VALUES),
        VALUES.tolist(),
        [*VALUES],
        iter(VALUES),
    ],
)
def test_numeric_matrices_become_float32(X):
    features = read_points(X)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, VALUES)


@pytest.mark.parametrize(
    "X",
    [
        ("a", "b"),
        np.array(["a", "b"]),
        np.array(["a", "b"], object),
        np.array(["a", "b"], np.dtypes.StringDType()),
        (text for text in "ab"),
        {"a": 1, "b": 2}.keys(),
    ],
)
def test_texts_become_list_of_str(X):
    assert read_points(X) == ["a", "b"]


@pytest.mark.parametrize(
    "y",
    [
        [("a",), ["b", "c"]],
        [{"a"}, np.array(["b", "c"])],
        map(iter, [["a"], ["b", "c"]]),
        np.array([["a"], ["b", "c"]], object),
    ],
)
def test_label_names_become_lists(y):
    assert read_labels(y) == [["a"], ["b", "c"]]


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (None, TypeError, r"X must be a sequence of texts or a matrix of numbers \[N, D\], got None"),
        (3, TypeError, "got 3"),
        (np.array(3), TypeError, "got array"),
        (b"text", TypeError, "got a single bytes"),
        ({"a": 1}, TypeError, "got a dict"),
        ({"a"}, TypeError, "got a set"),
        (VALUES + 1j, TypeError, "got values of dtype complex128"),
        (scipy.sparse.csr_array(VALUES + 1j), TypeError, "got values of dtype complex128"),
        (np.ma.masked_equal(VALUES, 0), ValueError, "got an array with masked values"),
        ([[1, 2], [3]], TypeError, r"point 0 is \[1, 2\], a list"),
        (["a", None], TypeError, "point 1 is None, a NoneType"),
        (["a", float("nan")], TypeError, "point 1 is nan, a float"),
        ([b"a"], TypeError, "point 0 is b'a', a bytes"),
        ([1, 2], ValueError, r"X must have shape \[N, D\], got \[2\]"),
        (np.array([[0], [np.nan]]), ValueError, "X must be finite, got NaN or infinity in point 1"),
        (np.array([[0], [1e300]]), ValueError, "X must be finite, got NaN or infinity in point 1"),
        (scipy.sparse.csr_array([[0], [1e300]]), ValueError, "X must be finite, .* in point 1"),
    ],
)
def test_invalid_points_raise(X, error, message):
    with pytest.raises(error, match=message):
        read_points(X)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (None, TypeError, r"y must be a sequence of names \(str\) for each point, or .*, got None"),
        ("ab", TypeError, "got a single str"),
        ([["a"], None], TypeError, "got None for point 1"),
        ([["a"], float("nan")], TypeError, "got nan for point 1"),
        ([["a"], 3], TypeError, "got 3 for point 1"),
        ([["a"], "b"], TypeError, "got 'b' for point 1"),
        ([["a"], ["b", None]], TypeError, r"got \['b', None\] for point 1"),
        ([["a"], iter([1])], TypeError, r"got \[1\] for point 1"),
        ([["a"], ["\ud800"]], ValueError, r"in UTF-8, got '\\ud800' for point 1"),
        (scipy.sparse.csr_array([[0], [np.nan]]), ValueError, "y must be finite, .* in point 1"),
    ],
)
def test_invalid_labels_raise(y, error, message):
    with pytest.raises(error, match=message):
        read_labels(y)


def test_pandas_data_frames():
    pandas = pytest.importorskip("pandas")
    mixed = pandas.DataFrame({"a": [1, 0], "b": [False, True], "c": [0.5, 0]})
    np.testing.assert_array_equal(read_points(mixed), [[1, 0, 0.5], [0, 1, 0]])
    labels = read_labels(mixed)
    assert labels.names == ["a", "b", "c"]
    np.testing.assert_array_equal(labels.values.toarray(), [[True, False, True], [False, True, False]])
    assert read_labels(pandas.DataFrame(VALUES)).names is None
    sparse = pandas.DataFrame.sparse.from_spmatrix(scipy.sparse.csr_array(VALUES), columns=[*"abc"])
    assert scipy.sparse.issparse(read_points(sparse))
    assert read_labels(sparse).names == ["a", "b", "c"]
    for read, frame, error, message in (
        (
            read_points,
            pandas.DataFrame({"text": ["x"], "n": [1]}),
            TypeError,
            "frame with 'x' in point 0; text",
        ),
        (read_labels, pandas.DataFrame({"a": [1, None]}), ValueError, "y must be finite, .* in point 1"),
        (read_labels, pandas.DataFrame({"a": [1, decimal.Decimal(1)]}), TypeError, "Decimal.* in point 1"),
        (
            read_labels,
            pandas.DataFrame({1: [1], 2: [1]}),
            TypeError,
            "columns named by str, or 0..L-1, got a",
        ),
        (read_labels, pandas.DataFrame([[1, 1]], columns=["a", "a"]), ValueError, "distinct names"),
        (read_labels, pandas.Series(["a"]), TypeError, "got 'a' for point 0"),
        (read_points, pandas.Series(["a", None]), TypeError, "point 1 is "),
    ):
        with pytest.raises(error, match=message):
            read(frame)
