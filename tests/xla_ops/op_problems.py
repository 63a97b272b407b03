"""Random problems, brute-force references and checks for the tests of the ops."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from xla_ops import SparseInputs, fan_in_loss, fan_in_matmul, fan_in_top_k

LOSSES = ("squared_hinge", "bce")
LOSS = pytest.mark.parametrize("loss", LOSSES)
DTYPE = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
# Options of `make_problem` besides sizes.
OPTIONS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([jnp.float32, jnp.bfloat16]),
        "index_dtype": st.sampled_from([np.uint16, np.int32]),
        "with_bias": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    }
)


class Problem(NamedTuple):
    """A batch, a fixed fan-in layer, and a cotangent `dy` of its logits, or None.

    The first four arrays are the arguments of `fan_in_matmul`, the first five the arguments of `fan_in_loss`.
    """

    x: np.ndarray
    kernel: np.ndarray
    indices: np.ndarray
    bias: np.ndarray | None
    positives: np.ndarray
    dy: np.ndarray | None = None


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
    integer_values=False,
    seed=0,
):
    """Return a random problem; some indices and positives are repeated, and some are out of range.

    With `integer_values`, values are small integers, so that sums are exact in any order.
    """
    rng = np.random.default_rng(seed)

    def values(*shape):
        return (rng.integers(-3, 4, shape) if integer_values else rng.normal(size=shape)).astype(dtype)

    indices = rng.integers(0, max(1, in_features), (labels, fan_in))
    outside = [i for i in (in_features, in_features + 1) if i <= np.iinfo(index_dtype).max]
    outside += [np.iinfo(index_dtype).max] if in_features <= np.iinfo(index_dtype).max else []
    outside += [-1, -in_features, np.iinfo(index_dtype).min] if index_dtype == np.int32 else []
    if outside:
        indices = np.where(rng.random(indices.shape) < 0.1, rng.choice(outside, indices.shape), indices)
    repeated = rng.random(labels) < 0.3
    indices[repeated, -1] = indices[repeated, 0]

    positives = rng.integers(0, max(1, labels), (batch, num_positives))
    positives[rng.random(positives.shape) < 0.2] = -1
    for outside in (labels, np.iinfo(np.int32).max, np.iinfo(np.int32).min):
        positives[rng.random(positives.shape) < 0.05] = outside
    repeated = rng.random(batch) < 0.3
    positives[repeated, -1:] = positives[repeated, :1]
    return Problem(
        x=values(batch, in_features),
        kernel=values(labels, fan_in),
        indices=indices.astype(index_dtype),
        bias=values(labels) if with_bias else None,
        positives=positives.astype(np.int32),
        dy=values(batch, labels),
    )


def sparsify(problem, dense, *, density=0.1, entries=None, seed=0):
    """Replace the inputs of a problem from number `dense` on by sparse inputs.

    Args:
      problem: a problem with x [B, D + C].
      dense: D.
      density: fraction of the sparse inputs that is not set to 0.
      entries: number of entries including padding; by default, 6 entries are padding.
      seed: seed of the random numbers.

    Returns:
      The problem with x [B, D + C], where most of the last C inputs are 0; the same problem with x [B, D];
      and the last C inputs as SparseInputs. The entries are in random order. Some inputs are split into
      several entries, whose sums are exact in float32 and bfloat16.
    """
    rng = np.random.default_rng(seed)
    x = problem.x.copy()
    (batch, width), dtype = x.shape, x.dtype
    columns = width - dense
    absent = rng.random((batch, columns)) >= density
    absent[:, rng.random(columns) < 0.3] = True  # some columns have no entry at all
    x[:, dense:][absent] = 0
    found = np.argwhere(~absent)
    values = x[:, dense:][~absent].astype(np.float32)
    terms = np.zeros((len(values), 3), np.float32)
    terms[:, 0] = values
    halved, quartered = rng.random((2, len(values))) < 0.2
    terms[halved] = np.stack([values / 2, values / 2, 0 * values], axis=1)[halved]
    terms[quartered] = np.stack([values / 4, values / 4, values / 2], axis=1)[quartered]
    kept = (terms != 0) | (np.arange(3) == 0)
    rows, cols = (np.repeat(found[:, i], 3).reshape(-1, 3)[kept] for i in (0, 1))
    limits = np.iinfo(np.int32)
    outside = [(-1, 0), (batch, 0), (0, -1), (0, columns), (limits.min, limits.max), (limits.max, limits.min)]
    padding = np.resize(outside, (6 if entries is None else entries - len(rows), 2))
    order = rng.permutation(len(rows) + len(padding))
    sparse = SparseInputs(
        rows=np.concatenate([rows, padding[:, 0]])[order].astype(np.int32),
        columns=np.concatenate([cols, padding[:, 1]])[order].astype(np.int32),
        values=np.concatenate([terms[kept], np.full(len(padding), np.nan)])[order].astype(dtype),
        num_columns=columns,
    )
    return problem._replace(x=x), problem._replace(x=x[:, :dense]), sparse


def assert_all_close(actual, expected, rtol=1e-5, atol=1e-6):
    """Compare trees of arrays of any dtypes."""

    def close(a, e):
        assert a.shape == e.shape
        a, e = (np.asarray(v).astype(np.float64) for v in (a, e))
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)

    jax.tree.map(close, actual, expected)


def assert_bitwise_equal(results, expected):
    """Compare bit for bit, except for d_x (result 1) on a GPU, which is summed in no fixed order."""
    for number, (a, b) in enumerate(zip(results, expected, strict=True)):
        if number == 1 and jax.default_backend() != "cpu":
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
        else:
            np.testing.assert_array_equal(a, b)


# ---- fan_in_matmul ----


def matmul_results(problem, sparse=None, *, matmul=fan_in_matmul):
    """Return (y, d_x, d_kernel, d_bias) of a matmul for the cotangent dy."""
    x, kernel, indices, bias, _, dy = problem

    def function(x, kernel, bias):
        return matmul(x, kernel, indices, bias, sparse=sparse)

    y, vjp = jax.vjp(function, x, kernel, bias)
    return y, *vjp(dy)


run_matmul = jax.jit(matmul_results)


def brute_force_matmul(problem):
    """Return [y, d_x, d_kernel, d_bias] in float64, computed by a loop over the fan-in."""
    x, kernel, indices, bias, _, dy = problem
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


def assert_matmul(results, problem, dense=None):
    """Compare (y, d_x, d_kernel, d_bias) with brute force.

    The tolerance is the rounding error of a float32 sum in any order, and of one rounding to the result's
    dtype. Summing n products has an error of at most n * eps / 2 times the sum of their magnitudes (to first
    order), and so does rounding the products; n * eps covers both.

    Args:
      results: the four results; None for d_bias if there is no bias.
      problem: the problem, with all inputs in x.
      dense: d_x is the gradient of the first `dense` inputs; by default of all.
    """

    def apply(function):
        bias = None if problem.bias is None else function(problem.bias)
        arrays = {n: function(getattr(problem, n)) for n in ("x", "kernel", "dy")}
        return brute_force_matmul(problem._replace(bias=bias, **arrays))

    magnitudes, terms = apply(np.abs), apply(np.ones_like)
    names = ("y", "d_x", "d_kernel", "d_bias")
    for name, result, expected, magnitude, n in zip(
        names, results, brute_force_matmul(problem), magnitudes, terms, strict=True
    ):
        if expected is None:
            assert result is None
            continue
        if name == "d_x":
            expected, magnitude, n = (a[:, :dense] for a in (expected, magnitude, n))
        assert result.dtype == problem.x.dtype, name
        assert result.shape == expected.shape, name
        summing = n * jnp.finfo(jnp.float32).eps * magnitude
        rounding = jnp.finfo(result.dtype).eps / 2 * (np.abs(expected) + summing)
        error = np.abs(np.asarray(result, np.float64) - expected)
        assert np.all(error <= summing + rounding), f"{name} is off by up to {error.max()}"


# ---- fan_in_loss ----


def loss_results(problem, loss="squared_hinge", sparse=None, *, function=fan_in_loss):
    """Return [loss, d_x, d_kernel, d_bias]."""
    x, kernel, indices, bias, positives, _ = problem

    def compute_loss(x, kernel, bias):
        return function(x, kernel, indices, bias, positives, loss=loss, sparse=sparse)

    value, gradients = jax.value_and_grad(compute_loss, (0, 1, 2))(x, kernel, bias)
    return [value, *gradients]


run_loss = jax.jit(loss_results, static_argnames=("loss", "function"))


def dense_weights(kernel, indices, in_features):
    """Return the kernel as a dense matrix, float64 [L, D]."""
    dense = np.zeros((kernel.shape[0], in_features))
    for label, row in enumerate(indices):
        for f, i in enumerate(row):
            if 0 <= i < in_features:
                dense[label, i] += kernel[label, f]
    return dense


def is_positive(positives, labels):
    """Return the positives as a dense matrix, bool [B, L]."""
    target = np.zeros((len(positives), labels), bool)
    for b, row in enumerate(positives):
        for label in row:
            if 0 <= label < labels:
                target[b, label] = True
    return target


def value_and_slope(loss, margin):
    """Return the loss and its derivative with respect to the margin, in float64.

    The margin is the logit of a positive, and minus the logit of a negative.
    """
    if loss == "squared_hinge":
        slack = np.maximum(0, 1 - margin)
        return slack**2, -2 * slack
    # log(1 + e^-margin), in a form that does not overflow
    value = np.maximum(0, -margin) + np.log1p(np.exp(-np.abs(margin)))
    return value, -np.exp(-np.maximum(0, margin)) / (1 + np.exp(-np.abs(margin)))


def brute_force_loss(problem, loss):
    """Return [loss, d_x, d_kernel, d_bias] in float64, and bounds on the errors of float32 sums for each."""
    x, kernel, indices, bias, positives, _ = problem
    eps = float(jnp.finfo(jnp.float32).eps)
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    (batch, in_features), (labels, fan_in) = x.shape, kernel.shape
    bias = np.zeros(labels) if bias is None else bias.astype(np.float64)
    weights, magnitudes = (dense_weights(k, indices, in_features) for k in (kernel, np.abs(kernel)))
    sign = np.where(is_positive(positives, labels), 1, -1)
    value, slope = value_and_slope(loss, sign * (x @ weights.T + bias[None]))
    count = batch * labels or np.nan  # the mean of no values is NaN
    slope = sign * slope / count

    def gradients(slope, x, weights):
        d_weights = np.pad(slope.T @ x, ((0, 0), (0, 1)))  # the last column is for indices out of range
        at = np.where((indices >= 0) & (indices < in_features), indices, in_features).astype(np.int64)
        d_kernel = np.take_along_axis(d_weights, at, axis=1)
        return slope @ weights, d_kernel, slope.sum(axis=0)

    # Bounds on rounding errors: of logits, then of slopes (Lipschitz with constant 2), then of sums.
    logit_error = (fan_in + 2) * eps * (np.abs(x) @ magnitudes.T + np.abs(bias)[None])
    slope_error = 2 * logit_error / count + 8 * eps * np.abs(slope)
    rounded = gradients(slope_error, np.abs(x), magnitudes)
    summed = gradients(eps * np.abs(slope), np.abs(x), magnitudes)
    errors = [r + n * s for r, s, n in zip(rounded, summed, (labels, batch, batch), strict=True)]
    # The kernels subtract the loss of a positive as a negative, and add its loss: both are rounded.
    both = value + value_and_slope(loss, -sign * (x @ weights.T + bias[None]))[0]
    value_error = np.sum(np.abs(slope) * logit_error) + np.sum(logit_error**2 + 64 * eps * both) / count
    return [np.sum(value) / count, *gradients(slope, x, weights)], [value_error, *errors]


def assert_loss(results, problem, loss, dense=None):
    """Compare [loss, d_x, d_kernel, d_bias] with brute force; d_x is for the first `dense` inputs, or all."""
    expected, errors = brute_force_loss(problem, loss)
    if problem.bias is None:
        assert results[-1] is None
        results, expected, errors = results[:-1], expected[:-1], errors[:-1]
    names = ("value", "d_x", "d_kernel", "d_bias")[: len(results)]
    for name, result, exact, error in zip(names, results, expected, errors, strict=True):
        if name == "d_x":
            exact, error = (a[:, :dense] for a in (exact, error))
        assert result.dtype == (jnp.float32 if name == "value" else problem.x.dtype), name
        assert result.shape == exact.shape, name
        allowed = error + jnp.finfo(result.dtype).eps / 2 * (np.abs(exact) + error) + 1e-37
        off = np.abs(np.asarray(result, np.float64) - exact)
        assert np.all(off <= allowed), f"{name} is off by up to {off.max()}"


# ---- fan_in_top_k ----

run_top_k = jax.jit(fan_in_top_k, static_argnums=4)


def brute_force_top_k(problem, k):
    """Return (scores, labels) of shape [B, k] by loops and a stable sort."""
    logits = brute_force_matmul(problem)[0]
    labels = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(logits, labels, axis=1), labels


def assert_top_k(actual, expected):
    """Compare (scores, labels) exactly."""
    for result, exact, dtype in zip(actual, expected, (jnp.float32, jnp.int32), strict=True):
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, exact)


# ---- stochastic rounding ----


def philox(counter, key):
    """Return the four words of Philox4x32-10, implemented as in the paper (Salmon et al., 2011)."""
    c, k = [int(v) for v in counter], [int(v) for v in key]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def rounding_bits(positions, seed, step):
    """Return 16 random bits for each position, as `csrc/rounding.h` defines them."""
    bits = []
    for p in positions:
        counter = p // 128 * 16 + p % 16
        word = philox([counter & 0xFFFFFFFF, counter >> 32, step, 0], [seed, 0])[p % 128 // 32]
        bits.append(word >> 16 if p // 16 % 2 else word & 0xFFFF)
    return np.array(bits, np.uint32)


def make_exact_step(batch, in_features, labels, fan_in):
    """Return (x, kernel, indices, bias, positives) with small integers or halves, whose sums are exact."""
    rng = np.random.default_rng(1)
    return (
        rng.integers(-2, 3, (batch, in_features)).astype(np.float32),
        rng.integers(-4, 5, (labels, fan_in)).astype(np.float32) / 2,
        rng.integers(0, in_features, (labels, fan_in)).astype(np.int32),
        rng.integers(-2, 3, labels).astype(np.float32),
        rng.integers(0, labels, (batch, 2)).astype(np.int32),
    )


SGD_ROUNDING_SHAPES = [(3, 6, 21, 7), (2, 4, 9, 32), (4, 8, 150, 1), (2, 40, 300, 33), (4, 8, 128, 5)]


def check_sgd_rounding(shape, step):
    """Check the stochastic rounding of an SGD step.

    Args:
      shape: batch, in_features, labels, fan_in.
      step: function of (x, kernel, indices, bias, positives, rate, seed, step) that returns (kernel, bias).
    """
    batch, _, labels, _ = shape
    x, kernel, indices, bias, positives = make_exact_step(*shape)
    sign = np.full((batch, labels), -1.0)
    sign[np.arange(batch)[:, None], positives] = 1
    logits = np.einsum("blf,lf->bl", x[:, indices], kernel) + bias
    slope = -2 * sign * np.maximum(0, 1 - sign * logits)
    d_kernel, d_bias = np.einsum("bl,blf->lf", slope, x[:, indices]), slope.sum(axis=0)
    assert np.any(d_kernel == 0)
    assert np.any(d_kernel != 0)

    rate = 2.0**-10
    updated = np.concatenate([(kernel - rate * d_kernel).ravel(), bias - rate * d_bias]).astype(np.float32)
    sums = updated.view(np.uint32) + rounding_bits(range(updated.size), seed=5, step=9)
    expected = (sums & 0xFFFF0000).view(np.float32)

    x, kernel, bias = (a.astype(jnp.bfloat16) for a in (x, kernel, bias))
    scale = batch * labels  # the loss is a mean; only division by powers of 2 is exact
    new_kernel, new_bias = step(x, kernel, indices, bias, positives, np.float32(rate * scale), 5, 9)
    actual = np.concatenate([np.asarray(new_kernel, np.float32).ravel(), np.asarray(new_bias, np.float32)])
    if scale & (scale - 1) == 0:
        np.testing.assert_array_equal(actual, expected)
    else:  # the rounding of the scale can change a few carries
        assert np.mean(actual != expected) < 0.01
    assert np.any(actual != np.asarray(jnp.asarray(updated, jnp.bfloat16), np.float32))


def check_dense_rounding(shape, step):
    """Check the rounding of bfloat16 moments in a dense Adam step: mu to nearest, nu stochastically.

    All values are integers or quarters, so that sums are exact in any order.

    Args:
      shape: batch, rows, columns.
      step: function of (x, dy, kernel, mu, nu, b1, b2, seed, number) that returns (kernel, mu, nu).
    """
    batch, rows, columns = shape
    rng = np.random.default_rng(3)
    x, dy = (rng.integers(-5, 6, (batch, n)).astype(np.float32) for n in (rows, columns))
    kernel = rng.integers(-5, 6, (rows, columns)).astype(np.float32)
    mu, nu = rng.integers(-255, 256, kernel.shape), rng.integers(0, 256, kernel.shape)
    moments = [m.astype(jnp.bfloat16) for m in (mu, nu)]
    _, new_mu, new_nu = step(x, dy, kernel, *moments, 0.75, 0.75, 2**32 - 5, 9)

    gradient = x.T @ dy
    exact_mu = (0.75 * mu + 0.25 * gradient).astype(np.float32)
    exact_nu = (0.75 * nu + 0.25 * gradient**2).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(new_mu), exact_mu.astype(jnp.bfloat16))
    row_length = -(-columns // 128) * 128  # each row of the kernel starts at a multiple of 128
    positions = (np.arange(rows)[:, None] * row_length + np.arange(columns)).ravel()
    sample = rng.permutation(nu.size)[:4000]
    sums = exact_nu.ravel()[sample].view(np.uint32) + rounding_bits(positions[sample], seed=2**32 - 5, step=9)
    actual = np.asarray(new_nu, np.float32).ravel()[sample]
    np.testing.assert_array_equal(actual, (sums & 0xFFFF0000).view(np.float32))
