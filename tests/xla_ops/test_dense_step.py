"""The in-place steps of a dense layer against Optax on the gradient written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_fan_in_step import rounding_bits

from xla_ops import dense_adam_init, dense_adam_step, dense_factored_init, dense_factored_step

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="updates in place are for CPUs")

SHAPES = [(5, 7, 9), (1, 4, 64), (33, 130, 200), (3, 1, 1), (300, 6, 65), (2, 300, 3000), (0, 3, 5)]


def make_steps(batch, rows, columns, steps=4, seed=0):
    """A kernel, and (x, dy) of some steps."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return normal(rows, columns), [(normal(batch, rows), normal(batch, columns)) for _ in range(steps)]


def expected_of(tx, kernel, steps, rate):
    state = tx.init(kernel)
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        for x, dy in steps:
            gradient = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
            update, state = tx.update(jnp.asarray(gradient, jnp.float32), state, kernel)
            kernel = kernel - rate * update
    return kernel, state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adam_is_that_of_optax(instruction_set, shape, dtype):
    kernel, steps = make_steps(*shape)
    tx = optax.scale_by_adam(b1=0.8, b2=0.99, eps=1e-7, mu_dtype=dtype)
    expected, expected_state = expected_of(tx, kernel, steps, 0.1)

    state = dense_adam_init(kernel, dtype)
    step = jax.jit(functools.partial(dense_adam_step, b1=0.8, b2=0.99, epsilon=1e-7))
    for x, dy in steps:
        kernel, state = step(x, dy, kernel, state, 0.1)
    assert state.mu.dtype == state.nu.dtype == dtype
    mu, nu, expected_mu, expected_nu = (np.asarray(a, np.float32) for a in (*state[1:], *expected_state[1:]))
    # In bfloat16 a moment that falls between two neighbours may go to either, and the next step builds on it.
    tolerance = 2e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(kernel, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(mu, expected_mu, rtol=tolerance, atol=10 * tolerance)
    off_per_step = 5e-5 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(nu, expected_nu, rtol=len(steps) * off_per_step, atol=1e-5)
    assert state.count == len(steps)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_second_moment_in_bfloat16_is_rounded_with_the_bits_of_its_generator(instruction_set, shape):
    batch, rows, columns = shape
    rng = np.random.default_rng(3)
    x, dy = (rng.integers(-3, 4, (batch, n)).astype(np.float32) for n in (rows, columns))
    kernel = np.zeros((rows, columns), np.float32)
    state = dense_adam_init(jnp.asarray(kernel), jnp.bfloat16)._replace(count=jnp.int32(8))
    _, state = dense_adam_step(x, dy, kernel, state, 0.1, b2=0.75, seed=2**32 - 5)
    nu = np.float32(0.25) * (x.T @ dy) ** 2  # integers: no order of summing shows
    runs = -(-columns // 128) * 128  # each row starts a run of positions of its own
    positions = (np.arange(rows)[:, None] * runs + np.arange(columns)).ravel()
    some = rng.permutation(nu.size)[:4000]
    sums = nu.ravel()[some].view(np.uint32) + rounding_bits(positions[some], seed=2**32 - 5, step=9)
    actual = np.asarray(state.nu, np.float32).ravel()[some]
    np.testing.assert_array_equal(actual, (sums & 0xFFFF0000).view(np.float32))


def test_the_second_moment_in_bfloat16_decays_right_on_average():
    kernel = jnp.zeros((30, 200))
    state = dense_adam_init(kernel, jnp.bfloat16)
    state = state._replace(nu=jnp.ones_like(state.nu))
    x, dy = jnp.zeros((1, 30)), jnp.zeros((1, 200))
    for _ in range(200):
        _, state = dense_adam_step(x, dy, kernel, state, 0.1, seed=1)
    nu = np.asarray(state.nu, np.float32)
    np.testing.assert_allclose(nu.mean(), 0.999**200, rtol=3e-3)  # to nearest it would stay at 1
    assert 0.01 < nu.std() < 0.1


@pytest.mark.parametrize("shape", SHAPES[:-1])  # Optax divides 0 by 0 where there is no gradient at all
def test_factored_is_that_of_optax(instruction_set, shape):
    kernel, steps = make_steps(*shape)
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    expected, expected_state = expected_of(tx, kernel, steps, 0.1)
    state = dense_factored_init(kernel)
    step = jax.jit(dense_factored_step)
    for x, dy in steps:
        kernel, state = step(x, dy, kernel, state, 0.1)
    np.testing.assert_allclose(kernel, expected, rtol=1e-3, atol=1e-4)
    # Of a square matrix Optax takes the axes the other way round; there is none in SHAPES but the last.
    v = {a.shape: a for a in (expected_state.v_row, expected_state.v_col)}
    np.testing.assert_allclose(state.v_row, v[state.v_row.shape], rtol=1e-3)
    np.testing.assert_allclose(state.v_col, v[state.v_col.shape], rtol=1e-3)


def test_donated_arrays_are_updated_where_they_are_also_when_the_input_has_a_gradient():
    kernel, [(x, dy)] = make_steps(8, 300, 2000, steps=1)
    adam, factored = dense_adam_init(kernel), dense_factored_init(kernel)

    @functools.partial(jax.jit, donate_argnums=(2, 3), static_argnums=4)
    def run(x, dy, kernel, state, step):
        d_x = dy @ kernel.T
        return d_x, *step(x, dy, kernel, state, 0.1, before=d_x)

    d_x = np.asarray(dy) @ np.asarray(kernel).T
    for step, state in ((dense_adam_step, adam), (dense_factored_step, factored)):
        arguments = (x, dy, jnp.copy(kernel), state)
        memory = run.lower(*arguments, step).compile().memory_analysis()
        assert memory.temp_size_in_bytes < kernel.nbytes / 4
        pointer = arguments[2].unsafe_buffer_pointer()
        actual, new, _ = run(*arguments, step)
        assert new.unsafe_buffer_pointer() == pointer
        np.testing.assert_allclose(actual, d_x, rtol=1e-4, atol=1e-4)
        assert np.all(np.asarray(new) != np.asarray(kernel))


def test_arrays_that_are_not_donated_stay():
    kernel, [(x, dy)] = make_steps(8, 30, 20, steps=1)
    copy = np.array(kernel)
    dense_adam_step(x, dy, kernel, dense_adam_init(kernel), 0.1)
    dense_factored_step(x, dy, kernel, dense_factored_init(kernel), 0.1)
    np.testing.assert_array_equal(kernel, copy)


@pytest.mark.parametrize(
    ("step", "init"), [(dense_adam_step, dense_adam_init), (dense_factored_step, dense_factored_init)]
)
def test_bad_arguments_are_named(step, init):
    kernel, [(x, dy)] = make_steps(8, 30, 20, steps=1)
    state = init(kernel)
    with pytest.raises(ValueError, match=r"dy must have shape \[8, 20\] .*got \[8, 19\]"):
        step(x, dy[:, 1:], kernel, state, 0.1)
    with pytest.raises(ValueError, match=r"kernel must have shape \[29, 20\] .*got \[30, 20\]"):
        step(x[:, 1:], dy, kernel, state, 0.1)
    with pytest.raises(ValueError, match=r"x must be a matrix, got shape \[30\]"):
        step(x[0], dy, kernel, state, 0.1)
    with pytest.raises(TypeError, match="kernel must have dtype float32, got bfloat16"):
        step(x, dy, kernel.astype(jnp.bfloat16), state, 0.1)
    with pytest.raises(ValueError, match=r"state\.\w+ must have shape"):
        step(x, dy, kernel, init(kernel[1:, 1:]), 0.1)


def test_moments_of_two_dtypes_are_refused():
    kernel, [(x, dy)] = make_steps(8, 30, 20, steps=1)
    state = dense_adam_init(kernel)
    with pytest.raises(TypeError, match=r"state\.nu must have dtype bfloat16, got float32"):
        dense_adam_step(x, dy, kernel, state._replace(mu=state.mu.astype(jnp.bfloat16)), 0.1)
