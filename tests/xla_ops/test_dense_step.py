"""Tests of the in-place step of a dense layer against Optax, and of its rounding against Philox."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from op_problems import check_dense_rounding

from xla_ops import DenseAdamState, _native, dense_adam_init, dense_adam_step

SHAPES = [(5, 7, 9), (1, 4, 64), (33, 130, 200), (3, 1, 1), (300, 6, 65), (2, 300, 3000), (0, 3, 5)]


def make_steps(batch, rows, columns, steps=4, seed=0):
    """Return a kernel, and a list of (x, dy), one for each step."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return normal(rows, columns), [(normal(batch, rows), normal(batch, columns)) for _ in range(steps)]


def optax_steps(tx, kernel, steps, rate):
    """Return kernel and optimizer state after steps of Optax."""
    state = tx.init(kernel)
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes dtypes
        for x, dy in steps:
            gradient = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
            update, state = tx.update(jnp.asarray(gradient, jnp.float32), state, kernel)
            kernel = kernel - rate * update
    return kernel, state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adam_matches_optax(instruction_set, shape, dtype):
    kernel, steps = make_steps(*shape)
    tx = optax.scale_by_adam(b1=0.8, b2=0.99, eps=1e-7, mu_dtype=dtype)
    expected, expected_state = optax_steps(tx, kernel, steps, 0.1)

    state = dense_adam_init(kernel, dtype)
    step = jax.jit(functools.partial(dense_adam_step, b1=0.8, b2=0.99, epsilon=1e-7))
    for x, dy in steps:
        kernel, state = step(x, dy, kernel, state, 0.1)
    assert state.mu.dtype == state.nu.dtype == dtype
    mu, nu, expected_mu, expected_nu = (np.asarray(a, np.float32) for a in (*state[1:], *expected_state[1:]))
    # Moments in bfloat16 may be rounded differently, and differences accumulate over the steps.
    tolerance = 2e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(kernel, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(mu, expected_mu, rtol=tolerance, atol=10 * tolerance)
    nu_error = 5e-5 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(nu, expected_nu, rtol=len(steps) * nu_error, atol=1e-5)
    assert state.count == len(steps)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_moment_rounding_matches_philox(instruction_set, shape):
    def adam(x, dy, kernel, mu, nu, b1, b2, seed, number):
        state = DenseAdamState(jnp.int32(number - 1), jnp.asarray(mu), jnp.asarray(nu))
        kernel, state = dense_adam_step(x, dy, kernel, state, 0.1, b1=b1, b2=b2, seed=seed)
        return kernel, *state[1:]

    check_dense_rounding(shape, adam)


def test_steps_with_x64():
    with jax.enable_x64(True):
        test_adam_matches_optax(None, SHAPES[0], jnp.bfloat16)
        test_bfloat16_moment_rounding_matches_philox(None, SHAPES[0])


def test_bfloat16_second_moment_decays_without_bias():
    kernel = jnp.zeros((30, 200))
    state = dense_adam_init(kernel, jnp.bfloat16)
    state = state._replace(nu=jnp.ones_like(state.nu))
    x, dy = jnp.zeros((1, 30)), jnp.zeros((1, 200))
    for _ in range(200):
        _, state = dense_adam_step(x, dy, kernel, state, 0.1, seed=1)
    nu = np.asarray(state.nu, np.float32)
    # With rounding to nearest, nu would stay at 1.
    np.testing.assert_allclose(nu.mean(), 0.999**200, rtol=3e-3)
    assert 0.01 < nu.std() < 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_donated_arrays_are_updated_in_place_after_d_x(dtype):
    kernel, [(x, dy)] = make_steps(8, 300, 2000, steps=1)

    @functools.partial(jax.jit, donate_argnums=(2, 3))
    def run(x, dy, kernel, state):
        d_x = dy @ kernel.T
        return d_x, *dense_adam_step(x, dy, kernel, state, 0.1, depends_on=d_x)

    d_x = np.asarray(dy) @ np.asarray(kernel).T
    arguments = (x, dy, jnp.copy(kernel), dense_adam_init(kernel, dtype))
    if jax.default_backend() == "cpu":  # on a GPU, the matmul has a workspace
        memory = run.lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < kernel.nbytes / 4
    before = [a.unsafe_buffer_pointer() for a in (arguments[2], *arguments[3][1:])]
    actual, new, state = run(*arguments)
    assert [a.unsafe_buffer_pointer() for a in (new, *state[1:])] == before
    np.testing.assert_allclose(actual, d_x, rtol=1e-4, atol=1e-4)
    assert np.all(np.asarray(new) != np.asarray(kernel))


def test_arrays_not_donated_do_not_change():
    kernel, [(x, dy)] = make_steps(8, 30, 20, steps=1)
    copy = np.array(kernel)
    state = dense_adam_init(kernel)
    dense_adam_step(x, dy, kernel, state, 0.1)
    np.testing.assert_array_equal(kernel, copy)
    assert not np.any(state.mu)


def test_nan_gradients_propagate_to_their_weights():
    kernel, [(x, dy)] = make_steps(40, 70, 200, steps=1)
    for dtype in (jnp.float32, jnp.bfloat16):
        state = dense_adam_init(kernel, dtype)
        new, state = dense_adam_step(x.at[20, 3].set(jnp.nan), dy.at[:, 130].set(jnp.nan), kernel, state, 0.1)
        row, column = np.mgrid[:70, :200]
        for array in (new, *state[1:]):
            np.testing.assert_array_equal(np.isnan(np.asarray(array)), (row == 3) | (column == 130))


def test_shard_map_takes_a_step_per_device():
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel, [(x, dy)] = make_steps(8, 30, 20, steps=1)

    def step(x, dy, kernel):
        new, state = dense_adam_step(x, dy, kernel, dense_adam_init(kernel), 0.1)
        return new[None], state.mu[None]

    batch_spec, replicated = jax.P("i"), jax.P()
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(batch_spec, batch_spec, replicated), out_specs=(batch_spec, batch_spec)
    )
    actual = jax.jit(sharded)(x, dy, kernel)
    batches = zip(jnp.split(x, devices), jnp.split(dy, devices), strict=True)
    steps = [step(x, dy, kernel) for x, dy in batches]
    for result, expected in zip(actual, zip(*steps, strict=True), strict=True):
        np.testing.assert_allclose(result, np.concatenate(expected), rtol=1e-5, atol=1e-6)


X, DY, KERNEL, OTHER = (2, 5), (2, 7), (5, 7), (9, 9)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="calls the CPU handler")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: jnp.zeros(5)}, r"x and dy must be matrices, got shapes \[5\] and \[2, 7\]"),
        ({0: jnp.zeros(X, jnp.bfloat16)}, "x has an element type that does not fit"),
        ({1: jnp.zeros(OTHER)}, r"kernel must have shape \[5, 7\], got \[9, 9\]"),
        ({2: jnp.zeros((3, 7))}, r"dy must have shape \[2, 7\], got \[3, 7\]"),
        ({3: jnp.zeros(OTHER)}, r"mu must have shape \[5, 7\], got \[9, 9\]"),
        ({3: jnp.zeros(KERNEL, jnp.bfloat16)}, "nu has an element type that does not fit"),
        ({4: jnp.zeros(OTHER)}, r"nu must have shape \[5, 7\], got \[9, 9\]"),
        ({5: jnp.zeros(2)}, r"rates must have shape \[3\], got \[2\]"),
        ({6: jnp.zeros(3, jnp.int32)}, "key has an element type that does not fit"),
    ],
)
def test_handler_checks_operands(changes, message):
    _native.register()
    zeros = [jnp.zeros(shape) for shape in (X, KERNEL, DY, KERNEL, KERNEL, 3)]
    operands = [*zeros, jnp.zeros(3, jnp.uint32), jnp.zeros(0)]
    for i, operand in changes.items():
        operands[i] = operand
    results = [jax.ShapeDtypeStruct(operands[i].shape, operands[i].dtype) for i in (1, 3, 4)]
    call = jax.ffi.ffi_call("xla_ops.dense_step.adam", results, input_output_aliases={1: 0, 3: 1, 4: 2})
    attributes = {name: np.float32(0.5) for name in ("b1", "b2", "epsilon")}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*operands, **attributes))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="calls the CPU handler")
@pytest.mark.parametrize(
    ("aliases", "name"), [({3: 1, 4: 2}, "kernel"), ({1: 0, 4: 2}, "mu"), ({1: 0, 3: 1}, "nu")]
)
def test_handler_without_aliasing_raises(aliases, name):
    _native.register()
    operands = [jnp.zeros(shape) for shape in (X, KERNEL, DY, KERNEL, KERNEL, 3)]
    results = [jax.ShapeDtypeStruct(KERNEL, jnp.float32)] * 3
    call = jax.ffi.ffi_call("xla_ops.dense_step.adam", results, input_output_aliases=aliases)
    attributes = {name: np.float32(0.5) for name in ("b1", "b2", "epsilon")}
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{name} must be updated in place"):
        jax.block_until_ready(call(*operands, jnp.zeros(3, jnp.uint32), jnp.zeros(0), **attributes))
