"""Tests of the ops with sparse inputs against brute force on one dense array of all inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from op_problems import (
    DTYPE,
    LOSS,
    LOSSES,
    OPTIONS,
    assert_bitwise_equal,
    assert_loss,
    assert_matmul,
    assert_top_k,
    brute_force_loss,
    brute_force_matmul,
    brute_force_top_k,
    make_problem,
    run_loss,
    run_matmul,
    run_top_k,
    sparsify,
)

from xla_ops import (
    SparseInputs,
    adam_init,
    fan_in_adam_step,
    fan_in_loss,
    fan_in_loss_reference,
    fan_in_matmul,
    fan_in_matmul_reference,
    fan_in_sgd_step,
    fan_in_top_k,
    fan_in_top_k_reference,
)

SIZES = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130]),
        "labels": st.sampled_from([1, 127, 128, 129, 300]),
        "fan_in": st.sampled_from([1, 3, 16, 17, 65]),
    }
)
DENSE = st.sampled_from([0, 1, 16, 40])
COLUMNS = st.sampled_from([1, 31, 32, 33, 100, 1000])
DENSITY = st.sampled_from([0.0, 0.02, 0.3, 1.0])


# ---- against brute force ----


@settings(max_examples=25)
@given(SIZES, OPTIONS, DENSE, COLUMNS, DENSITY)
def test_matmul_matches_brute_force(instruction_set, sizes, options, dense, columns, density):
    problem = make_problem(in_features=dense + columns, **sizes, **options)
    full, problem, sparse = sparsify(problem, dense, density=density, seed=options["seed"])
    assert_matmul(run_matmul(problem, sparse), full, dense)


value_only = jax.jit(fan_in_loss, static_argnames="loss")


@settings(max_examples=25)
@given(SIZES, OPTIONS, DENSE, COLUMNS, DENSITY, st.sampled_from(LOSSES))
def test_loss_matches_brute_force(instruction_set, sizes, options, dense, columns, density, loss):
    problem = make_problem(in_features=dense + columns, **sizes, **options)
    full, problem, sparse = sparsify(problem, dense, density=density, seed=options["seed"])
    results = run_loss(problem, loss, sparse)
    assert_loss(results, full, loss, dense)
    np.testing.assert_allclose(value_only(*problem[:5], loss=loss, sparse=sparse), results[0], rtol=1e-6)


@settings(max_examples=15)
@given(SIZES, OPTIONS, DENSE, COLUMNS, DENSITY, st.sampled_from([0.0, 0.1, 1.0]))
def test_top_k_matches_brute_force(instruction_set, sizes, options, dense, columns, density, fraction):
    problem = make_problem(in_features=dense + columns, **sizes, **options, integer_values=True)
    full, problem, sparse = sparsify(problem, dense, density=density, seed=options["seed"])
    k = int(fraction * sizes["labels"])
    assert_top_k(run_top_k(*problem[:4], k, sparse=sparse), brute_force_top_k(full, k))


@DTYPE
def test_several_chunks_of_labels(instruction_set, dtype):
    # A thread has so many connections that it processes its labels in several chunks.
    sizes = {"batch": 70, "in_features": 60, "labels": 1000, "fan_in": 700}
    full, problem, sparse = sparsify(make_problem(**sizes, dtype=dtype), 20)
    assert_loss(run_loss(problem, "squared_hinge", sparse), full, "squared_hinge", 20)

    full, problem, sparse = sparsify(make_problem(**sizes, dtype=dtype, integer_values=True), 20)
    assert_top_k(run_top_k(*problem[:4], 9, sparse=sparse), brute_force_top_k(full, 9))


@pytest.mark.usefixtures("x64")
@DTYPE
@pytest.mark.parametrize("dense", [0, 9])
def test_references_match_brute_force(dtype, dense):
    full, problem, sparse = sparsify(make_problem(33, 60, 70, 9, dtype=dtype), dense)
    y = fan_in_matmul_reference(*problem[:4], sparse=sparse)
    assert_matmul([y, *run_matmul(full)[1:]], full)

    full, problem, sparse = sparsify(make_problem(33, 60, 70, 9, integer_values=True), dense)
    expected = brute_force_top_k(full, 7)
    assert_top_k(fan_in_top_k_reference(*problem[:4], 7, sparse=sparse), expected)

    full, problem, sparse = sparsify(make_problem(33, 60, 70, 9, dtype=dtype), dense)
    value = fan_in_loss_reference(*problem[:5], sparse=sparse)
    exact = brute_force_loss(full, "squared_hinge")[0][0]
    np.testing.assert_allclose(value, exact, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_densify_matches_dense_array():
    full, _, sparse = sparsify(make_problem(33, 60, 1, 1), 9, entries=1000)
    assert sparse.rows.size == 1000
    np.testing.assert_array_equal(sparse.densify(33), full.x[:, 9:])


@DTYPE
def test_repeated_entries_are_added(instruction_set, dtype):
    entries = [(0, 2, 1.5), (1, 2, 4.0), (0, 2, -0.5), (0, 0, 8.0), (0, 2, 2.0), (1, 2, -4.0)]
    rows, columns, values = (np.array(a) for a in zip(*entries, strict=True))
    sparse = SparseInputs(rows.astype(np.int32), columns.astype(np.int32), values.astype(dtype), 3)
    kernel, indices = np.ones((3, 1), dtype), np.array([[1], [2], [3]], np.int32)
    y = fan_in_matmul(np.zeros((2, 1), dtype), kernel, indices, sparse=sparse)
    np.testing.assert_array_equal(y.astype(jnp.float32), [[8, 0, 3], [0, 0, 0]])


@DTYPE
def test_absent_inputs_are_not_read(instruction_set, dtype):
    # Their weights are NaN, so that the results would be NaN if they were multiplied, even by 0.
    full, problem, sparse = sparsify(make_problem(70, 140, 300, 17, dtype=dtype), 40, density=0.02)
    absent = np.append(~np.any(full.x, axis=0), True)
    absent[:40] = False
    inside = (problem.indices >= 0) & (problem.indices < 140)
    hidden = absent[np.where(inside, problem.indices, 140)] & inside
    assert 0 < np.mean(hidden) < 1
    problem = problem._replace(kernel=np.where(hidden, np.nan, problem.kernel).astype(dtype))
    results = run_matmul(problem, sparse)
    assert_matmul(results, full._replace(kernel=np.where(hidden, 0, full.kernel).astype(dtype)), 40)
    assert not np.any(np.asarray(results[2])[hidden])


@pytest.mark.parametrize("count", [0, 1], ids=["none", "padding"])
def test_no_entries(instruction_set, count):
    problem = make_problem(5, 60, 70, 9)
    padding = np.full(count, -1, np.int32)
    sparse = SparseInputs(padding, padding, np.full(count, np.nan, np.float32), 51)
    full = problem._replace(x=np.where(np.arange(60) < 9, problem.x, 0))
    assert_matmul(run_matmul(problem._replace(x=problem.x[:, :9]), sparse), full, 9)


def test_no_columns():
    problem = make_problem(5, 60, 70, 9)
    padding = SparseInputs(np.zeros(3, np.int32), np.zeros(3, np.int32), np.full(3, np.nan, np.float32), 0)
    assert_bitwise_equal(run_matmul(problem, padding), run_matmul(problem))


# ---- gradients and steps ----


def test_gradients_of_matmul_match_finite_differences():
    _, (x, kernel, indices, bias, *_), sparse = sparsify(make_problem(5, 40, 13, 4), 11, density=0.5)

    def function(x, kernel, bias):
        return fan_in_matmul(x, kernel, indices, bias, sparse=sparse)

    check_grads(function, (x, kernel, bias), order=1, modes=["rev"], eps=1e-2, rtol=1e-2)


@LOSS
def test_gradients_of_loss_match_finite_differences(loss):
    problem = make_problem(5, 40, 13, 4)
    _, (x, kernel, indices, bias, positives, _), sparse = sparsify(problem, 11, density=0.5)

    def scaled(x, kernel, bias):
        return 100 * fan_in_loss(x, kernel, indices, bias, positives, loss=loss, sparse=sparse)

    check_grads(scaled, (x, kernel, bias), order=1, modes=["rev"], eps=1e-2, rtol=1e-2)


STEPS = pytest.mark.parametrize(
    ("shape", "dense", "loss"), [((5, 60, 33, 3), 0, "bce"), ((70, 200, 300, 17), 20, "squared_hinge")]
)


@STEPS
def test_adam_matches_optax(instruction_set, shape, dense, loss):
    problem = make_problem(*shape, with_bias=shape[0] != 5)
    _, problem, sparse = sparsify(problem, dense, density=0.2)
    x, kernel, indices, bias, positives, _ = problem
    tx = optax.adam(0.1, 0.8, 0.99, eps=1e-7)
    params = jax.tree.map(jnp.asarray, (kernel, bias))
    opt_state, state = tx.init(params), adam_init(*params)
    step = jax.jit(functools.partial(fan_in_adam_step, loss=loss, b1=0.8, b2=0.99, epsilon=1e-7))
    for _ in range(2):
        replaced = problem._replace(kernel=params[0], bias=params[1])
        expected_value, expected_d_x, *grads = run_loss(replaced, loss, sparse)
        with jax.numpy_dtype_promotion("standard"):  # Optax promotes dtypes
            updates, opt_state = tx.update(tuple(grads), opt_state, params)
        params = optax.apply_updates(params, updates)
        value, d_x, kernel, bias, state = step(x, kernel, indices, bias, positives, state, 0.1, sparse=sparse)
        np.testing.assert_allclose(value, expected_value, rtol=1e-5)
        np.testing.assert_allclose(d_x, expected_d_x, rtol=1e-4, atol=1e-8)
    adam = opt_state[0]
    actual = ((kernel, bias), (state.mu_kernel, state.mu_bias), (state.nu_kernel, state.nu_bias))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-4, atol=1e-5 * float(jnp.abs(e).max())),
        actual,
        (params, adam.mu, adam.nu),
    )


@STEPS
@DTYPE
def test_sgd_matches_gradients(instruction_set, shape, dense, loss, dtype):
    problem = make_problem(*shape, dtype=dtype)
    _, (x, kernel, indices, bias, positives, _), sparse = sparsify(problem, dense, density=0.2)
    rate = 0.1 * shape[0] * shape[2]
    replaced = problem._replace(x=x, kernel=kernel, bias=bias)
    expected_value, expected_d_x, *grads = run_loss(replaced, loss, sparse)
    step = jax.jit(functools.partial(fan_in_sgd_step, loss=loss))
    value, d_x, *actual = step(x, kernel, indices, bias, positives, rate, sparse=sparse)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    gap = float(jnp.finfo(dtype).eps)  # weights in bfloat16 are rounded up or down
    np.testing.assert_allclose(wide(d_x), wide(expected_d_x), rtol=max(1e-4, gap), atol=1e-8)
    for new, old, grad in zip(actual, (kernel, bias), grads, strict=True):
        expected = wide(old) - rate * wide(grad)
        bound = 1e-4 + gap * (np.abs(expected) + np.abs(wide(grad)) * rate)
        np.testing.assert_array_less(np.abs(wide(new) - expected), bound)


def test_steps_with_x64():
    with jax.enable_x64(True):
        test_adam_matches_optax(None, (5, 60, 33, 3), 0, "bce")
        test_sgd_matches_gradients(None, (5, 60, 33, 3), 0, "bce", jnp.bfloat16)


# ---- transformations, besides those in test_transformations.py ----

FULL, PROBLEM, SPARSE = sparsify(make_problem(6, 40, 10, 4), 12, density=0.3)
LAYER = PROBLEM[1:4]


def test_leading_axes_match_flattened_batch():
    x = PROBLEM.x.reshape(2, 3, 12)
    y = fan_in_matmul(x, *LAYER, sparse=SPARSE)
    np.testing.assert_array_equal(y.reshape(6, 10), fan_in_matmul(PROBLEM.x, *LAYER, sparse=SPARSE))
    scores, labels = fan_in_top_k(x, *LAYER, 3, sparse=SPARSE)
    assert scores.shape == labels.shape == (2, 3, 3)


def test_computed_values_without_gradients():
    scaled = SparseInputs(SPARSE.rows, SPARSE.columns, jnp.asarray(SPARSE.values) * 2, SPARSE.num_columns)
    y = fan_in_matmul(PROBLEM.x, *LAYER, sparse=scaled)
    full = FULL._replace(x=np.where(np.arange(40) < 12, FULL.x, 2 * FULL.x))
    np.testing.assert_allclose(y, brute_force_matmul(full)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [fan_in_matmul, fan_in_loss])
def test_gradient_of_values_raises(op):
    def function(values, stop=lambda values: values):
        sparse = SparseInputs(SPARSE.rows, SPARSE.columns, stop(values), SPARSE.num_columns)
        return jnp.sum(op(*PROBLEM[: 4 if op is fan_in_matmul else 5], sparse=sparse))

    with pytest.raises(TypeError, match=r"sparse.values have no gradient: use jax.lax.stop_gradient"):
        jax.grad(function)(jnp.asarray(SPARSE.values))
    gradient = jax.grad(functools.partial(function, stop=jax.lax.stop_gradient))(jnp.asarray(SPARSE.values))
    assert not np.any(gradient)
