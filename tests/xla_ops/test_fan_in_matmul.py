"""Tests of `fan_in_matmul` against brute force; `test_transformations.py` tests JAX's transformations."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from op_problems import (
    DTYPE,
    OPTIONS,
    Problem,
    assert_all_close,
    assert_matmul,
    make_problem,
    matmul_results,
    run_matmul,
)

from xla_ops import fan_in_matmul, fan_in_matmul_reference

# Sizes around those of the kernels: tiles of 64 points, lanes of 16, blocks of 128 labels, chunks of 1,024
# inputs, and vectors of 4, 8 or 16 connections.
SIZES = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 128, 257]) | st.integers(0, 150),
        "in_features": st.sampled_from([1, 2, 15, 16, 17, 1023, 1024, 1025]) | st.integers(1, 300),
        "labels": st.sampled_from([0, 1, 127, 128, 129, 257]) | st.integers(0, 300),
        "fan_in": st.sampled_from([1, 3, 16, 17, 32, 64, 100]),
    }
)


@settings(max_examples=150)
@given(SIZES, OPTIONS)
def test_matches_brute_force(instruction_set, sizes, options):
    problem = make_problem(**sizes, **options)
    assert_matmul(run_matmul(problem), problem)


@DTYPE
def test_uint16_indices_of_65536_inputs(instruction_set, dtype):
    problem = make_problem(3, 65_536, 100, 40, dtype=dtype, index_dtype=np.uint16)
    problem.indices[0, 0] = 65_535
    assert_matmul(run_matmul(problem), problem)


@pytest.mark.usefixtures("x64")
def test_reference_matches_brute_force():
    problem = make_problem(33, 50, 70, 9)
    assert_matmul(matmul_results(problem, matmul=fan_in_matmul_reference), problem)
    # XLA sums the reference's gradients in bfloat16, so only its result y is as exact as the kernels'.
    problem = make_problem(33, 50, 70, 9, dtype=jnp.bfloat16, index_dtype=np.uint16, with_bias=False)
    y = fan_in_matmul_reference(*problem[:4])
    assert_matmul([y, *run_matmul(problem)[1:]], problem)


@pytest.mark.parametrize("batch", [1, 20, 65])
def test_gradients_match_finite_differences(batch):
    x, kernel, indices, bias, *_ = make_problem(batch, 11, 13, 5)
    # The function is quadratic, so central differences are exact for any eps; a large eps rounds least.
    check_grads(
        lambda x, kernel, bias: fan_in_matmul(x, kernel, indices, bias),
        (x, kernel, bias),
        order=1,
        modes=["rev"],
        eps=0.5,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (1, 1, 4), (0,), (2, 0, 3)])
def test_leading_dimensions(lead):
    problem = make_problem(int(np.prod(lead)), 9, 6, 4)
    x, dy = problem.x.reshape(*lead, 9), problem.dy.reshape(*lead, 6)
    y, d_x, d_kernel, d_bias = matmul_results(problem._replace(x=x, dy=dy))
    assert y.shape == dy.shape
    assert d_x.shape == x.shape
    flat = (y.reshape(problem.dy.shape), d_x.reshape(problem.x.shape), d_kernel, d_bias)
    assert_matmul(flat, problem)


@pytest.mark.parametrize("index_dtype", [np.uint16, np.int32])
@DTYPE
def test_indices_out_of_range_read_nothing(instruction_set, dtype, index_dtype):
    problem = make_problem(33, 40, 150, 17, dtype=dtype, index_dtype=index_dtype)
    limits = np.iinfo(index_dtype)
    outside = [40, 41, limits.max - 1, limits.max] + ([limits.min, -1, -40, -41] if limits.min else [])
    indices = np.resize(np.asarray(outside, index_dtype), problem.indices.shape)
    x = np.full_like(problem.x, np.nan)  # NaN would appear in the results if an input were read
    y, d_x, d_kernel, d_bias = run_matmul(problem._replace(x=x, indices=indices))
    np.testing.assert_array_equal(y, np.broadcast_to(problem.bias, y.shape))
    assert not np.any(d_x)
    assert not np.any(d_kernel)
    assert np.any(d_bias)


@DTYPE
@pytest.mark.parametrize(
    "is_zero",
    [
        lambda b, label: b >= 0,
        lambda b, label: label % 2 == 0,
        lambda b, label: (b // 64 + label) % 2 == 0,
        lambda b, label: b != 99,
    ],
    ids=["all", "even labels", "alternating by tile", "all but one point"],
)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_cotangents(instruction_set, dtype, is_zero, zero):
    problem = make_problem(140, 30, 200, 19, dtype=dtype)
    b, label = np.mgrid[:140, :200]
    problem.dy[is_zero(b, label)] = zero
    assert_matmul(run_matmul(problem), problem)


@DTYPE
def test_results_are_deterministic(instruction_set, dtype):
    problem = make_problem(100, 60, 3000, 20, dtype=dtype)

    def results():
        y, d_x, *others = run_matmul(problem)
        deterministic = [y, *others] + ([d_x] if jax.default_backend() == "cpu" else [])
        return [np.asarray(a).tobytes() for a in deterministic]

    first = results()
    for _ in range(10):
        assert results() == first


def test_more_threads_than_labels():
    # There are enough connections per input for every thread to get some of the labels, but only one label.
    problem = make_problem(3, 1, 1, 300)
    assert_matmul(run_matmul(problem), problem)


# ---- transformations, besides those in test_transformations.py ----


def test_nested_vmap_matches_loop():
    problems = [make_problem(7, 12, 10, 4, seed=seed) for seed in range(3)]
    problem, kernels = problems[0], np.stack([p.kernel for p in problems])
    x, dy = np.stack([p.x for p in problems]), np.stack([p.dy for p in problems])

    def run(x, kernel, dy):
        return matmul_results(problem._replace(x=x, kernel=kernel, dy=dy))

    inner = jax.vmap(run, (0, None, 0))
    each = [inner(x, kernel, dy) for kernel in kernels]
    actual = jax.vmap(inner, (None, 0, None))(x, kernels, dy)
    assert_all_close(actual, jax.tree.map(lambda *a: jnp.stack(a), *each))
    twice = jax.vmap(inner, (0, None, 0))
    assert_all_close(twice(x[None], kernels[0], dy[None]), jax.tree.map(lambda a: a[None], each[0]))


def test_vmap_over_x_is_one_call():
    # Otherwise vmap is a loop over calls, and each of them reads the whole kernel.
    x, *layer = make_problem(7, 12, 10, 4)[:4]
    function = jax.vmap(fan_in_matmul, (0, None, None, None))
    assert "scan" not in str(jax.make_jaxpr(function)(np.stack([x] * 3), *layer))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("labels", [0, 10])
def test_vmap_with_empty_dimensions(count, labels):
    _, kernel, indices, bias, *_ = make_problem(7, 12, 10, 4)
    x = jnp.zeros((count, 7, 12), jnp.float32)
    y = jax.vmap(fan_in_matmul, (0, None, None, None))(x, kernel[:labels], indices[:labels], bias[:labels])
    assert y.shape == (count, 7, labels)


def test_sharded_arguments():
    mesh = jax.make_mesh((len(jax.devices()),), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    problem = make_problem(32, 12, 16, 4)
    sharded = jax.device_put(problem, jax.NamedSharding(mesh, jax.P("i")))
    assert_matmul(run_matmul(sharded), problem)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_batch_sharded_by_shard_map(check_vma):
    mesh = jax.make_mesh((len(jax.devices()),), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    problem, batch_spec, replicated = make_problem(8, 12, 10, 4), jax.P("i"), jax.P()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(Problem(batch_spec, replicated, replicated, replicated, batch_spec, batch_spec),),
        out_specs=(batch_spec, batch_spec, replicated, replicated),
        check_vma=check_vma,
    )
    def run_sharded(problem):
        y, d_x, *layer_gradients = matmul_results(problem)
        # With check_vma, JAX knows which arrays are replicated, and sums their gradients itself.
        return y, d_x, *(layer_gradients if check_vma else jax.lax.psum(layer_gradients, "i"))

    assert_matmul(jax.jit(run_sharded)(problem), problem)


def test_concurrent_calls():
    # The kernels of concurrent calls share XLA's threads with each other and with the calls waiting for them.
    @jax.jit
    def many(problems):
        _, results = jax.lax.scan(lambda _, problem: (None, matmul_results(problem)), None, problems)
        return results, [matmul_results(jax.tree.map(lambda a, i=i: a[i], problems)) for i in range(4)]

    problems = Problem(
        *map(np.stack, zip(*(make_problem(70, 50, 500, 8, seed=i) for i in range(4)), strict=True))
    )
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for scanned, listed in pool.map(many, [problems] * 8):
            for i, results in enumerate(listed):
                problem = Problem(*(a[i] for a in problems))
                assert_matmul(results, problem)
                assert_matmul([a[i] for a in scanned], problem)
