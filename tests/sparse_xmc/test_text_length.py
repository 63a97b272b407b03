"""Tests of `sparse_xmc.defaults` that depend on text length. `test_estimator.py` has the other ones."""

import numpy as np
import pytest
import scipy.sparse

from sparse_xmc.data import Dataset
from sparse_xmc.defaults import dropout_for, ngrams_for


@pytest.mark.parametrize(("words", "ngrams"), [((250, 250), 2), ((100, 402), 1), ((1, 600), 1), ((), 2)])
def test_bigrams_are_used_for_short_texts(words, ngrams):
    assert ngrams_for([" ".join(["word"] * n) for n in words]) == ngrams


@pytest.mark.parametrize(("entries", "ngrams", "dropout"), [(150, 1, 0.5), (151, 1, 0.2), (151, 2, 0.5)])
def test_dropout_is_lower_for_long_bags(entries, ngrams, dropout):
    features = scipy.sparse.csr_array(np.arange(400)[None] < np.array([[entries - 10], [entries + 10]]))
    labels = scipy.sparse.csr_array(np.ones((2, 1), bool))
    assert dropout_for(Dataset(features.astype(np.float32), labels), ngrams) == dropout


def test_dropout_is_low_for_dense_features():
    labels = scipy.sparse.csr_array(np.ones((2, 1), bool))
    assert dropout_for(Dataset(np.ones((2, 1000), np.float32), labels)) == 0.1
