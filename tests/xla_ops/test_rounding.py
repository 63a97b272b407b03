"""Tests of `round_stochastically` against Philox and the kernels, bit for bit, and of its statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_problems import Problem, loss_results, make_exact_step, rounding_bits

from xla_ops import DenseAdamState, dense_adam_step, fan_in_sgd_step, round_stochastically

SEED, STEP = 2**32 - 5, 9


def bits_of(array) -> np.ndarray:
    """Return the bits of a bfloat16 array."""
    return np.asarray(array).view(np.uint16)


def expected_bits(x, positions):
    """Return the bits of x rounded to bfloat16 as `csrc/rounding.h` defines it, with SEED and STEP."""
    random = rounding_bits(np.ravel(positions).tolist(), SEED, STEP)
    return ((x.view(np.uint32) + random.reshape(x.shape)) >> 16).astype(np.uint16)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((300,), {}),
        ((300,), {"first": 77}),
        ((7, 150), {}),
        ((7, 150), {"row_length": 256}),
        ((2, 3, 50), {"first": 1000, "row_length": 51}),
        ((3, 1), {"first": 5, "row_length": 2**32 - 1}),
        ((5, 40), {"first": 2**32 - 60, "row_length": 40}),  # positions exceed 32 bits within a row
        ((5, 40), {"first": 2**32 - 60, "row_length": 2**31 + 5}),
        ((5, 40), {"first": 2**36 - 100}),  # Philox counters exceed 32 bits, too
        ((5, 40), {"first": 2**63 + 2**40 + 3, "row_length": 2**20}),
        ((0,), {}),
        ((3, 0), {}),
        ((0, 3), {"row_length": 4}),
    ],
)
def test_random_bits_depend_on_position(shape, options):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    first, row_length = options.get("first", 0), options.get("row_length", shape[-1])
    rows = x.size // max(1, shape[-1])
    positions = [first + r * row_length + n for r in range(rows) for n in range(shape[-1])]
    rounded = round_stochastically(x, SEED, STEP, **options)
    assert rounded.dtype == jnp.bfloat16
    assert rounded.shape == shape
    np.testing.assert_array_equal(bits_of(rounded), expected_bits(x, positions))


@pytest.mark.parametrize("shape", [(4, 8, 128, 5), (2, 40, 512, 33)])
def test_matches_rounding_of_sgd_step(shape):
    # With small integers and powers of 2, the update is exact in any order of summation.
    batch, _, labels, fan_in = shape
    x, kernel, indices, bias, positives = make_exact_step(*shape)
    rate = batch * labels * 2.0**-10
    _, _, d_kernel, d_bias = loss_results(Problem(x, kernel, indices, bias, positives))
    exact_kernel, exact_bias = kernel - np.float32(rate) * d_kernel, bias - np.float32(rate) * d_bias

    layer = (kernel.astype(jnp.bfloat16), indices, bias.astype(jnp.bfloat16))
    key = {"seed": jnp.uint32(SEED), "step": STEP}
    _, _, *actual = fan_in_sgd_step(x.astype(jnp.bfloat16), *layer, positives, rate, **key)
    rounded = jax.jit(round_stochastically)(exact_kernel, jnp.uint32(SEED), STEP)
    np.testing.assert_array_equal(bits_of(actual[0]), bits_of(rounded))
    rounded = round_stochastically(exact_bias, SEED, STEP, first=labels * fan_in)
    np.testing.assert_array_equal(bits_of(actual[1]), bits_of(rounded))
    assert np.any(np.asarray(actual[0], np.float32) != exact_kernel)


@pytest.mark.parametrize("shape", [(5, 7, 9), (3, 1, 1), (33, 130, 200), (2, 300, 3000), (8, 1, 1000)])
def test_matches_rounding_of_dense_adam_step(shape):
    batch, rows, columns = shape
    rng = np.random.default_rng(2)
    x, dy = (rng.integers(-5, 6, (batch, n)).astype(np.float32) for n in (rows, columns))
    nu = rng.integers(0, 256, (rows, columns)).astype(jnp.bfloat16)
    state = DenseAdamState(jnp.int32(STEP - 1), jnp.zeros_like(nu), jnp.asarray(nu))
    _, state = dense_adam_step(x, dy, np.zeros(nu.shape, np.float32), state, 0.1, b2=0.75, seed=SEED)
    exact = np.float32(0.75) * nu.astype(np.float32) + np.float32(0.25) * (x.T @ dy) ** 2
    rounded = round_stochastically(exact, SEED, STEP, row_length=-(-columns // 128) * 128)
    np.testing.assert_array_equal(bits_of(state.nu), bits_of(rounded))


@given(
    st.floats(-(2.0**99), 2.0**99, width=32),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**31 - 1),
)
def test_rounding_is_unbiased(value, seed, step):
    count = 4096
    below = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
    neighbours = np.uint32([below, below + 0x10000]).view(np.float32)
    probability = (int(np.float32(value).view(np.uint32)) & 0xFFFF) / 2**16  # of rounding away from 0
    rounded = np.asarray(round_stochastically(np.full(count, value, np.float32), seed, step), np.float32)
    assert np.all((rounded == neighbours[0]) | (rounded == neighbours[1]))
    bias = np.mean(rounded == neighbours[1]) - probability
    assert abs(bias) <= 6 * np.sqrt(probability * (1 - probability) / count) + 1e-3


def test_steps_and_seeds_are_independent():
    x = np.full(4096, 1 + 0.3 * 2.0**-7, np.float32)
    up = [np.asarray(round_stochastically(x, *key), np.float32) > 1 for key in ((1, 5), (1, 6), (2, 5))]
    for i in range(3):
        for j in range(i):
            assert abs(np.mean(up[i] & up[j]) - 0.09) < 5 * np.sqrt(0.09 * 0.91 / x.size)


def test_bfloat16_values_do_not_change():
    x = np.float32([0, -0.0, 1, -1.5, np.inf, -np.inf, 3.0e38, 2.0**-133])
    x = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(bits_of(round_stochastically(x.astype(np.float32), SEED, STEP)), bits_of(x))


def test_nan_stays_nan():
    bits = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000])
    rounded = round_stochastically(np.tile(bits, 100).view(np.float32), SEED, STEP)
    np.testing.assert_array_equal(bits_of(rounded)[:5], (bits | 0x400000) >> 16)
    assert np.all(np.isnan(np.asarray(rounded, np.float32)))


def test_new_steps_do_not_recompile():
    rounded = jax.jit(functools.partial(round_stochastically, row_length=64))
    x = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    for step in (0, 1, 2**31 - 1):
        np.testing.assert_array_equal(
            bits_of(rounded(x, jnp.int32(3), jnp.int32(step))),
            bits_of(round_stochastically(x, 3, np.uint32(step), row_length=64)),
        )
    assert rounded._cache_size() == 1


def test_vmap_over_seeds():
    x = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    seeds = jnp.arange(4, dtype=jnp.uint32)
    many = jax.vmap(lambda seed: round_stochastically(x, seed, STEP))(seeds)
    for seed in range(4):
        np.testing.assert_array_equal(bits_of(many[seed]), bits_of(round_stochastically(x, seed, STEP)))


def test_first_row_matches_rounding_of_full_matrix():
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    full = round_stochastically(x, SEED, STEP, first=2**40)
    rows = jax.jit(lambda first: round_stochastically(x[13:], SEED, STEP, first=2**40, first_row=first))(13)
    np.testing.assert_array_equal(bits_of(full)[13:], bits_of(rows))
