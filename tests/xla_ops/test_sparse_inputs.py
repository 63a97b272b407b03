"""Every op of a fixed fan-in layer with sparse inputs, against brute force on all inputs in one array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_fan_in_loss as loss_test
import test_fan_in_matmul as matmul
import test_fan_in_top_k as top_k_test
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

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

LOSSES = ("squared_hinge", "bce")
LOSS = pytest.mark.parametrize("loss", LOSSES)
DTYPE = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


def sparsify(problem, dense, *, density=0.1, entries=None, seed=0):
    """Makes the inputs of a problem sparse from number `dense` on.

    Args:
      problem: with x [B, D + C], which is changed: most of it is set to 0 from there on.
      dense: D.
      density: the part of it that is not set to 0.
      entries: how many there are to be, to have some padding; by default some are added.

    Returns:
      The problem, the same with x [B, D], and the SparseInputs that go with this. Entries are in no order;
      some inputs are given in several, of which float32 and bfloat16 hold every sum.
    """
    rng = np.random.default_rng(seed)
    x = problem.x.copy()
    (batch, width), dtype = x.shape, x.dtype
    columns = width - dense
    absent = rng.random((batch, columns)) >= density
    absent[:, rng.random(columns) < 0.3] = True  # some have no entry at all
    x[:, dense:][absent] = 0
    found = np.argwhere(~absent)
    values = x[:, dense:][~absent].astype(np.float32)
    parts = np.zeros((len(values), 3), np.float32)
    parts[:, 0] = values
    halved, quartered = rng.random((2, len(values))) < 0.2
    parts[halved] = np.stack([values / 2, values / 2, 0 * values], axis=1)[halved]
    parts[quartered] = np.stack([values / 4, values / 4, values / 2], axis=1)[quartered]
    kept = (parts != 0) | (np.arange(3) == 0)
    rows, cols = (np.repeat(found[:, i], 3).reshape(-1, 3)[kept] for i in (0, 1))
    limits = np.iinfo(np.int32)
    outside = [(-1, 0), (batch, 0), (0, -1), (0, columns), (limits.min, limits.max), (limits.max, limits.min)]
    padding = np.resize(outside, (6 if entries is None else entries - len(rows), 2))
    order = rng.permutation(len(rows) + len(padding))
    sparse = SparseInputs(
        rows=np.concatenate([rows, padding[:, 0]])[order].astype(np.int32),
        columns=np.concatenate([cols, padding[:, 1]])[order].astype(np.int32),
        values=np.concatenate([parts[kept], np.full(len(padding), np.nan)])[order].astype(dtype),
        num_columns=columns,
    )
    return problem._replace(x=x), problem._replace(x=x[:, :dense]), sparse


def with_exact_rest(d_x, expected, dense):
    """d_x [B, D] with what brute force has for the sparse inputs, whose gradient no op returns."""
    assert d_x.shape == (expected.shape[0], dense)
    return np.concatenate([np.asarray(d_x), expected[:, dense:].astype(d_x.dtype)], axis=1)


SIZES = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130]),
        "labels": st.sampled_from([1, 127, 128, 129, 300]),
        "fan_in": st.sampled_from([1, 3, 16, 17, 65]),
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
DENSE = st.sampled_from([0, 1, 16, 40])
COLUMNS = st.sampled_from([1, 31, 32, 33, 100, 1000])
DENSITY = st.sampled_from([0.0, 0.02, 0.3, 1.0])


# ---- against brute force ----


@jax.jit
def run_matmul(x, kernel, indices, bias, dy, sparse):
    """(y, d_x, d_kernel, d_bias)."""

    def function(x, kernel, bias):
        return fan_in_matmul(x, kernel, indices, bias, sparse=sparse)

    y, vjp = jax.vjp(function, x, kernel, bias)
    return y, *vjp(dy)


def assert_matmul(results, problem, dense):
    y, d_x, *others = results
    d_x = with_exact_rest(d_x, matmul.brute_force(*problem)[1], dense)
    matmul.assert_matches_brute_force([y, d_x, *others], problem)


@settings(max_examples=25)
@given(SIZES, KINDS, DENSE, COLUMNS, DENSITY)
def test_matmul(instruction_set, sizes, kind, dense, columns, density):
    problem = matmul.make_problem(in_features=dense + columns, **sizes, **kind)
    full, problem, sparse = sparsify(problem, dense, density=density, seed=kind["seed"])
    assert_matmul(run_matmul(*problem, sparse), full, dense)


@jax.jit(static_argnames="loss")
def run_loss(problem, sparse, loss):
    """[loss, d_x, d_kernel, d_bias]."""
    x, kernel, indices, bias, positives = problem

    def function(x, kernel, bias):
        return fan_in_loss(x, kernel, indices, bias, positives, loss=loss, sparse=sparse)

    value, gradients = jax.value_and_grad(function, (0, 1, 2))(x, kernel, bias)
    return [value, *gradients]


loss_alone = jax.jit(fan_in_loss, static_argnames="loss")


@settings(max_examples=25)
@given(SIZES, KINDS, DENSE, COLUMNS, DENSITY, st.sampled_from(LOSSES))
def test_loss(instruction_set, sizes, kind, dense, columns, density, loss):
    problem = loss_test.make_problem(in_features=dense + columns, **sizes, **kind)
    full, problem, sparse = sparsify(problem, dense, density=density, seed=kind["seed"])
    value, d_x, *others = run_loss(problem, sparse, loss)
    d_x = with_exact_rest(d_x, loss_test.brute_force(full, loss)[0][1], dense)
    loss_test.assert_matches_brute_force([value, d_x, *others], full, loss)
    np.testing.assert_allclose(loss_alone(*problem, loss=loss, sparse=sparse), value, rtol=1e-6)


def make_whole(**sizes):
    """A problem of small whole numbers, whose halves and quarters add up exactly in any order."""
    return matmul.Problem(*top_k_test.make_problem(**sizes), None)


top_k = jax.jit(fan_in_top_k, static_argnums=4)


@settings(max_examples=15)
@given(SIZES, KINDS, DENSE, COLUMNS, DENSITY, st.sampled_from([0.0, 0.1, 1.0]))
def test_top_k(instruction_set, sizes, kind, dense, columns, density, part):
    problem = make_whole(in_features=dense + columns, **sizes, **kind)
    full, problem, sparse = sparsify(problem, dense, density=density, seed=kind["seed"])
    k = int(part * sizes["labels"])
    top_k_test.assert_same(top_k(*problem[:4], k, sparse=sparse), top_k_test.brute_force(*full[:4], k))


@DTYPE
def test_several_runs_of_labels(instruction_set, dtype):
    # So many connections that a thread lists those of its labels in more than one go.
    sizes = {"batch": 70, "in_features": 60, "labels": 1000, "fan_in": 700}
    full, problem, sparse = sparsify(loss_test.make_problem(**sizes, dtype=dtype), 20)
    value, d_x, *others = run_loss(problem, sparse, "squared_hinge")
    d_x = with_exact_rest(d_x, loss_test.brute_force(full, "squared_hinge")[0][1], 20)
    loss_test.assert_matches_brute_force([value, d_x, *others], full, "squared_hinge")

    full, problem, sparse = sparsify(make_whole(**sizes, dtype=dtype), 20)
    top_k_test.assert_same(top_k(*problem[:4], 9, sparse=sparse), top_k_test.brute_force(*full[:4], 9))


@pytest.mark.usefixtures("x64")
@DTYPE
@pytest.mark.parametrize("dense", [0, 9])
def test_references(dtype, dense):
    full, problem, sparse = sparsify(matmul.make_problem(33, 60, 70, 9, dtype=dtype), dense)
    y = fan_in_matmul_reference(*problem[:4], sparse=sparse)
    matmul.assert_matches_brute_force([y, *matmul.run(*full)[1:]], full)

    full, problem, sparse = sparsify(make_whole(batch=33, in_features=60, labels=70, fan_in=9), dense)
    expected = top_k_test.brute_force(*full[:4], 7)
    top_k_test.assert_same(fan_in_top_k_reference(*problem[:4], 7, sparse=sparse), expected)

    full, problem, sparse = sparsify(loss_test.make_problem(33, 60, 70, 9, dtype=dtype), dense)
    value = fan_in_loss_reference(*problem, sparse=sparse)
    exact = loss_test.brute_force(full, "squared_hinge")[0][0]
    np.testing.assert_allclose(value, exact, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_densify():
    full, _, sparse = sparsify(matmul.make_problem(33, 60, 1, 1), 9, entries=1000)
    assert sparse.rows.size == 1000
    np.testing.assert_array_equal(sparse.densify(33), full.x[:, 9:])


@DTYPE
def test_several_entries_of_an_input_are_added(instruction_set, dtype):
    entries = [(0, 2, 1.5), (1, 2, 4.0), (0, 2, -0.5), (0, 0, 8.0), (0, 2, 2.0), (1, 2, -4.0)]
    rows, columns, values = (np.array(a) for a in zip(*entries, strict=True))
    sparse = SparseInputs(rows.astype(np.int32), columns.astype(np.int32), values.astype(dtype), 3)
    kernel, indices = np.ones((3, 1), dtype), np.array([[1], [2], [3]], np.int32)
    y = fan_in_matmul(np.zeros((2, 1), dtype), kernel, indices, sparse=sparse)
    np.testing.assert_array_equal(y.astype(jnp.float32), [[8, 0, 3], [0, 0, 0]])


@DTYPE
def test_absent_inputs_are_not_read(instruction_set, dtype):
    # Their weights are NaN, which would show in the result if these were multiplied, be it by 0.
    full, problem, sparse = sparsify(matmul.make_problem(70, 140, 300, 17, dtype=dtype), 40, density=0.02)
    absent = np.append(~np.any(full.x, axis=0), True)
    absent[:40] = False
    inside = (problem.indices >= 0) & (problem.indices < 140)
    hidden = absent[np.where(inside, problem.indices, 140)] & inside
    assert 0 < np.mean(hidden) < 1
    problem = problem._replace(kernel=np.where(hidden, np.nan, problem.kernel).astype(dtype))
    results = run_matmul(*problem, sparse)
    assert_matmul(results, full._replace(kernel=np.where(hidden, 0, full.kernel).astype(dtype)), 40)
    assert not np.any(np.asarray(results[2])[hidden])


@pytest.mark.parametrize("count", [0, 1], ids=["none", "padding"])
def test_no_entries(instruction_set, count):
    problem = matmul.make_problem(5, 60, 70, 9)
    nothing = np.full(count, -1, np.int32)
    sparse = SparseInputs(nothing, nothing, np.full(count, np.nan, np.float32), 51)
    full = problem._replace(x=np.where(np.arange(60) < 9, problem.x, 0))
    assert_matmul(run_matmul(*problem._replace(x=problem.x[:, :9]), sparse), full, 9)


def test_no_columns():
    problem = matmul.make_problem(5, 60, 70, 9)
    padding = SparseInputs(np.zeros(3, np.int32), np.zeros(3, np.int32), np.full(3, np.nan, np.float32), 0)
    loss_test.assert_same(run_matmul(*problem, padding), matmul.run(*problem))


@pytest.mark.parametrize("empty", ["batch", "labels"])
def test_nothing(empty):
    _, problem, sparse = sparsify(matmul.make_problem(5, 60, 6, 4), 9)
    if empty == "batch":
        problem = problem._replace(x=problem.x[:0], dy=problem.dy[:0])
    else:
        problem = problem._replace(
            dy=problem.dy[:, :0], **{n: getattr(problem, n)[:0] for n in ("kernel", "indices", "bias")}
        )
    y, *gradients = run_matmul(*problem, sparse)
    assert y.shape == problem.dy.shape
    assert not any(np.any(g) for g in gradients)
    x, kernel, indices, bias, _ = problem
    value = fan_in_loss(x, kernel, indices, bias, np.zeros((len(x), 2), np.int32), sparse=sparse)
    assert np.isnan(value)
    assert fan_in_top_k(x, kernel, indices, bias, 0, sparse=sparse)[0].shape == (len(x), 0)


# ---- gradients, and steps ----


def test_gradients_of_matmul_match_finite_differences():
    _, (x, kernel, indices, bias, _), sparse = sparsify(matmul.make_problem(5, 40, 13, 4), 11, density=0.5)

    def function(x, kernel, bias):
        return fan_in_matmul(x, kernel, indices, bias, sparse=sparse)

    check_grads(function, (x, kernel, bias), order=1, modes=["rev"], eps=1e-2, rtol=1e-2)


@LOSS
def test_gradients_of_loss_match_finite_differences(loss):
    problem = loss_test.make_problem(5, 40, 13, 4)
    _, (x, kernel, indices, bias, positives), sparse = sparsify(problem, 11, density=0.5)

    def scaled(x, kernel, bias):
        return 100 * fan_in_loss(x, kernel, indices, bias, positives, loss=loss, sparse=sparse)

    check_grads(scaled, (x, kernel, bias), order=1, modes=["rev"], eps=1e-2, rtol=1e-2)


STEPS = pytest.mark.parametrize(
    ("shape", "dense", "loss"), [((5, 60, 33, 3), 0, "bce"), ((70, 200, 300, 17), 20, "squared_hinge")]
)


@STEPS
def test_adam_is_that_of_optax(instruction_set, shape, dense, loss):
    problem = loss_test.make_problem(*shape, with_bias=shape[0] != 5)
    _, problem, sparse = sparsify(problem, dense, density=0.2)
    x, kernel, indices, bias, positives = problem
    tx = optax.adam(0.1, 0.8, 0.99, eps=1e-7)
    params = jax.tree.map(jnp.asarray, (kernel, bias))
    opt_state, state = tx.init(params), adam_init(*params)
    step = jax.jit(functools.partial(fan_in_adam_step, loss=loss, b1=0.8, b2=0.99, epsilon=1e-7))
    for _ in range(2):
        replaced = problem._replace(kernel=params[0], bias=params[1])
        expected_value, expected_d_x, *grads = run_loss(replaced, sparse, loss)
        with jax.numpy_dtype_promotion("standard"):  # which Optax needs
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
def test_sgd(instruction_set, shape, dense, loss, dtype):
    problem = loss_test.make_problem(*shape, dtype=dtype)
    _, (x, kernel, indices, bias, positives), sparse = sparsify(problem, dense, density=0.2)
    rate = 0.1 * shape[0] * shape[2]
    expected_value, expected_d_x, *grads = run_loss(
        problem._replace(x=x, kernel=kernel, bias=bias), sparse, loss
    )
    step = jax.jit(functools.partial(fan_in_sgd_step, loss=loss))
    value, d_x, *actual = step(x, kernel, indices, bias, positives, rate, sparse=sparse)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    gap = float(jnp.finfo(dtype).eps)  # bfloat16: weights are rounded up or down
    np.testing.assert_allclose(wide(d_x), wide(expected_d_x), rtol=max(1e-4, gap), atol=1e-8)
    for new, old, grad in zip(actual, (kernel, bias), grads, strict=True):
        expected = wide(old) - rate * wide(grad)
        bound = 1e-4 + gap * (np.abs(expected) + np.abs(wide(grad)) * rate)
        np.testing.assert_array_less(np.abs(wide(new) - expected), bound)


def test_steps_with_64_bit_types():
    with jax.enable_x64(True):
        test_adam_is_that_of_optax(None, (5, 60, 33, 3), 0, "bce")
        test_sgd(None, (5, 60, 33, 3), 0, "bce", jnp.bfloat16)


# ---- transformations ----

FULL, PROBLEM, SPARSE = sparsify(matmul.make_problem(6, 40, 10, 4), 12, density=0.3)
LAYER = PROBLEM[1:4]
POSITIVES = np.array([[0], [3], [-1], [9], [2], [2]], np.int32)


def assert_all_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def every_op(x, kernel, indices, bias, sparse):
    """The results of all of them, with gradients."""
    y, vjp = jax.vjp(lambda x, kernel: fan_in_matmul(x, kernel, indices, bias, sparse=sparse), x, kernel)

    def loss(x, kernel):
        return fan_in_loss(x, kernel, indices, bias, POSITIVES, sparse=sparse)

    layer = (kernel, indices, bias, POSITIVES)
    *adam, _ = fan_in_adam_step(x, *layer, adam_init(kernel, bias), 0.1, sparse=sparse)
    return (
        (y, vjp(y)),
        jax.value_and_grad(loss, (0, 1))(x, kernel),
        fan_in_sgd_step(x, *layer, 0.1, sparse=sparse),
        adam,
        fan_in_top_k(x, kernel, indices, bias, 3, sparse=sparse),
    )


def test_jit_changes_nothing():
    arguments = (PROBLEM.x, *map(jnp.asarray, LAYER), SPARSE)
    assert_all_close(jax.jit(every_op)(*arguments), every_op(*arguments))


@pytest.mark.parametrize("axes", ["all", "x and entries", "x", "entries", "values", "kernel"])
def test_vmap_is_a_loop(axes):
    batched = {
        "all": ("x", "kernel", "indices", "bias", "rows", "columns", "values"),
        "x and entries": ("x", "rows", "columns", "values"),
        "entries": ("rows", "columns", "values"),
    }.get(axes, (axes,))
    each = []
    for seed in range(3):
        problem = matmul.make_problem(6, 40, 10, 4, seed=seed)
        _, problem, sparse = sparsify(problem, 12, density=0.3, entries=200, seed=seed)
        names = ("x", "kernel", "indices", "bias")
        each.append({n: getattr(problem, n) for n in names} | vars(sparse))
    columns = each[0].pop("num_columns")

    def call(arguments):
        entries = {n: arguments[n] for n in ("rows", "columns", "values")}
        operands = [jnp.asarray(arguments[n]) for n in ("x", "kernel", "indices", "bias")]
        sparse = SparseInputs(**entries, num_columns=columns)
        # All others are loops of XLA's whatever is batched.
        return every_op(*operands, sparse) if axes == "all" else fan_in_matmul(*operands, sparse=sparse)

    arguments = {n: np.stack([e[n] for e in each]) if n in batched else a for n, a in each[0].items()}
    in_axes = ({n: 0 if n in batched else None for n in arguments},)
    loop = [call({n: a[i] if n in batched else a for n, a in arguments.items()}) for i in range(3)]
    assert_all_close(jax.vmap(call, in_axes)(arguments), jax.tree.map(lambda *a: jnp.stack(a), *loop))


def test_leading_axes_are_examples_in_order():
    x = PROBLEM.x.reshape(2, 3, 12)
    y = fan_in_matmul(x, *LAYER, sparse=SPARSE)
    np.testing.assert_array_equal(y.reshape(6, 10), fan_in_matmul(PROBLEM.x, *LAYER, sparse=SPARSE))
    scores, labels = fan_in_top_k(x, *LAYER, 3, sparse=SPARSE)
    assert scores.shape == labels.shape == (2, 3, 3)


def test_checkpoint_changes_nothing():
    def function(x, kernel):
        y = fan_in_matmul(x, kernel, *LAYER[1:], sparse=SPARSE)
        return jnp.sum(jnp.sin(y)) + fan_in_loss(x, kernel, *LAYER[1:], POSITIVES, sparse=SPARSE)

    arguments = (PROBLEM.x, PROBLEM.kernel)
    actual = jax.grad(jax.checkpoint(function), (0, 1))(*arguments)
    assert_all_close(actual, jax.grad(function, (0, 1))(*arguments))


def test_eval_shape():
    shapes = jax.eval_shape(every_op, PROBLEM.x, *map(jnp.asarray, LAYER), SPARSE)
    results = every_op(PROBLEM.x, *map(jnp.asarray, LAYER), SPARSE)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), results
    )


def test_values_that_are_computed_where_nothing_is_differentiated():
    scaled = SparseInputs(SPARSE.rows, SPARSE.columns, jnp.asarray(SPARSE.values) * 2, SPARSE.num_columns)
    y = fan_in_matmul(PROBLEM.x, *LAYER, sparse=scaled)
    full = FULL._replace(x=np.where(np.arange(40) < 12, FULL.x, 2 * FULL.x))
    np.testing.assert_allclose(y, matmul.brute_force(*full)[0], rtol=1e-5, atol=1e-5)


# ---- errors ----


def calls(sparse, x=PROBLEM.x, indices=LAYER[1]):
    """A call of each op, by name."""
    kernel, _, bias = LAYER
    layer = (kernel, indices, bias)
    state = adam_init(jnp.asarray(kernel), jnp.asarray(bias))
    return {
        "matmul": lambda: fan_in_matmul(x, *layer, sparse=sparse),
        "loss": lambda: fan_in_loss(x, *layer, POSITIVES, sparse=sparse),
        "adam": lambda: fan_in_adam_step(x, *layer, POSITIVES, state, 0.1, sparse=sparse),
        "sgd": lambda: fan_in_sgd_step(x, *layer, POSITIVES, 0.1, sparse=sparse),
        "top k": lambda: fan_in_top_k(x, *layer, 3, sparse=sparse),
    }


GOOD = {"rows": np.zeros(3, np.int32), "columns": np.zeros(3, np.int32), "values": np.ones(3, np.float32)}
BAD = {
    "rows of unsigned integers": (
        {"rows": np.zeros(3, np.uint32)},
        TypeError,
        "sparse.rows must have dtype int32, got uint32",
    ),
    "columns of short integers": (
        {"columns": np.zeros(3, np.int16)},
        TypeError,
        "sparse.columns must have dtype int32, got int16",
    ),
    "values of integers": (
        {"values": np.ones(3, np.int32)},
        TypeError,
        "sparse.values must have dtype float32 or bfloat16, got int32",
    ),
    "values of another dtype than x": (
        {"values": jnp.ones(3, jnp.bfloat16)},
        TypeError,
        "sparse.values must have dtype float32, got bfloat16",
    ),
    "a scalar for values": (
        {"values": np.float32(1)},
        ValueError,
        "sparse.values must have at least 1 dimension(s), got shape []",
    ),
    "fewer rows": (
        {"rows": np.zeros(2, np.int32)},
        ValueError,
        "sparse.rows must have shape [3] (one per value), got [2]",
    ),
    "more columns": (
        {"columns": np.zeros(4, np.int32)},
        ValueError,
        "sparse.columns must have shape [3] (one per value), got [4]",
    ),
    "columns a matrix": (
        {"columns": np.zeros((3, 1), np.int32)},
        ValueError,
        "sparse.columns must have shape [3] (one per value), got [3, 1]",
    ),
    "values a matrix": (
        {"values": np.ones((1, 3), np.float32)},
        ValueError,
        "sparse.values must have shape [3] (a flat list), got [1, 3]",
    ),
    "fewer than no columns": (
        {"num_columns": -1},
        ValueError,
        "sparse.num_columns must be in 0..2147483635 (beside x, for int32 indices), got -1",
    ),
    "too many columns": (
        {"num_columns": 2**31 - 12},
        ValueError,
        "sparse.num_columns must be in 0..2147483635 (beside x, for int32 indices), got 2147483636",
    ),
}


@pytest.mark.parametrize("op", calls(None))
@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_sparse_inputs_are_named(op, changes, error, message):
    with pytest.raises(error) as raised:
        calls(SparseInputs(**{"num_columns": 28} | GOOD | changes))[op]()
    assert str(raised.value) == message


@pytest.mark.parametrize("op", calls(None))
def test_indices_too_narrow_for_all_inputs(op):
    indices = LAYER[1].astype(np.uint16)
    message = "indices must have dtype int32 where there are more than 65536 inputs, got uint16 for 65537"
    with pytest.raises(TypeError) as raised:
        calls(SparseInputs(**GOOD, num_columns=65_525), indices=indices)[op]()
    assert str(raised.value) == message
    calls(SparseInputs(**GOOD, num_columns=65_524), indices=indices)[op]()


@pytest.mark.parametrize("op", ["matmul", "loss"])
def test_values_have_no_gradient(op):
    def function(values, stop=lambda values: values):
        sparse = SparseInputs(SPARSE.rows, SPARSE.columns, stop(values), SPARSE.num_columns)
        return jnp.sum(calls(sparse)[op]())

    with pytest.raises(TypeError, match=r"sparse.values have no gradient: use jax.lax.stop_gradient"):
        jax.grad(function)(jnp.asarray(SPARSE.values))
    gradient = jax.grad(functools.partial(function, stop=jax.lax.stop_gradient))(jnp.asarray(SPARSE.values))
    assert not np.any(gradient)
