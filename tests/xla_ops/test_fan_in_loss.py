"""Tests of `fan_in_loss` against brute force; `test_transformations.py` tests JAX's transformations."""

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
    LOSS,
    OPTIONS,
    Problem,
    assert_all_close,
    assert_bitwise_equal,
    assert_loss,
    brute_force_loss,
    loss_results,
    make_problem,
    run_loss,
)

from sparse_xmc.losses import LOSSES
from xla_ops import _native, fan_in_loss, fan_in_loss_reference, fan_in_matmul

value_only = jax.jit(fan_in_loss, static_argnames="loss")

# Sizes around those of the kernels: tiles of 64 points, lanes of 16, blocks of 128 labels, and vectors of
# connections.
SIZES = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130]),
        "in_features": st.integers(1, 100),
        "labels": st.sampled_from([1, 127, 128, 129, 300]),
        "fan_in": st.sampled_from([1, 3, 16, 17, 64]),
        "num_positives": st.integers(0, 6),
    }
)


@settings(max_examples=100)
@given(SIZES, OPTIONS, st.sampled_from(sorted(LOSSES)))
def test_matches_brute_force(instruction_set, sizes, options, loss):
    problem = make_problem(**sizes, **options)
    results = run_loss(problem, loss)
    assert_loss(results, problem, loss)
    np.testing.assert_allclose(value_only(*problem[:5], loss=loss), results[0], rtol=1e-6)


@LOSS
@DTYPE
@pytest.mark.parametrize(("labels", "fan_in"), [(1500, 512), (2000, 1100)])
def test_several_chunks_of_labels(labels, fan_in, dtype, loss):
    # A thread has so many connections that it processes its labels in several chunks.
    problem = make_problem(70, 30, labels, fan_in, dtype=dtype)
    assert_loss(run_loss(problem, loss), problem, loss)


@pytest.mark.usefixtures("x64")
@LOSS
def test_worked_example(loss):
    # Logits [[0.5, 2], [-0.5, 2]]; the first point has label 0, the second none.
    x = np.array([[0.5], [-0.5]], np.float32)
    kernel, bias = np.array([[1.0], [0.0]], np.float32), np.array([0.0, 2.0], np.float32)
    indices = np.zeros((2, 1), np.int32)
    positives = np.array([[0], [-1]], np.int32)
    value = fan_in_loss(x, kernel, indices, bias, positives, loss=loss)
    if loss == "squared_hinge":
        assert value == ((1 - 0.5) ** 2 + (1 + 2) ** 2 + (1 - 0.5) ** 2 + (1 + 2) ** 2) / 4
    else:
        # the values log(1 + e^-0.5) and log(1 + e^2), twice each
        np.testing.assert_allclose(value, (0.4740769842 + 2.1269280110) / 2, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@LOSS
def test_reference_matches_brute_force(loss):
    problem = make_problem(33, 50, 70, 9)
    assert_loss(loss_results(problem, loss, function=fan_in_loss_reference), problem, loss)


@pytest.mark.usefixtures("x64")
@LOSS
def test_matches_loss_of_fan_in_matmul(loss):
    # The loss of dense logits needs positives that are distinct and in range.
    problem = make_problem(20, 30, 200, 5)
    problem = problem._replace(
        positives=np.argsort(np.random.default_rng(1).random((20, 200)))[:, :3].astype(np.int32)
    )

    def on_logits(x, kernel, bias):
        return LOSSES[loss](fan_in_matmul(x, kernel, problem.indices, bias), problem.positives)

    value, gradients = jax.value_and_grad(on_logits, (0, 1, 2))(problem.x, problem.kernel, problem.bias)
    for actual, expected in zip(run_loss(problem, loss), [value, *gradients], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@LOSS
def test_gradients_match_finite_differences(loss):
    x, kernel, indices, bias, positives, _ = make_problem(5, 11, 13, 4)

    def scaled(x, kernel, bias):
        return 100 * fan_in_loss(x, kernel, indices, bias, positives, loss=loss)

    check_grads(scaled, (x, kernel, bias), order=1, modes=["rev"], eps=1e-2, rtol=1e-2)


@LOSS
def test_repeated_and_out_of_range_positives(loss):
    problem = make_problem(3, 9, 10, 4)
    invalid = problem._replace(
        positives=np.array([[7, 7, 7, -1], [10, 2, -(2**31), 2], [-5, 11, 2**31 - 1, -1]], np.int32)
    )
    equivalent = problem._replace(positives=np.array([[7], [2], [-1]], np.int32))
    assert_bitwise_equal(run_loss(invalid, loss), run_loss(equivalent, loss))


@LOSS
def test_no_positives(loss):
    problem = make_problem(17, 9, 150, 4)
    padded = problem._replace(positives=np.full((17, 3), -1, np.int32))
    without = problem._replace(positives=np.zeros((17, 0), np.int32))
    assert_loss(run_loss(padded, loss), padded, loss)
    assert_bitwise_equal(run_loss(without, loss), run_loss(padded, loss))


@LOSS
@pytest.mark.parametrize("index_dtype", [np.uint16, np.int32])
def test_indices_out_of_range_read_nothing(instruction_set, index_dtype, loss):
    problem = make_problem(33, 40, 150, 17, index_dtype=index_dtype)
    limits = np.iinfo(index_dtype)
    outside = [40, 41, limits.max - 1, limits.max] + ([limits.min, -1, -40, -41] if limits.min else [])
    indices = np.resize(np.asarray(outside, index_dtype), problem.indices.shape)
    x = np.full_like(problem.x, np.nan)  # NaN would appear in the results if an input were read
    results = run_loss(problem._replace(x=x, indices=indices), loss)
    assert not np.any(results[1])
    assert not np.any(results[2])
    zeros = problem._replace(x=np.zeros_like(x), indices=indices)
    assert_loss(results, zeros, loss)


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_bce_of_extreme_logits(instruction_set, size):
    # Logits of +size and -size; the first two labels are positives.
    x = np.ones((20, 1), np.float32)
    kernel = np.array([[size], [-size], [size], [-size]], np.float32)
    indices, positives = np.zeros((4, 1), np.int32), np.tile(np.array([[0, 1]], np.int32), (20, 1))
    problem = Problem(x, kernel, indices, np.zeros(4, np.float32), positives)
    value, d_x, d_kernel, d_bias = run_loss(problem, "bce")
    np.testing.assert_allclose(value, 2 * size / 4, rtol=1e-6)
    np.testing.assert_allclose(d_bias, [0, -0.25, 0.25, 0], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(d_kernel[:, 0], [0, -0.25, 0.25, 0], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(d_x, np.full((20, 1), 2 * size / 80), rtol=1e-6)


@DTYPE
@pytest.mark.parametrize("excess", [0.0, 0.5], ids=["on the margin", "past the margin"])
def test_gradient_is_zero_where_margin_is_met(instruction_set, dtype, excess):
    # Every logit is its bias: +1 or more for label 3, a positive of all points, and -1 or less elsewhere.
    problem = make_problem(70, 20, 300, 5, dtype=dtype)
    bias = np.full(300, -1 - excess).astype(dtype)
    bias[3] = 1 + excess
    problem = problem._replace(x=np.zeros_like(problem.x), bias=bias, positives=np.full((70, 1), 3, np.int32))
    for result in run_loss(problem, "squared_hinge"):
        assert not np.any(result)
    # Without label 3, point 40 has a gradient, and no other point has one.
    problem.positives[40] = -1
    value, d_x, _, d_bias = run_loss(problem, "squared_hinge")
    assert value > 0
    np.testing.assert_array_equal(np.flatnonzero(np.any(np.asarray(d_x, np.float32), axis=1)), [40])
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(d_bias, np.float32)), [3])


@pytest.mark.parametrize("size", [50, 200, 3e19])
def test_zero_loss_is_exact(instruction_set, size):
    """The loss that positives would have as negatives leaves no rounding error."""
    rng = np.random.default_rng(0)
    is_positive = rng.random((40, 70)) < 0.2
    positives = np.where(is_positive, np.arange(70), -1).astype(np.int32)
    x = np.where(is_positive, size, -size).astype(np.float32)
    arguments = (x, np.ones((70, 1), np.float32), np.arange(70, dtype=np.int32)[:, None], None, positives)
    value, gradients = jax.value_and_grad(fan_in_loss, argnums=(0, 1))(*arguments)
    assert value == 0
    assert not any(np.any(gradient) for gradient in gradients)


@LOSS
def test_nan_propagates(instruction_set, loss):
    problem = make_problem(20, 9, 30, 4)
    problem.x[11] = np.nan
    value, d_x, *_ = run_loss(problem._replace(positives=np.full((20, 1), -1, np.int32)), loss)
    assert np.isnan(value)
    assert np.isnan(d_x[11]).any()
    assert np.isfinite(d_x[:11]).all()


@LOSS
@pytest.mark.parametrize("shape", [(0, 9, 6, 4), (5, 9, 0, 4), (5, 0, 6, 4)], ids=str)
def test_empty_dimension(loss, shape):
    problem = make_problem(*shape)
    results = run_loss(problem, loss)
    assert np.isnan(results[0]) == (0 in (shape[0], shape[2]))  # the mean of no values
    assert_all_close(results, brute_force_loss(problem, loss)[0])


@LOSS
@DTYPE
def test_results_are_deterministic(instruction_set, dtype, loss):
    problem = make_problem(100, 60, 3000, 20, dtype=dtype)

    def results():
        value, d_x, *others = run_loss(problem, loss)
        deterministic = [value, *others] + ([d_x] if jax.default_backend() == "cpu" else [])
        return [np.asarray(a).tobytes() for a in deterministic]

    first = results()
    for _ in range(5):
        assert results() == first


def test_logits_are_not_stored():
    batch, labels = 64, 100_000
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((batch, 50), jnp.float32),
            ((labels, 1), jnp.float32),
            ((labels, 1), jnp.uint16),
            ((labels,), jnp.float32),
            ((batch, 5), jnp.int32),
        )
    ]

    def temporary_bytes(loss):
        compiled = jax.jit(jax.grad(loss, (0, 1, 3))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(fan_in_loss) < batch * labels * 4 / 10
    if jax.default_backend() == "cpu":  # shows that logits would be measured; XLA may fuse them on a GPU
        assert temporary_bytes(fan_in_loss_reference) > batch * labels * 4


@pytest.mark.usefixtures("x64")
@DTYPE
def test_gradients_scale_with_the_cotangent(dtype):
    problem = make_problem(7, 12, 10, 4, dtype=dtype)
    once = jax.grad(lambda x: fan_in_loss(x, *problem[1:5]))(problem.x)
    thrice = jax.grad(lambda x: 3 * fan_in_loss(x, *problem[1:5]))(problem.x)
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    once = 3 * once.astype(jnp.float32)
    # On a GPU, both are summed in no fixed order.
    reordered = 0 if jax.default_backend() == "cpu" else tolerance * float(jnp.abs(once).max())
    np.testing.assert_allclose(thrice.astype(jnp.float32), once, rtol=tolerance, atol=reordered)


@LOSS
def test_checkpoint_matches(loss):
    problem = make_problem(7, 12, 10, 4)[:5]
    function = functools.partial(fan_in_loss, loss=loss)
    gradients = jax.jit(jax.value_and_grad(jax.checkpoint(function), (0, 1, 3)))(*problem)
    assert_all_close(list(gradients), list(jax.value_and_grad(function, (0, 1, 3))(*problem)))


@LOSS
def test_batch_sharded_by_shard_map(loss):
    mesh = jax.make_mesh((len(jax.devices()),), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    problem, batch_spec, replicated = make_problem(8, 12, 10, 4), jax.P("i"), jax.P()

    def mean_loss(x, kernel, indices, bias, positives):
        in_specs = (batch_spec, replicated, replicated, replicated, batch_spec)

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=replicated)
        def mean_over_shards(*arguments):
            return jax.lax.pmean(fan_in_loss(*arguments, loss=loss), "i")

        return mean_over_shards(x, kernel, indices, bias, positives)

    value, gradients = jax.jit(jax.value_and_grad(mean_loss, (0, 1, 3)))(*problem[:5])
    assert_loss([value, *gradients], problem, loss)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="calls the CPU handlers")
@pytest.mark.parametrize(
    ("changes", "loss", "message"),
    [
        ({"kernel": np.zeros((9, 4), np.float32)}, 0, r"kernel must have shape \[10, 4\], got \[9, 4\]"),
        ({"bias": np.zeros(9, np.float32)}, 0, r"bias must have shape \[10\], got \[9\]"),
        ({"positives": np.zeros((6, 2), np.int32)}, 0, r"positives must have shape \[7, 2\], got \[6, 2\]"),
        ({}, 2, "loss must be 0 or 1, got 2"),
    ],
)
def test_handler_checks_operands(changes, loss, message):
    # Exported programs call handlers by name, without the checks in Python.
    _native.register()
    call = jax.ffi.ffi_call("xla_ops.fan_in_loss.value", jax.ShapeDtypeStruct((), jnp.float32))
    x, *others = make_problem(7, 12, 10, 4)._replace(**changes)[:5]
    no_sparse = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    attributes = {"num_columns": np.int64(0), "loss": np.int64(loss), "num_labels": np.int64(10)}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(x, *no_sparse, *others, **attributes))


@LOSS
@pytest.mark.parametrize("cut", [1, 64, 70, 129])
def test_losses_of_label_shards_add_up(loss, cut):
    problem = make_problem(9, 12, 130, 4)
    value_and_grad = jax.value_and_grad(fan_in_loss, argnums=(0, 1, 3))
    value, (d_x, d_kernel, d_bias) = value_and_grad(*problem[:5], loss=loss)
    results = []
    for shard in (slice(0, cut), slice(cut, None)):
        layer = (problem.kernel[shard], problem.indices[shard], problem.bias[shard])
        positives = problem.positives - shard.start  # positives of other shards are out of range
        results.append(value_and_grad(problem.x, *layer, positives, loss=loss, num_labels=130))
    np.testing.assert_allclose(sum(p[0] for p in results), value, rtol=1e-6)
    np.testing.assert_allclose(sum(p[1][0] for p in results), d_x, rtol=1e-4, atol=1e-7)
    for i, gradient in ((1, d_kernel), (2, d_bias)):
        concatenated = np.concatenate([p[1][i] for p in results])
        np.testing.assert_allclose(concatenated, gradient, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(
        fan_in_loss_reference(*problem[:5], loss=loss, num_labels=260), value / 2, rtol=1e-5
    )
