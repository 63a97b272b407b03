import numpy as np
import pytest
import scipy.sparse
from small_files import FEATURES, LABELS, csr

from sparse_xmc import data


class TestDataset:
    def test_sizes(self):
        dataset = data.Dataset(FEATURES, LABELS)
        assert (len(dataset), dataset.num_features, dataset.num_labels) == (2, 3, 2)

    @pytest.mark.parametrize(
        "rows", [np.array([1, 0, 1]), np.array([False, True]), slice(1, 2), np.array([], np.int64)], ids=str
    )
    @pytest.mark.parametrize(
        "features", [FEATURES, scipy.sparse.csr_array(FEATURES)], ids=["dense", "sparse"]
    )
    def test_take(self, features, rows):
        excluded = csr([[1, 0], [0, 1]], bool)
        taken = data.Dataset(features, LABELS, excluded).take(rows)
        np.testing.assert_array_equal(taken.excluded.toarray(), excluded.toarray()[rows])
        dense = taken.features if isinstance(features, np.ndarray) else taken.features.toarray()
        np.testing.assert_array_equal(dense, FEATURES[rows])
        np.testing.assert_array_equal(taken.labels.toarray(), LABELS.toarray()[rows])

    @pytest.mark.parametrize(
        ("features", "labels", "fault"),
        [
            (FEATURES[:1], LABELS, "features have 1 rows but labels 2"),
            (FEATURES.astype(float), LABELS, r"float32 \[N, D\], got float64 of shape \(2, 3\)"),
            (FEATURES[0], LABELS, r"float32 \[N, D\], got float32 of shape \(3,\)"),
            (FEATURES.tolist(), LABELS, "ndarray or a csr_array, got list"),
            (scipy.sparse.csc_array(FEATURES), LABELS, "ndarray or a csr_array, got csc_array"),
            (FEATURES, LABELS.toarray(), "labels must be a csr_array, got ndarray"),
            (FEATURES, LABELS.astype(np.float32), "bool or uint8 .*, got float32"),
            (FEATURES, scipy.sparse.csr_array(([True] * 2, [1, 0], [0, 2, 2])), "sorted indices"),
            (FEATURES, scipy.sparse.csr_array(([True] * 2, [1, 1], [0, 2, 2])), "without duplicates"),
            (FEATURES, scipy.sparse.csr_array(([False], [1], [0, 1, 1])), "must not store zeros"),
        ],
    )
    def test_invalid_arguments_raise(self, features, labels, fault):
        with pytest.raises(ValueError, match=fault):
            data.Dataset(features, labels)

    def test_excluded_of_other_shape_raises(self):
        with pytest.raises(ValueError, match=r"excluded must have the shape .* \(2, 2\), got \(2, 1\)"):
            data.Dataset(FEATURES, LABELS, csr([[1], [0]], bool))
