"""fan_in_matmul against loops in float64, and under every transformation of JAX that it supports."""

import concurrent.futures
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from xla_ops import fan_in_matmul, fan_in_matmul_reference

HANDLERS = [f"xla_ops.fan_in_matmul.{name}" for name in ("forward", "gradients")]


class Problem(NamedTuple):
    """Arguments of fan_in_matmul (without a bias if that is None), and a cotangent of its result."""

    x: np.ndarray
    kernel: np.ndarray
    indices: np.ndarray
    bias: np.ndarray | None
    dy: np.ndarray


def make_problem(
    batch, in_features, labels, fan_in, *, dtype=jnp.float32, index_dtype=np.int32, with_bias=True, seed=0
):
    """Random values; some indices are repeated within their row, and some are out of range."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    indices = rng.integers(0, in_features, (labels, fan_in))
    outside = [i for i in (in_features, in_features + 1) if i <= np.iinfo(index_dtype).max]
    outside += [np.iinfo(index_dtype).max] if in_features <= np.iinfo(index_dtype).max else []
    outside += [-1, -in_features, np.iinfo(index_dtype).min] if index_dtype == np.int32 else []
    if outside:
        indices = np.where(rng.random(indices.shape) < 0.1, rng.choice(outside, indices.shape), indices)
    repeated = rng.random(labels) < 0.3
    indices[repeated, -1] = indices[repeated, 0]
    return Problem(
        x=normal(batch, in_features),
        kernel=normal(labels, fan_in),
        indices=indices.astype(index_dtype),
        bias=normal(labels) if with_bias else None,
        dy=normal(batch, labels),
    )


def brute_force(x, kernel, indices, bias, dy):
    """[y, d_x, d_kernel, d_bias] in float64, one connection per label at a time."""
    x, kernel, dy = (a.astype(np.float64) for a in (x, kernel, dy))
    y, d_x, d_kernel = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(kernel)
    for f in range(kernel.shape[1]):
        labels = np.flatnonzero((indices[:, f] >= 0) & (indices[:, f] < x.shape[1]))
        inputs = indices[labels, f]
        y[:, labels] += kernel[labels, f] * x[:, inputs]
        d_kernel[labels, f] = (dy[:, labels] * x[:, inputs]).sum(axis=0)
        np.add.at(d_x.T, inputs, (kernel[labels, f] * dy[:, labels]).T)
    if bias is None:
        return [y, d_x, d_kernel, None]
    return [y + bias.astype(np.float64)[np.newaxis], d_x, d_kernel, dy.sum(axis=0)]


def assert_matches_brute_force(results, problem):
    """Each result may be off by a float32 sum's rounding, in any order, and by one rounding to its dtype.

    A sum of n products is off by at most n * eps / 2 of the sum of their magnitudes (to first order, once
    more for the products), so that n * eps covers it.
    """
    x, kernel, indices, bias, dy = problem

    def of_values(function):
        return brute_force(
            function(x), function(kernel), indices, None if bias is None else function(bias), function(dy)
        )

    magnitudes, terms = of_values(np.abs), of_values(np.ones_like)
    names = ("y", "d_x", "d_kernel", "d_bias")
    for name, result, expected, magnitude, n in zip(
        names, results, brute_force(*problem), magnitudes, terms, strict=True
    ):
        if expected is None:
            assert result is None
            continue
        assert result.dtype == problem.x.dtype, name
        assert result.shape == expected.shape, name
        summing = n * jnp.finfo(jnp.float32).eps * magnitude
        rounding = jnp.finfo(result.dtype).eps / 2 * (np.abs(expected) + summing)
        error = np.abs(np.asarray(result, np.float64) - expected)
        assert np.all(error <= summing + rounding), f"{name} is off by up to {error.max()}"


def with_gradients(matmul):
    """(x, kernel, indices, bias, dy) -> (y, d_x, d_kernel, d_bias)."""

    def run(x, kernel, indices, bias, dy):
        y, vjp = jax.vjp(lambda x, kernel, bias: matmul(x, kernel, indices, bias), x, kernel, bias)
        return y, *vjp(dy)

    return run


run = with_gradients(fan_in_matmul)
run_jit = jax.jit(run)


# Around the kernels' tiles of 64 examples in lanes of 16, blocks of 128 labels, chunks of 1,024 features, and
# vectors of 4, 8 or 16 connections.
SIZES = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 128, 257]) | st.integers(0, 150),
        "in_features": st.sampled_from([1, 2, 15, 16, 17, 1023, 1024, 1025]) | st.integers(1, 300),
        "labels": st.sampled_from([0, 1, 127, 128, 129, 257]) | st.integers(0, 300),
        "fan_in": st.sampled_from([1, 3, 16, 17, 32, 64, 100]),
    }
)
KINDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([jnp.float32, jnp.bfloat16]),
        "index_dtype": st.sampled_from([np.uint16, np.int32]),
        "with_bias": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=150)
@given(SIZES, KINDS)
def test_matches_brute_force(instruction_set, sizes, kind):
    problem = make_problem(**sizes, **kind)
    assert_matches_brute_force(run_jit(*problem), problem)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_uint16_indices_are_in_range_of_65536_features(instruction_set, dtype):
    problem = make_problem(3, 65_536, 100, 40, dtype=dtype, index_dtype=np.uint16)
    problem.indices[0, 0] = 65_535
    assert_matches_brute_force(run_jit(*problem), problem)


@pytest.mark.usefixtures("x64")
def test_reference_matches_brute_force():
    problem = make_problem(33, 50, 70, 9)
    assert_matches_brute_force(with_gradients(fan_in_matmul_reference)(*problem), problem)
    # XLA sums its gradients in bfloat16, so that only the result is as exact as ours.
    problem = make_problem(33, 50, 70, 9, dtype=jnp.bfloat16, index_dtype=np.uint16, with_bias=False)
    y = fan_in_matmul_reference(*problem[:4])
    assert_matches_brute_force([y, *run(*problem)[1:]], problem)


@pytest.mark.parametrize("batch", [1, 20, 65])
def test_gradients_match_finite_differences(batch):
    x, kernel, indices, bias, _ = make_problem(batch, 11, 13, 5)
    # The function is quadratic, so that central differences are exact at any step; a long one rounds least.
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
    y, d_x, d_kernel, d_bias = run(*problem._replace(x=x, dy=dy))
    assert y.shape == dy.shape
    assert d_x.shape == x.shape
    flat = (y.reshape(problem.dy.shape), d_x.reshape(problem.x.shape), d_kernel, d_bias)
    assert_matches_brute_force(flat, problem)


@pytest.mark.parametrize("index_dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_indices_out_of_range_touch_nothing(instruction_set, dtype, index_dtype):
    problem = make_problem(33, 40, 150, 17, dtype=dtype, index_dtype=index_dtype)
    limits = np.iinfo(index_dtype)
    outside = [40, 41, limits.max - 1, limits.max] + ([limits.min, -1, -40, -41] if limits.min else [])
    indices = np.resize(np.asarray(outside, index_dtype), problem.indices.shape)
    x = np.full_like(problem.x, np.nan)  # would show in the result if any of it were read
    y, d_x, d_kernel, d_bias = run_jit(*problem._replace(x=x, indices=indices))
    np.testing.assert_array_equal(y, np.broadcast_to(problem.bias, y.shape))
    assert not np.any(d_x)
    assert not np.any(d_kernel)
    assert np.any(d_bias)


def test_no_input_features():
    problem = make_problem(5, 1, 6, 3)
    problem = problem._replace(x=problem.x[:, :0])
    assert_matches_brute_force(run_jit(*problem), problem)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "is_zero",
    [
        lambda b, label: b >= 0,
        lambda b, label: label % 2 == 0,
        lambda b, label: (b // 64 + label) % 2 == 0,
        lambda b, label: b != 99,
    ],
    ids=["everywhere", "every other label", "label by tile", "all but one example"],
)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_gradients(instruction_set, dtype, is_zero, zero):
    problem = make_problem(140, 30, 200, 19, dtype=dtype)
    b, label = np.mgrid[:140, :200]
    problem.dy[is_zero(b, label)] = zero
    assert_matches_brute_force(run_jit(*problem), problem)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_results_repeat_bit_for_bit(instruction_set, dtype):
    problem = make_problem(100, 60, 3000, 20, dtype=dtype)

    def results():
        y, d_x, *others = run_jit(*problem)
        promised = [y, *others] + ([d_x] if jax.default_backend() == "cpu" else [])
        return [np.asarray(a).tobytes() for a in promised]

    first = results()
    for _ in range(10):
        assert results() == first


def test_more_threads_than_labels():
    # So many connections per feature that each thread gets a part of the labels, though there is but one.
    problem = make_problem(3, 1, 1, 300)
    assert_matches_brute_force(run_jit(*problem), problem)


# ---- transformations ----

PROBLEM = make_problem(7, 12, 10, 4)


def stack(count, axes):
    """PROBLEM with `count` different values along the axes of `axes` that are not None."""
    values = zip(*(make_problem(7, 12, 10, 4, seed=seed) for seed in range(count)), strict=True)
    return tuple(
        first if axis is None else np.stack(all_of_them, axis)
        for first, all_of_them, axis in zip(PROBLEM, values, axes, strict=True)
    )


def assert_all_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "axes",
    [
        (0, None, None, None, 0),
        (1, None, None, None, 1),
        (None, 0, None, None, 0),
        (None, None, 0, None, 0),
        (None, None, None, 0, 0),
        (0, 0, None, None, 0),
        (0, 0, 0, 0, 0),
        (1, 2, 1, 1, 2),
    ],
    ids=str,
)
def test_vmap_is_a_loop(axes):
    arguments = stack(3, axes)
    actual = jax.jit(jax.vmap(run, axes))(*arguments)
    each = [
        run_jit(*(a if axis is None else a.take(i, axis) for a, axis in zip(arguments, axes, strict=True)))
        for i in range(3)
    ]
    assert_all_close(actual, jax.tree.map(lambda *a: jnp.stack(a), *each))


def test_vmap_of_vmap_is_a_loop():
    x, kernel, indices, bias, dy = stack(3, (0, 0, None, None, 0))
    inner = jax.vmap(run, (0, None, None, None, 0))
    actual = jax.vmap(inner, (None, 0, None, None, None))(x, kernel, indices, bias, dy)
    twice = jax.vmap(jax.vmap(run, (0, None, None, None, 0)), (0, None, None, None, 0))
    each = [inner(x, k, indices, bias, dy) for k in kernel]
    assert_all_close(actual, jax.tree.map(lambda *a: jnp.stack(a), *each))
    assert_all_close(
        twice(x[None], kernel[0], indices, bias, dy[None]), jax.tree.map(lambda a: a[None], each[0])
    )


def test_vmap_over_inputs_alone_is_one_call():
    # Anything else loops over calls, each of which would pass over all of the kernel.
    arguments = stack(3, (0, None, None, None, None))
    function = jax.vmap(fan_in_matmul, (0, None, None, None))
    assert "scan" not in str(jax.make_jaxpr(function)(*arguments[:4]))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("labels", [0, 10])
def test_vmap_over_nothing(count, labels):
    _, kernel, indices, bias, _ = PROBLEM
    x = jnp.zeros((count, 7, 12), jnp.float32)
    y = jax.vmap(fan_in_matmul, (0, None, None, None))(x, kernel[:labels], indices[:labels], bias[:labels])
    assert y.shape == (count, 7, labels)


def loss(x, kernel, indices, bias, dy):
    return jnp.sum(fan_in_matmul(x, kernel, indices, bias) ** 2 * dy)


@pytest.mark.usefixtures("x64")
def test_vmap_of_grad_is_a_loop():
    gradient = jax.grad(loss, (0, 1, 3))
    axes = (0, None, None, None, 0)
    arguments = stack(3, axes)
    each = [gradient(x, *PROBLEM[1:4], dy) for x, dy in zip(arguments[0], arguments[4], strict=True)]
    assert_all_close(jax.vmap(gradient, axes)(*arguments), jax.tree.map(lambda *a: jnp.stack(a), *each))


@pytest.mark.usefixtures("x64")
def test_checkpoint_changes_nothing():
    gradient = jax.grad(jax.checkpoint(loss), (0, 1, 3))
    assert_all_close(jax.jit(gradient)(*PROBLEM), jax.grad(loss, (0, 1, 3))(*PROBLEM))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_eval_shape(dtype):
    problem = make_problem(7, 12, 10, 4, dtype=dtype)
    y, *gradients = jax.eval_shape(run, *problem)
    assert (y.shape, y.dtype) == ((7, 10), dtype)
    for gradient, argument in zip(gradients, (problem.x, problem.kernel, problem.bias), strict=True):
        assert (gradient.shape, gradient.dtype) == (argument.shape, dtype)


@pytest.mark.usefixtures("x64")
def test_export_round_trip():
    pytest.importorskip("flatbuffers", reason="jax needs it to serialize")
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in PROBLEM]
    shapes[0] = jax.ShapeDtypeStruct((batch, 12), jnp.float32)
    shapes[4] = jax.ShapeDtypeStruct((batch, 10), jnp.float32)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in HANDLERS]
    saved = jax.export.export(run_jit, disabled_checks=allowed)(*shapes).serialize()
    loaded = jax.export.deserialize(saved)
    for batch_size in (1, 33):
        problem = make_problem(batch_size, 12, 10, 4)
        assert_matches_brute_force(loaded.call(*problem), problem)


def test_other_devices():
    device = jax.devices()[-1]
    results = run_jit(*jax.device_put(PROBLEM, device))
    assert all(result.devices() == {device} for result in results)
    assert_matches_brute_force(results, PROBLEM)


def test_sharded_arguments():
    mesh = jax.make_mesh((len(jax.devices()),), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    problem = make_problem(32, 12, 16, 4)
    sharded = jax.device_put(problem, jax.NamedSharding(mesh, jax.P("i")))
    assert_matches_brute_force(run_jit(*sharded), problem)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_batch_over_devices(check_vma):
    mesh = jax.make_mesh((len(jax.devices()),), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    problem, split, whole = make_problem(8, 12, 10, 4), jax.P("i"), jax.P()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, whole, whole, whole, split),
        out_specs=(split, split, whole, whole),
        check_vma=check_vma,
    )
    def run_sharded(*arguments):
        y, d_x, *of_layer = run(*arguments)  # JAX sums the gradients of what does not vary, if it may check
        return y, d_x, *(of_layer if check_vma else jax.lax.psum(of_layer, "i"))

    assert_matches_brute_force(jax.jit(run_sharded)(*problem), problem)


def test_calls_at_the_same_time():
    # The kernels share XLA's threads with each other and with the calls that wait for them.
    @jax.jit
    def many(problems):
        _, results = jax.lax.scan(lambda _, problem: (None, run(*problem)), None, problems)
        return results, [run(*jax.tree.map(lambda a, i=i: a[i], problems)) for i in range(4)]

    problems = Problem(
        *map(np.stack, zip(*(make_problem(70, 50, 500, 8, seed=i) for i in range(4)), strict=True))
    )
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for scanned, listed in pool.map(many, [problems] * 8):
            for i, results in enumerate(listed):
                problem = Problem(*(a[i] for a in problems))
                assert_matches_brute_force(results, problem)
                assert_matches_brute_force([a[i] for a in scanned], problem)
