"""fan_in_loss and its gradients against a dense computation in float64, and under JAX's transformations."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from sparse_xmc.losses import LOSSES
from xla_ops import _native, fan_in_loss, fan_in_loss_reference, fan_in_matmul

HANDLERS = [f"xla_ops.fan_in_loss.{name}" for name in ("value", "gradients")]
EPS = float(jnp.finfo(jnp.float32).eps)


class Problem(NamedTuple):
    """Arguments of fan_in_loss."""

    x: np.ndarray
    kernel: np.ndarray
    indices: np.ndarray
    bias: np.ndarray | None
    positives: np.ndarray


def make_problem(
    batch,
    in_features,
    labels,
    fan_in,
    *,
    num_positives=4,
    dtype=jnp.float32,
    index_dtype=np.int32,
    with_bias=True,
    seed=0,
):
    """Random values. Of indices and positives some are repeated, some out of range, some positives -1."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    indices = rng.integers(0, in_features + 2, (labels, fan_in))
    indices[rng.random(indices.shape) < 0.05] = np.iinfo(index_dtype).min  # uint16: 0, so repeated
    positives = rng.integers(0, labels, (batch, num_positives))
    positives[rng.random(positives.shape) < 0.2] = -1
    positives[rng.random(positives.shape) < 0.05] = labels
    positives[rng.random(positives.shape) < 0.05] = np.iinfo(np.int32).max
    positives[rng.random(positives.shape) < 0.05] = np.iinfo(np.int32).min
    repeated = rng.random(batch) < 0.3
    positives[repeated, -1:] = positives[repeated, :1]
    return Problem(
        x=normal(batch, in_features),
        kernel=normal(labels, fan_in),
        indices=indices.astype(index_dtype),
        bias=normal(labels) if with_bias else None,
        positives=positives.astype(np.int32),
    )


def dense_weights(kernel, indices, in_features):
    """float64 [L, D]: the layer as an ordinary matrix."""
    dense = np.zeros((kernel.shape[0], in_features))
    for label, row in enumerate(indices):
        for f, i in enumerate(row):
            if 0 <= i < in_features:
                dense[label, i] += kernel[label, f]
    return dense


def is_positive(positives, labels):
    """bool [B, L]."""
    target = np.zeros((len(positives), labels), bool)
    for b, row in enumerate(positives):
        for label in row:
            if 0 <= label < labels:
                target[b, label] = True
    return target


def value_and_slope(loss, margin):
    """A loss as a function of y * s, and its derivative, in float64."""
    if loss == "squared_hinge":
        slack = np.maximum(0, 1 - margin)
        return slack**2, -2 * slack
    # log(1 + e^-margin), in the form that never overflows
    value = np.maximum(0, -margin) + np.log1p(np.exp(-np.abs(margin)))
    return value, -np.exp(-np.maximum(0, margin)) / (1 + np.exp(-np.abs(margin)))


def brute_force(problem, loss):
    """[loss, d_x, d_kernel, d_bias] in float64, and how far float32 sums may be off from each."""
    x, kernel, indices, bias, positives = problem
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    (batch, in_features), (labels, fan_in) = x.shape, kernel.shape
    bias = np.zeros(labels) if bias is None else bias.astype(np.float64)
    weights, magnitudes = (dense_weights(k, indices, in_features) for k in (kernel, np.abs(kernel)))
    sign = np.where(is_positive(positives, labels), 1, -1)
    value, slope = value_and_slope(loss, sign * (x @ weights.T + bias[None]))
    slope = sign * slope / (batch * labels)

    def gradients(slope, x, weights):
        d_weights = np.pad(slope.T @ x, ((0, 0), (0, 1)))  # the last column is for indices out of range
        at = np.where((indices >= 0) & (indices < in_features), indices, in_features).astype(np.int64)
        d_kernel = np.take_along_axis(d_weights, at, axis=1)
        return slope @ weights, d_kernel, slope.sum(axis=0)

    # Rounding: of a logit, then through the slope (which is Lipschitz with constant 2) and the sums.
    logit_error = (fan_in + 2) * EPS * (np.abs(x) @ magnitudes.T + np.abs(bias)[None])
    slope_error = 2 * logit_error / (batch * labels) + 8 * EPS * np.abs(slope)
    rounded = gradients(slope_error, np.abs(x), magnitudes)
    summed = gradients(EPS * np.abs(slope), np.abs(x), magnitudes)
    errors = [r + n * s for r, s, n in zip(rounded, summed, (labels, batch, batch), strict=True)]
    # A positive's value replaces what it has as a negative: both round.
    both = value + value_and_slope(loss, -sign * (x @ weights.T + bias[None]))[0]
    value_error = np.sum(np.abs(slope) * logit_error) + np.mean(logit_error**2 + 64 * EPS * both)
    return [np.mean(value), *gradients(slope, x, weights)], [value_error, *errors]


def assert_matches_brute_force(results, problem, loss):
    expected, errors = brute_force(problem, loss)
    if problem.bias is None:
        assert results[-1] is None
        results, expected, errors = results[:-1], expected[:-1], errors[:-1]
    names = ("value", "d_x", "d_kernel", "d_bias")[: len(results)]
    for name, result, exact, error in zip(names, results, expected, errors, strict=True):
        assert result.dtype == (jnp.float32 if name == "value" else problem.x.dtype), name
        assert result.shape == exact.shape, name
        allowed = error + jnp.finfo(result.dtype).eps / 2 * (np.abs(exact) + error) + 1e-37
        off = np.abs(np.asarray(result, np.float64) - exact)
        assert np.all(off <= allowed), f"{name} is off by up to {off.max()}"


@functools.partial(jax.jit, static_argnums=5)
def run(x, kernel, indices, bias, positives, loss):
    """[loss, d_x, d_kernel, d_bias]."""

    def of_values(x, kernel, bias):
        return fan_in_loss(x, kernel, indices, bias, positives, loss=loss)

    value, gradients = jax.value_and_grad(of_values, (0, 1, 2))(x, kernel, bias)
    return [value, *gradients]


value_only = jax.jit(fan_in_loss, static_argnames="loss")
LOSS = pytest.mark.parametrize("loss", ["squared_hinge", "bce"])

# Around the kernels' tiles of 64 examples in lanes of 16, blocks of 128 labels, and vectors of connections.
SIZES = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130]),
        "in_features": st.integers(1, 100),
        "labels": st.sampled_from([1, 127, 128, 129, 300]),
        "fan_in": st.sampled_from([1, 3, 16, 17, 64]),
        "num_positives": st.integers(0, 6),
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


@settings(max_examples=100)
@given(SIZES, KINDS, st.sampled_from(["squared_hinge", "bce"]))
def test_matches_brute_force(instruction_set, sizes, kind, loss):
    problem = make_problem(**sizes, **kind)
    results = run(*problem, loss)
    assert_matches_brute_force(results, problem, loss)
    np.testing.assert_allclose(value_only(*problem, loss=loss), results[0], rtol=1e-6)


@LOSS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("labels", "fan_in"), [(1500, 512), (2000, 1100)])
def test_several_runs_of_labels(labels, fan_in, dtype, loss):
    # So many connections that a thread takes its labels through the batch in more than one go.
    problem = make_problem(70, 30, labels, fan_in, dtype=dtype)
    assert_matches_brute_force(run(*problem, loss), problem, loss)


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
        # log(1 + e^-0.5), log(1 + e^2) and both again
        np.testing.assert_allclose(value, (0.4740769842 + 2.1269280110) / 2, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@LOSS
def test_reference_matches_brute_force(loss):
    problem = make_problem(33, 50, 70, 9)
    x, kernel, indices, bias, positives = problem
    value, gradients = jax.value_and_grad(
        lambda x, kernel, bias: fan_in_loss_reference(x, kernel, indices, bias, positives, loss=loss),
        (0, 1, 2),
    )(x, kernel, bias)
    assert_matches_brute_force([value, *gradients], problem, loss)


@pytest.mark.usefixtures("x64")
@LOSS
def test_equals_the_loss_of_fan_in_matmul(loss):
    # The loss on logits takes positives that are distinct and in range.
    problem = make_problem(20, 30, 200, 5)
    problem = problem._replace(
        positives=np.argsort(np.random.default_rng(1).random((20, 200)))[:, :3].astype(np.int32)
    )

    def on_logits(x, kernel, bias):
        return LOSSES[loss](fan_in_matmul(x, kernel, problem.indices, bias), problem.positives)

    value, gradients = jax.value_and_grad(on_logits, (0, 1, 2))(problem.x, problem.kernel, problem.bias)
    for ours, theirs in zip(run(*problem, loss), [value, *gradients], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@LOSS
def test_gradients_match_finite_differences(loss):
    x, kernel, indices, bias, positives = make_problem(5, 11, 13, 4)

    def scaled(x, kernel, bias):
        return 100 * fan_in_loss(x, kernel, indices, bias, positives, loss=loss)

    check_grads(scaled, (x, kernel, bias), order=1, modes=["rev"], eps=1e-2, rtol=1e-2)


def assert_same(results, expected):
    """Bit for bit, but for the gradient of x on a GPU, whose sums are taken in any order."""
    for number, (a, b) in enumerate(zip(results, expected, strict=True)):
        if number == 1 and jax.default_backend() != "cpu":
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
        else:
            np.testing.assert_array_equal(a, b)


@LOSS
def test_positives_count_once_and_only_in_range(loss):
    problem = make_problem(3, 9, 10, 4)
    listed = problem._replace(
        positives=np.array([[7, 7, 7, -1], [10, 2, -(2**31), 2], [-5, 11, 2**31 - 1, -1]], np.int32)
    )
    meant = problem._replace(positives=np.array([[7], [2], [-1]], np.int32))
    assert_same(run(*listed, loss), run(*meant, loss))


@LOSS
def test_no_positives_at_all(loss):
    problem = make_problem(17, 9, 150, 4)
    padded = problem._replace(positives=np.full((17, 3), -1, np.int32))
    without = problem._replace(positives=np.zeros((17, 0), np.int32))
    assert_matches_brute_force(run(*padded, loss), padded, loss)
    assert_same(run(*without, loss), run(*padded, loss))


@LOSS
@pytest.mark.parametrize("index_dtype", [np.uint16, np.int32])
def test_indices_out_of_range_touch_nothing(instruction_set, index_dtype, loss):
    problem = make_problem(33, 40, 150, 17, index_dtype=index_dtype)
    limits = np.iinfo(index_dtype)
    outside = [40, 41, limits.max - 1, limits.max] + ([limits.min, -1, -40, -41] if limits.min else [])
    indices = np.resize(np.asarray(outside, index_dtype), problem.indices.shape)
    x = np.full_like(problem.x, np.nan)  # would show in the result if any of it were read
    results = run(*problem._replace(x=x, indices=indices), loss)
    assert not np.any(results[1])
    assert not np.any(results[2])
    zeros = problem._replace(x=np.zeros_like(x), indices=indices)
    assert_matches_brute_force(results, zeros, loss)


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_cross_entropy_of_extreme_logits(instruction_set, size):
    # Logits of +size and -size; the first two labels are positives.
    x = np.ones((20, 1), np.float32)
    kernel = np.array([[size], [-size], [size], [-size]], np.float32)
    indices, positives = np.zeros((4, 1), np.int32), np.tile(np.array([[0, 1]], np.int32), (20, 1))
    value, d_x, d_kernel, d_bias = run(x, kernel, indices, np.zeros(4, np.float32), positives, "bce")
    np.testing.assert_allclose(value, 2 * size / 4, rtol=1e-6)
    np.testing.assert_allclose(d_bias, [0, -0.25, 0.25, 0], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(d_kernel[:, 0], [0, -0.25, 0.25, 0], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(d_x, np.full((20, 1), 2 * size / 80), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("excess", [0.0, 0.5], ids=["on the margin", "past the margin"])
def test_no_gradient_where_the_margin_is_met(instruction_set, dtype, excess):
    # Every logit is its bias: +1 or more for label 3, a positive of all points, and -1 or less elsewhere.
    problem = make_problem(70, 20, 300, 5, dtype=dtype)
    bias = np.full(300, -1 - excess).astype(dtype)
    bias[3] = 1 + excess
    problem = problem._replace(x=np.zeros_like(problem.x), bias=bias, positives=np.full((70, 1), 3, np.int32))
    for result in run(*problem, "squared_hinge"):
        assert not np.any(result)
    # One point that does not have label 3 is alone in having a gradient.
    problem.positives[40] = -1
    value, d_x, _, d_bias = run(*problem, "squared_hinge")
    assert value > 0
    np.testing.assert_array_equal(np.flatnonzero(np.any(np.asarray(d_x, np.float32), axis=1)), [40])
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(d_bias, np.float32)), [3])


@pytest.mark.parametrize("size", [50, 200, 3e19])
def test_a_loss_of_nothing_is_exactly_nothing(instruction_set, size):
    """Nor is there a trace of what positives would have cost as negatives."""
    rng = np.random.default_rng(0)
    wanted = rng.random((40, 70)) < 0.2
    positives = np.where(wanted, np.arange(70), -1).astype(np.int32)
    x = np.where(wanted, size, -size).astype(np.float32)
    arguments = (x, np.ones((70, 1), np.float32), np.arange(70, dtype=np.int32)[:, None], None, positives)
    value, gradients = jax.value_and_grad(fan_in_loss, argnums=(0, 1))(*arguments)
    assert value == 0
    assert not any(np.any(gradient) for gradient in gradients)


@LOSS
def test_nan_is_not_hidden(instruction_set, loss):
    problem = make_problem(20, 9, 30, 4)
    problem.x[11] = np.nan
    value, d_x, *_ = run(*problem._replace(positives=np.full((20, 1), -1, np.int32)), loss)
    assert np.isnan(value)
    assert np.isnan(d_x[11]).any()
    assert np.isfinite(d_x[:11]).all()


@pytest.mark.parametrize("empty", ["batch", "labels"])
@LOSS
def test_mean_of_nothing_is_nan(loss, empty):
    x, kernel, indices, bias, positives = make_problem(5, 9, 6, 4)
    if empty == "batch":
        x, positives = x[:0], positives[:0]
    else:
        kernel, indices, bias = kernel[:0], indices[:0], bias[:0]
    value, *gradients = run(x, kernel, indices, bias, positives, loss)
    assert np.isnan(value)
    assert [g.shape for g in gradients] == [x.shape, kernel.shape, bias.shape]
    assert not any(np.any(g) for g in gradients)


@LOSS
def test_no_input_features(loss):
    problem = make_problem(5, 1, 6, 3)
    problem = problem._replace(x=problem.x[:, :0])
    assert_matches_brute_force(run(*problem, loss), problem, loss)


@LOSS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_results_repeat_bit_for_bit(instruction_set, dtype, loss):
    problem = make_problem(100, 60, 3000, 20, dtype=dtype)

    def results():
        value, d_x, *others = run(*problem, loss)
        promised = [value, *others] + ([d_x] if jax.default_backend() == "cpu" else [])
        return [np.asarray(a).tobytes() for a in promised]

    first = results()
    for _ in range(5):
        assert results() == first


def test_logits_take_no_memory():
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
    if jax.default_backend() == "cpu":  # so the measurement sees them; a GPU's compiler may fuse them away
        assert temporary_bytes(fan_in_loss_reference) > batch * labels * 4


# ---- transformations ----

PROBLEM = make_problem(7, 12, 10, 4)


def assert_all_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_scale_with_the_cotangent(dtype):
    problem = make_problem(7, 12, 10, 4, dtype=dtype)
    once = jax.grad(lambda x: fan_in_loss(x, *problem[1:]))(problem.x)
    thrice = jax.grad(lambda x: 3 * fan_in_loss(x, *problem[1:]))(problem.x)
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    once = 3 * once.astype(jnp.float32)
    # On a GPU both are sums that are taken in any order.
    reordered = 0 if jax.default_backend() == "cpu" else tolerance * float(jnp.abs(once).max())
    np.testing.assert_allclose(thrice.astype(jnp.float32), once, rtol=tolerance, atol=reordered)


@pytest.mark.parametrize(
    "axes", [(0, None, None, None, None), (None, 0, None, 0, None), (0, 0, 0, 0, 0), (1, 2, 1, 1, 2)], ids=str
)
def test_vmap_is_a_loop(axes):
    values = zip(*(make_problem(7, 12, 10, 4, seed=seed) for seed in range(3)), strict=True)
    arguments = [
        first if axis is None else np.stack(each, axis)
        for first, each, axis in zip(PROBLEM, values, axes, strict=True)
    ]
    actual = jax.vmap(lambda *a: run(*a, "squared_hinge"), axes)(*arguments)
    each = [
        run(
            *(a if axis is None else a.take(i, axis) for a, axis in zip(arguments, axes, strict=True)),
            "squared_hinge",
        )
        for i in range(3)
    ]
    assert_all_close(actual, jax.tree.map(lambda *a: jnp.stack(a), *each))


@LOSS
def test_checkpoint_changes_nothing(loss):
    function = functools.partial(fan_in_loss, loss=loss)
    gradients = jax.jit(jax.value_and_grad(jax.checkpoint(function), (0, 1, 3)))(*PROBLEM)
    assert_all_close(list(gradients), list(jax.value_and_grad(function, (0, 1, 3))(*PROBLEM)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_eval_shape(dtype):
    problem = make_problem(7, 12, 10, 4, dtype=dtype)
    value, *gradients = jax.eval_shape(functools.partial(run, loss="bce"), *problem)
    assert (value.shape, value.dtype) == ((), jnp.float32)
    for gradient, argument in zip(gradients, (problem.x, problem.kernel, problem.bias), strict=True):
        assert (gradient.shape, gradient.dtype) == (argument.shape, dtype)


@pytest.mark.usefixtures("x64")
def test_export_round_trip():
    pytest.importorskip("flatbuffers", reason="jax needs it to serialize")
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in PROBLEM]
    shapes[0] = jax.ShapeDtypeStruct((batch, 12), jnp.float32)
    shapes[4] = jax.ShapeDtypeStruct((batch, 4), jnp.int32)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in HANDLERS]
    function = jax.jit(lambda *arguments: run(*arguments, "squared_hinge"))
    saved = jax.export.export(function, disabled_checks=allowed)(*shapes).serialize()
    loaded = jax.export.deserialize(saved)
    for batch_size in (1, 33):
        problem = make_problem(batch_size, 12, 10, 4)
        assert_matches_brute_force(loaded.call(*problem), problem, "squared_hinge")


def test_other_devices():
    device = jax.devices()[-1]
    results = run(*jax.device_put(PROBLEM, device), "squared_hinge")
    assert all(result.devices() == {device} for result in results)
    assert_matches_brute_force(results, PROBLEM, "squared_hinge")


@LOSS
def test_a_batch_over_devices(loss):
    mesh = jax.make_mesh((len(jax.devices()),), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    problem, split, whole = make_problem(8, 12, 10, 4), jax.P("i"), jax.P()

    def mean_loss(x, kernel, indices, bias, positives):
        in_specs = (split, whole, whole, whole, split)

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=whole)
        def of_shards(*arguments):
            return jax.lax.pmean(fan_in_loss(*arguments, loss=loss), "i")

        return of_shards(x, kernel, indices, bias, positives)

    value, gradients = jax.jit(jax.value_and_grad(mean_loss, (0, 1, 3)))(*problem)
    assert_matches_brute_force([value, *gradients], problem, loss)


def test_differentiable_once_only():
    with pytest.raises(ValueError, match="fan_in_loss has first derivatives alone"):
        jax.hessian(lambda x: fan_in_loss(x, *PROBLEM[1:]))(PROBLEM.x)


# ---- bad arguments ----

GOOD = PROBLEM._asdict()
BAD = {
    "x of integers": (
        {"x": np.zeros((7, 12), np.int32)},
        TypeError,
        "x must have dtype float32 or bfloat16, got int32",
    ),
    "x of one point": (
        {"x": np.zeros(12, np.float32)},
        ValueError,
        "x must have at least 2 dimension(s), got shape [12]",
    ),
    "x of three dimensions": (
        {"x": np.zeros((1, 7, 12), np.float32)},
        ValueError,
        "x must have shape [B, D], got [1, 7, 12]",
    ),
    "kernel of another dtype than x": (
        {"kernel": jnp.zeros((10, 4), jnp.bfloat16)},
        TypeError,
        "kernel must have dtype float32, got bfloat16",
    ),
    "kernel transposed": (
        {"kernel": np.zeros((4, 10), np.float32)},
        ValueError,
        "kernel must have shape [10, 4] (that of indices), got [4, 10]",
    ),
    "indices of floats": (
        {"indices": np.zeros((10, 4), np.float32)},
        TypeError,
        "indices must have dtype uint16 or int32, got float32",
    ),
    "bias empty": (
        {"bias": np.zeros(0, np.float32)},
        ValueError,
        "bias must have shape [10] (one per row of indices), got [0]",
    ),
    "positives a dense matrix of floats": (
        {"positives": np.zeros((7, 10), np.float32)},
        TypeError,
        "positives must have dtype int32, got float32",
    ),
    "positives of one point": (
        {"positives": np.zeros(7, np.int32)},
        ValueError,
        "positives must have shape [7, P] (one row per row of x), got [7]",
    ),
    "positives of fewer points": (
        {"positives": np.zeros((6, 2), np.int32)},
        ValueError,
        "positives must have shape [7, P] (one row per row of x), got [6, 2]",
    ),
    "an unknown loss": ({"loss": "hinge"}, ValueError, "loss must be one of squared_hinge, bce, got 'hinge'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error) as raised:
        fan_in_loss(**GOOD | changes)
    assert str(raised.value) == message


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
def test_handler_checks_arguments_itself(changes, loss, message):
    # Not every call comes through Python's checks: an exported function carries only the handler's name.
    _native.register()
    call = jax.ffi.ffi_call("xla_ops.fan_in_loss.value", jax.ShapeDtypeStruct((), jnp.float32))
    x, *others = (GOOD | changes).values()
    no_sparse = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    attributes = {"num_columns": np.int64(0), "loss": np.int64(loss), "num_labels": np.int64(10)}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(x, *no_sparse, *others, **attributes))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cut", [1, 64, 70, 129])
def test_losses_of_parts_of_the_labels_add_up(loss, cut):
    problem = make_problem(9, 12, 130, 4)
    whole = jax.value_and_grad(fan_in_loss, argnums=(0, 1, 3))
    value, (d_x, d_kernel, d_bias) = whole(*problem, loss=loss)
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        layer = (problem.kernel[part], problem.indices[part], problem.bias[part])
        positives = problem.positives - part.start  # those of other parts are out of range
        parts.append(whole(problem.x, *layer, positives, loss=loss, num_labels=130))
    np.testing.assert_allclose(sum(p[0] for p in parts), value, rtol=1e-6)
    np.testing.assert_allclose(sum(p[1][0] for p in parts), d_x, rtol=1e-4, atol=1e-7)
    for i, gradient in ((1, d_kernel), (2, d_bias)):
        together = np.concatenate([p[1][i] for p in parts])
        np.testing.assert_allclose(together, gradient, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(
        fan_in_loss_reference(*problem, loss=loss, num_labels=260), value / 2, rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"num_labels must be in 130..\d+ \(at least L\), got 129"):
        fan_in_loss(*problem, num_labels=129)
