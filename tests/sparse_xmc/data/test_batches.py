import jax
import numpy as np
import pytest
import scipy.sparse

from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import Batches, padded_inputs


def make_dataset(size, *, sparse=False, seed=0):
    """Return a data set with features (i, i + 0.5) of point i, or random bags, a tenth of them empty."""
    rng = np.random.default_rng(seed)
    labels = rng.random((size, 9)) < 0.2
    if sparse:
        dense = np.where(rng.random((size, 40)) < 0.2, rng.random((size, 40)), 0).astype(np.float32)
        dense[::10] = 0
        features = scipy.sparse.csr_array(dense)
    else:
        features = (np.arange(size)[:, None] + [0, 0.5]).astype(np.float32)
    return Dataset(features, scipy.sparse.csr_array(labels))


def point_numbers(batch):
    """Return the numbers of a batch's points, read from its dense features."""
    return batch.inputs[:, 0].astype(int).tolist()


def to_dense(bags, num_words):
    dense = np.zeros((bags.num_examples + 1, num_words), np.float32)
    np.add.at(dense, (bags.rows, bags.words), bags.weights)
    assert not dense[-1].any()  # padding has weight 0
    return dense[:-1]


def assert_positives_match(positives, labels):
    for row, expected in zip(positives, labels.toarray(), strict=True):
        count = expected.sum()
        assert set(row[:count]) == set(np.flatnonzero(expected))
        assert np.all(row[count:] == -1)


@pytest.mark.parametrize(
    ("size", "batch_size", "steps"), [(23, 5, 4), (20, 5, 4), (5, 5, 1), (3, 5, 1), (1, 5, 1)]
)
def test_shuffled_epoch_has_distinct_points_in_full_batches(size, batch_size, steps):
    batches = Batches(make_dataset(size), batch_size)
    epoch = [point_numbers(batch) for batch in batches.shuffled(0, 0)]
    assert [len(points) for points in epoch] == [min(size, batch_size)] * steps
    assert batches.steps_per_epoch == steps
    points = [point for batch in epoch for point in batch]
    assert len(set(points)) == len(points)
    assert set(points) <= set(range(size))


def test_shuffled_order_depends_only_on_seed_and_epoch():
    def order(seed, epoch):
        return [point_numbers(batch) for batch in Batches(make_dataset(60), 8).shuffled(seed, epoch)]

    assert order(1, 2) == order(1, 2)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_dropped_points_differ_between_epochs():
    batches = Batches(make_dataset(13), 5)
    seen = {
        point for epoch in range(20) for batch in batches.shuffled(0, epoch) for point in point_numbers(batch)
    }
    assert seen == set(range(13))


@pytest.mark.parametrize("sparse", [False, True])
def test_in_order_yields_all_points(sparse):
    dataset = make_dataset(23, sparse=sparse)
    starts = []
    for points, batch in Batches(dataset, 5).in_order():
        starts.append((points.start, points.stop))
        expected = dataset.features[points]
        if sparse:
            np.testing.assert_array_equal(to_dense(batch.inputs, 40), expected.toarray())
        else:
            np.testing.assert_array_equal(batch.inputs, expected)
        assert_positives_match(batch.positives, dataset.labels[points])
    assert starts == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]


@pytest.mark.parametrize("sparse", [False, True])
def test_padded_inputs_have_few_shapes(sparse):
    shapes = set()
    for size in range(1, 40):
        dataset, stops = make_dataset(size, sparse=sparse), []
        for points, batch in padded_inputs(dataset, 16):
            count = points.stop - points.start
            inputs = to_dense(batch, 40) if sparse else batch
            expected = dataset.features[points].toarray() if sparse else dataset.features[points]
            np.testing.assert_array_equal(inputs[:count], expected)
            np.testing.assert_array_equal(inputs[count:], np.repeat(expected[-1:], len(inputs) - count, 0))
            stops.append(points.stop)
            shapes.add(tuple(array.shape for array in jax.tree.leaves(batch)) + inputs.shape)
        assert stops == [*range(16, size, 16), size]
    assert len(shapes) <= (10 if sparse else 5)
    assert {len(inputs) for _, inputs in padded_inputs(make_dataset(5), 16, multiple_of=3)} == {9}


@pytest.mark.parametrize("sparse", [False, True])
def test_batch_size_is_limited_by_data_set_size(sparse):
    dataset = make_dataset(23, sparse=sparse)
    batches = Batches(dataset, 10**9)
    assert (batches.batch_size, batches.steps_per_epoch) == (23, 1)
    (batch,) = batches.shuffled(0, 0)
    assert sum(array.size for array in jax.tree.leaves(batch.inputs)) < 4 * 23 * 40
    ((_, inputs),) = padded_inputs(dataset, 10**9)
    assert len(inputs) == 32


def test_shuffled_positives_match_their_points():
    dataset = make_dataset(60)
    for batch in Batches(dataset, 8).shuffled(0, 0):
        assert batch.positives.dtype == np.int32
        assert batch.positives.shape == (8, dataset.labels.sum(axis=1).max())
        assert_positives_match(batch.positives, dataset.labels[point_numbers(batch)])


def test_positives_of_points_without_labels_are_padding():
    dataset = Dataset(np.zeros((4, 2), np.float32), scipy.sparse.csr_array((4, 9), dtype=bool))
    (batch,) = Batches(dataset, 4).shuffled(0, 0)
    np.testing.assert_array_equal(batch.positives, np.full((4, 1), -1))


def test_bags_match_rows_of_feature_matrix():
    dataset = make_dataset(60, sparse=True)
    rows = {row.tobytes() for row in dataset.features.toarray()}
    found = [row for batch in Batches(dataset, 8).shuffled(3, 1) for row in to_dense(batch.inputs, 40)]
    assert len(found) == 56
    assert {row.tobytes() for row in found} <= rows
    assert len({row.tobytes() for row in found}) > 40  # not a few repeated or empty rows
    for batch in Batches(dataset, 8).shuffled(3, 1):
        bags = batch.inputs
        assert (bags.rows.dtype, bags.words.dtype, bags.weights.dtype) == (np.int32, np.int32, np.float32)
        assert np.all(np.diff(bags.rows) >= 0)
        assert bags.num_examples == 8


def test_bags_have_same_shape_in_all_batches():
    # Points have 0 to 15 words, so the totals of batches of 64 differ by a few percent.
    shapes = [
        batch.inputs.rows.shape for batch in Batches(make_dataset(3000, sparse=True), 64).shuffled(0, 0)
    ]
    assert len(shapes) == 46
    assert len(set(shapes)) == 1


def test_long_bag_gets_larger_shape():
    dense = np.zeros((40, 500), np.float32)
    dense[:, 0] = 1
    dense[17] = np.arange(500)
    dataset = Dataset(scipy.sparse.csr_array(dense), make_dataset(40).labels)
    batches = list(Batches(dataset, 4).in_order())
    for points, batch in batches:
        np.testing.assert_array_equal(to_dense(batch.inputs, 500), dense[points])
    assert len({batch.inputs.rows.shape for _, batch in batches}) == 2


def test_bags_without_words_are_padded():
    dataset = Dataset(scipy.sparse.csr_array((6, 40), dtype=np.float32), make_dataset(6).labels)
    (batch,) = Batches(dataset, 6).shuffled(0, 0)
    assert len(batch.inputs.rows) > 0  # padding, so that jit sees one shape
    np.testing.assert_array_equal(to_dense(batch.inputs, 40), np.zeros((6, 40)))


def test_batch_size_below_one_raises():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Batches(make_dataset(5), 0)
