"""`sparse_xmc.defaults`: what follows from the length of texts; `test_estimator.py` has the rest."""

import numpy as np
import pytest
import scipy.sparse

from sparse_xmc.data import Dataset
from sparse_xmc.defaults import dropout_for, ngrams_for


@pytest.mark.parametrize(("words", "ngrams"), [((250, 250), 2), ((100, 402), 1), ((1, 600), 1), ((), 2)])
def test_pairs_of_words_are_for_texts_that_are_short_on_average(words, ngrams):
    assert ngrams_for([" ".join(["word"] * n) for n in words]) == ngrams


@pytest.mark.parametrize(("entries", "ngrams", "dropout"), [(150, 1, 0.5), (151, 1, 0.2), (151, 2, 0.5)])
def test_long_bags_have_less_dropout(entries, ngrams, dropout):
    features = scipy.sparse.csr_array(np.arange(400)[None] < np.array([[entries - 10], [entries + 10]]))
    labels = scipy.sparse.csr_array(np.ones((2, 1), bool))
    assert dropout_for(Dataset(features.astype(np.float32), labels), ngrams) == dropout


def test_dense_features_have_little_dropout():
    labels = scipy.sparse.csr_array(np.ones((2, 1), bool))
    assert dropout_for(Dataset(np.ones((2, 1000), np.float32), labels)) == 0.1
