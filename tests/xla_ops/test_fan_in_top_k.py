"""Tests of `fan_in_top_k` against a stable sort; most logits are exact in float32, and so are their ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_problems import OPTIONS, assert_top_k, brute_force_top_k, make_problem, run_top_k

from xla_ops import fan_in_matmul, fan_in_top_k, fan_in_top_k_reference

# Sizes around those of the kernels: tiles of 64 points, lanes of 16, blocks of 128 labels.
SIZES = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 130]),
        "in_features": st.integers(1, 50),
        "labels": st.sampled_from([1, 127, 128, 129, 300]),
        "fan_in": st.sampled_from([1, 3, 16, 17]),
    }
)


@settings(max_examples=80)
@given(SIZES, OPTIONS, st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_matches_brute_force(instruction_set, sizes, options, fraction):
    problem = make_problem(**sizes, **options, integer_values=True)
    k = round(fraction * sizes["labels"])
    assert_top_k(run_top_k(*problem[:4], k), brute_force_top_k(problem, k))


@pytest.mark.parametrize("batch", [70, 200])
def test_several_chunks_of_labels(batch):
    # A thread has so many connections that it processes its labels in several chunks.
    problem = make_problem(batch, 30, 1500, 512, integer_values=True)
    assert_top_k(run_top_k(*problem[:4], 20), brute_force_top_k(problem, 20))


@pytest.mark.usefixtures("x64")
def test_reference_matches_brute_force():
    problem = make_problem(20, 30, 150, 5, integer_values=True)
    assert_top_k(fan_in_top_k_reference(*problem[:4], 60), brute_force_top_k(problem, 60))


def test_random_scores_match_sorted_logits(instruction_set):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(70, 40)).astype(np.float32), rng.normal(size=(1000, 8)).astype(np.float32)
    indices = rng.integers(0, 40, (1000, 8)).astype(np.uint16)
    scores, labels = run_top_k(x, kernel, indices, None, 10)
    logits = np.asarray(fan_in_matmul(x, kernel, indices))
    np.testing.assert_allclose(scores, -np.sort(-logits, axis=1)[:, :10], rtol=1e-5)
    np.testing.assert_allclose(scores, np.take_along_axis(logits, np.asarray(labels), axis=1), rtol=1e-5)
    assert all(len(set(row)) == 10 for row in np.asarray(labels).tolist())


@pytest.mark.parametrize("k", [1, 5, 300])
def test_ties_are_in_order_of_labels(instruction_set, k):
    # All labels have score 0, except 250 and 270, which have score 1.
    bias = np.zeros(300, np.float32)
    bias[[250, 270]] = 1
    x, kernel, indices = (
        np.ones((17, 2), np.float32),
        np.zeros((300, 1), np.float32),
        np.zeros((300, 1), np.int32),
    )
    expected = [250, 270, *(label for label in range(300) if label not in (250, 270))][:k]
    _, labels = run_top_k(x, kernel, indices, bias, k)
    np.testing.assert_array_equal(labels, np.tile(expected, (17, 1)))


def test_nan_and_minus_infinity_are_excluded(instruction_set):
    bias = np.full(200, -np.inf, np.float32)
    bias[50:100] = np.nan
    bias[[7, 60, 150]] = [-3e38, 2, np.inf]
    x, kernel, indices = (
        np.ones((2, 2), np.float32),
        np.zeros((200, 1), np.float32),
        np.zeros((200, 1), np.int32),
    )
    scores, labels = run_top_k(x, kernel, indices, bias, 5)
    np.testing.assert_array_equal(labels, [[150, 60, 7, -1, -1]] * 2)
    np.testing.assert_array_equal(scores, np.float32([[np.inf, 2, -3e38, -np.inf, -np.inf]] * 2))


def test_nan_does_not_affect_other_points():
    problem = make_problem(20, 30, 150, 5, integer_values=True)
    problem.indices[:] %= 30  # so that all indices are in range
    scores, labels = brute_force_top_k(problem, 4)
    scores[11], labels[11] = -np.inf, -1
    problem.x[11] = np.nan
    assert_top_k(run_top_k(*problem[:4], 4), (scores, labels))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("k", [0, 4])
def test_leading_dimensions(lead, k):
    problem = make_problem(int(np.prod(lead)), 9, 6, 4, integer_values=True)
    scores, labels = fan_in_top_k(problem.x.reshape(*lead, 9), *problem[1:4], k)
    assert scores.shape == labels.shape == (*lead, k)
    shape = (len(problem.x), k)
    assert_top_k((scores.reshape(shape), labels.reshape(shape)), brute_force_top_k(problem, k))


@pytest.mark.parametrize("labels", [1, 130])
def test_more_threads_than_blocks_of_labels(labels):
    problem = make_problem(1, 30, labels, 5, integer_values=True)
    assert_top_k(run_top_k(*problem[:4], labels), brute_force_top_k(problem, labels))


def test_logits_are_not_stored():
    labels = 3_000_000  # the workspace of CUDA has 50 MB for any number of labels
    shapes = [((64, 50), jnp.float32), ((labels, 1), jnp.float32), ((labels, 1), jnp.uint16)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

    def temporary_bytes(top_k):
        compiled = jax.jit(lambda *a: top_k(*a, None, 5)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(fan_in_top_k) < 64 * labels * 4 / 10
    if jax.default_backend() == "cpu":  # shows that logits would be measured
        assert temporary_bytes(fan_in_top_k_reference) >= 64 * labels * 4


def test_batch_sharded_by_shard_map():
    mesh = jax.make_mesh((len(jax.devices()),), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    batch_spec, replicated = jax.P("i"), jax.P()
    problem = make_problem(8, 12, 10, 4, integer_values=True)
    sharded = jax.shard_map(
        lambda *a: fan_in_top_k(*a, 6),
        mesh=mesh,
        in_specs=(batch_spec, replicated, replicated, replicated),
        out_specs=batch_spec,
    )
    assert_top_k(jax.jit(sharded)(*problem[:4]), brute_force_top_k(problem, 6))
