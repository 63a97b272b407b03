import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_xmc.connectivity import draw_connections, redraw


def count_rows_with_repeats(indices):
    """Return the number of rows that list an input twice."""
    return sum(len(set(row)) < len(row) for row in np.asarray(indices).tolist())


def assert_uniform(counts):
    """Assert that chi-square is within 6 standard deviations of its mean (false alarms: about 1e-7)."""
    expected = counts.sum() / counts.size
    chi_square = np.sum((counts - expected) ** 2) / expected
    degrees = counts.size - 1
    assert chi_square < degrees + 6 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("fan_in", [1, 7, 16])
@pytest.mark.parametrize("labels", [0, 1, 50, 4097])
def test_inputs_of_each_label_are_distinct_and_in_range(labels, fan_in):
    indices = draw_connections(jax.random.key(0), labels, fan_in, 16)
    assert indices.shape == (labels, fan_in)
    assert count_rows_with_repeats(indices) == 0
    assert np.all(np.asarray(indices) < 16)  # unsigned, so not negative either


def test_full_fan_in_draws_permutations():
    indices = draw_connections(jax.random.key(1), 100, 12, 12)
    np.testing.assert_array_equal(np.sort(indices, axis=1), np.tile(np.arange(12), (100, 1)))


def test_draws_are_uniform_over_inputs_and_pairs():
    # With 4 distinct of 6 inputs, parts of most rows are drawn again.
    indices = np.asarray(draw_connections(jax.random.key(2), 30_000, 4, 6))
    for column in indices.T:
        assert_uniform(np.bincount(column, minlength=6))
    pairs = np.bincount(indices[:, 0] * 6 + indices[:, 3], minlength=36).reshape(6, 6)
    assert not pairs.diagonal().any()
    assert_uniform(pairs[~np.eye(6, dtype=bool)])


def test_blocks_of_labels_differ():
    # Rows are drawn in blocks, each with its own key.
    indices = np.asarray(draw_connections(jax.random.key(0), 3 << 14, 8, 1000))
    first, second, third = indices.reshape(3, 1 << 14, 8)
    assert np.mean(first == second) < 0.01
    assert np.mean(second == third) < 0.01


@pytest.mark.parametrize(("in_features", "dtype"), [(65_536, jnp.uint16), (65_537, jnp.int32)])
def test_dtype_is_narrowest_and_all_inputs_are_drawn(in_features, dtype):
    indices = draw_connections(jax.random.key(0), 4096, 400, in_features)
    assert indices.dtype == dtype
    assert indices.max() == in_features - 1
    assert indices.min() == 0


def test_same_key_draws_same_connections():
    first, again, other = (draw_connections(jax.random.key(seed), 20, 5, 30) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize("dtype", [jnp.uint16, jnp.int32])
def test_redraw_changes_only_masked_connections(dtype):
    rng = np.random.default_rng(0)
    indices = draw_connections(jax.random.key(0), 2000, 6, 9).astype(dtype)
    mask = rng.random(indices.shape) < 0.4
    new = redraw(jax.random.key(1), indices, jnp.asarray(mask), 9)
    assert new.dtype == dtype
    np.testing.assert_array_equal(np.asarray(new)[~mask], np.asarray(indices)[~mask])
    assert count_rows_with_repeats(new) == 0  # new inputs differ from kept ones on both sides
    # Most masked connections change, but an input that one of them had may be drawn again.
    assert np.mean(np.asarray(new)[mask] != np.asarray(indices)[mask]) > 0.3


@pytest.mark.parametrize("position", [0, 2, 4])
def test_redraw_is_uniform_over_free_inputs(position):
    # Each row has inputs 5 to 9, and the one at `position` may be drawn again.
    indices = jnp.tile(jnp.arange(5, 10)[None], (20_000, 1))
    mask = jnp.zeros(indices.shape, bool).at[:, position].set(True)
    new = np.asarray(redraw(jax.random.key(0), indices, mask, 10))[:, position]
    free = [0, 1, 2, 3, 4, 5 + position]
    counts = np.bincount(new, minlength=10)
    assert counts[free].sum() == 20_000
    assert_uniform(counts[free])


def test_redraw_with_empty_mask_changes_nothing():
    indices = jnp.asarray([[3, 3, 1], [0, 2, 0]])  # repeats are kept
    new = redraw(jax.random.key(0), indices, jnp.zeros(indices.shape, bool), 4)
    np.testing.assert_array_equal(new, indices)


def test_redraw_without_distinct_allows_repeats():
    indices, mask = jnp.zeros((10_000, 2), jnp.uint16), jnp.ones((10_000, 2), bool)
    new = redraw(jax.random.key(0), indices, mask, 4, distinct=False)
    # Two draws from 4 inputs agree in a quarter of the rows, with a standard deviation of 0.004.
    assert abs(count_rows_with_repeats(new) / 10_000 - 0.25) < 0.025
    assert_uniform(np.bincount(np.asarray(new).ravel(), minlength=4))
    kept = redraw(jax.random.key(0), indices, ~mask, 4, distinct=False)
    np.testing.assert_array_equal(kept, indices)


def test_draw_without_distinct_allows_repeats():
    indices = draw_connections(jax.random.key(0), 1000, 8, 16, distinct=False)
    assert 800 < count_rows_with_repeats(indices) < 950  # 1 - 16!/8!/16^8 = 0.88 of the rows
    assert np.all(np.asarray(indices) < 16)


def test_number_of_cached_programs_is_limited():
    def programs():
        gc.collect()
        executables = jax.devices()[0].client.live_executables()
        return sum(executable.hlo_modules()[0].name == "jit_draw_connections" for executable in executables)

    before = programs()
    for labels in range(40, 52):
        draw_connections(jax.random.key(0), labels, 3, 9)
    assert programs() <= max(before, 8)
