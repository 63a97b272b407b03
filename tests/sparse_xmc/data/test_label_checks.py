import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

import sparse_xmc
from sparse_xmc import XMCClassifier
from sparse_xmc.data import LabelEncoder, read_tsv
from sparse_xmc.data.label_checks import warn_of_unusual_labels

ROOT = Path(sparse_xmc.__file__).parents[1]


def points(size=200, most=3):
    """Return 1 to `most` of eight label names for each point, and a distinct text for each point."""
    rng = np.random.default_rng(0)
    chosen = [sorted(rng.choice(8, rng.integers(1, most + 1), replace=False)) for _ in range(size)]
    names = [[f"label {i}" for i in row] for row in chosen]
    return names, [f"point {i} has {' and '.join(row)}" for i, row in enumerate(names)]


def check(names):
    encoder = LabelEncoder.fit(names)
    warn_of_unusual_labels(encoder(names), encoder.names)


NAMES, TEXTS = points()


def test_swapped_columns_warn():
    with pytest.warns(UserWarning, match="nearly every point") as warned:
        check([[text] for text in TEXTS])
    start = "nearly every point has a label of its own: 200 labels for 200 points with one label each"
    end = "': are labels and texts swapped, or is the separator of labels a wrong one?"
    assert str(warned[0].message).startswith(f"{start}, such as 'point 0 has label ")
    assert str(warned[0].message).endswith(end)
    with pytest.warns(UserWarning, match="200 labels for 200 points with one label each: are labels and"):
        warn_of_unusual_labels(scipy.sparse.csr_array(np.eye(200, dtype=bool)))


@pytest.mark.parametrize("separator", [";", ",", ", "])
def test_wrong_separator_warns(separator):
    joined = [[separator.join(row)] for row in NAMES]
    distinct = {row[0] for row in joined}
    containing = sum(separator in name for name in distinct)
    with pytest.warns(UserWarning, match="200 points have one label each, and ") as warned:
        check(joined)
    expected = (
        f"{containing} of {len(distinct)} label names contain {separator[0]!r}, such as 'label 0{separator}"
    )
    assert expected in str(warned[0].message)


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        [row[:1] for row in NAMES],
        [[f"label {i}", "all"] for i in range(200)],  # a second label shows that the separator is right
        [[f"label {i}"] for i in range(99)],  # too few points
        [[f"label {i}"] for i in range(99)] + [[]] * 101,
        [[f"label {i // 2}"] for i in range(200)],
        [["a, b" if i % 8 == 3 else f"label {i % 8}"] for i in range(200)],  # few names have a comma
    ],
)
def test_plausible_labels_do_not_warn(names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(names)


@pytest.mark.parametrize("part", ["train", "test"])
def test_shipped_data_set_warns_only_if_read_wrongly(part):
    names, texts = read_tsv(ROOT / "sparse_xmc" / "cli" / "data" / "wordnet" / f"{part}.tsv.xz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (100, 1000, len(names)):
            check(names[:size])
    for wrong in ([[";".join(row)] for row in names], [[text] for text in texts]):
        with pytest.warns(UserWarning, match="one label each"):
            check(wrong)


@pytest.mark.usefixtures("standard_promotion")
def test_fit_warning_names_line_of_caller():
    sizes = {"penultimate": 8, "fan_in": 4, "embedding": 4, "epochs": 1, "batch_size": 64}
    classifier = XMCClassifier(**sizes)
    with pytest.warns(UserWarning, match=r"label names contain ';', such as 'label 0;") as warned:
        classifier.fit(TEXTS, [[";".join(row)] for row in NAMES])
    assert Path(warned[0].filename) == Path(__file__)
