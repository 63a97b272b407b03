"""Tests of the in-place steps against `fan_in_loss` with Optax, and of stochastic rounding against Philox."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_problems import (
    LOSS,
    SGD_ROUNDING_SHAPES,
    Problem,
    check_sgd_rounding,
    loss_results,
    make_problem,
    philox,
)

from xla_ops import adam_init, fan_in_adam_step, fan_in_sgd_step


def make_layer(*shape, **options):
    """Return x, kernel, indices, bias and positives as JAX arrays."""
    return jax.tree.map(jnp.asarray, make_problem(*shape, **options)[:5])


# ---- Adam ----


@pytest.mark.parametrize("shape", [(5, 20, 33, 3), (70, 10, 200, 7), (1, 3, 5000, 32), (2, 4, 1, 1)])
@LOSS
@pytest.mark.parametrize("bias", [True, False])
def test_adam_matches_optax(instruction_set, shape, loss, bias):
    x, kernel, indices, bias, positives = make_layer(*shape, with_bias=bias)
    b1, b2, epsilon = 0.8, 0.99, 1e-7
    tx = optax.adam(lambda count: 0.1 / (1 + count), b1, b2, eps=epsilon)
    params, opt_state = (kernel, bias), tx.init((kernel, bias))
    state = adam_init(kernel, bias)
    step = jax.jit(functools.partial(fan_in_adam_step, loss=loss, b1=b1, b2=b2, epsilon=epsilon))

    for t in range(4):
        problem = Problem(x, params[0], indices, params[1], positives)
        expected_value, expected_d_x, *grads = loss_results(problem, loss)
        with jax.numpy_dtype_promotion("standard"):  # Optax promotes dtypes
            updates, opt_state = tx.update(tuple(grads), opt_state, params)
        params = optax.apply_updates(params, updates)
        value, d_x, kernel, bias, state = step(x, kernel, indices, bias, positives, state, 0.1 / (1 + t))
        np.testing.assert_allclose(value, expected_value, rtol=1e-5)
        np.testing.assert_allclose(d_x, expected_d_x, rtol=1e-4, atol=1e-6 * jnp.abs(expected_d_x).max())

    adam = opt_state[0]
    expected = (params, adam.mu, adam.nu)
    actual = ((kernel, bias), (state.mu_kernel, state.mu_bias), (state.nu_kernel, state.nu_bias))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=1e-5 * float(jnp.abs(e).max()))
    assert state.count == 4


# ---- SGD ----


@pytest.mark.parametrize("shape", [(5, 20, 33, 3), (70, 10, 200, 7), (1, 3, 5000, 32), (2, 4, 1, 1)])
@LOSS
@pytest.mark.parametrize("bias", [True, False])
def test_sgd_float32(instruction_set, shape, loss, bias):
    x, kernel, indices, bias, positives = make_layer(*shape, with_bias=bias)
    rate = 0.1 * shape[0] * shape[2]
    problem = Problem(x, kernel, indices, bias, positives)
    expected_value, expected_d_x, *grads = loss_results(problem, loss)
    expected = jax.tree.map(lambda p, g: p - rate * g, [kernel, bias], grads)
    value, d_x, *actual = jax.jit(functools.partial(fan_in_sgd_step, loss=loss))(
        x, kernel, indices, bias, positives, rate
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(d_x, expected_d_x, rtol=1e-4, atol=1e-6 * jnp.abs(expected_d_x).max())
    for a, e in zip(actual, expected, strict=True):
        if e is None:
            assert a is None
        else:
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_steps_with_x64(bias):
    with jax.enable_x64(True):
        test_adam_matches_optax(None, (5, 20, 33, 3), "bce", bias)
        test_sgd_float32(None, (5, 20, 33, 3), "bce", bias)
        test_steps_of_label_shards_match_full_step(None, "sgd bfloat16", 37)


@pytest.mark.parametrize(  # the known answers of Random123, the library of Philox's authors
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_known_answers(counter, key, words):
    assert philox(counter, key) == words


@pytest.mark.parametrize("shape", SGD_ROUNDING_SHAPES)
def test_sgd_bfloat16_rounding_matches_philox(instruction_set, shape):
    def sgd(*arguments):
        *arguments, seed, step = map(jnp.asarray, arguments)
        return fan_in_sgd_step(*arguments, seed=seed, step=step)[2:]

    check_sgd_rounding(shape, sgd)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1))
def test_rounding_is_unbiased_and_reproducible(seed, step):
    labels = 4096
    x, indices = jnp.ones((1, 1), jnp.bfloat16), jnp.zeros((labels, 8), jnp.int32)
    kernel, positives = jnp.full((labels, 8), -0.125, jnp.bfloat16), jnp.full((1, 1), -1)
    bias = jnp.full(labels, 0.5, jnp.bfloat16)  # logits -0.5, so the slope is 1 everywhere
    rate = labels * 0.3 * 2.0**-10  # 0.3 of the distance to the next bfloat16 below -1/8
    key = {"seed": jnp.uint32(seed), "step": jnp.int32(step)}
    _, _, new, _ = fan_in_sgd_step(x, kernel, indices, bias, positives, rate, **key)
    again = fan_in_sgd_step(x, kernel, indices, bias, positives, rate, **key)[2]
    other = fan_in_sgd_step(
        x, kernel, indices, bias, positives, rate, seed=key["seed"], step=key["step"] + 1
    )[2]
    np.testing.assert_array_equal(new, again)
    moved = np.asarray(new, np.float32) != -0.125
    assert set(np.unique(np.asarray(new, np.float32))) == {np.float32(-0.125 - 2.0**-10), np.float32(-0.125)}
    assert abs(moved.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / moved.size)
    both = np.mean(moved & (np.asarray(other, np.float32) != -0.125))
    assert abs(both - 0.09) < 5 * np.sqrt(0.09 * 0.91 / moved.size)  # steps are independent


def test_weights_without_gradient_do_not_change():
    x, kernel, indices, _, _ = make_layer(4, 10, 300, 5, dtype=jnp.bfloat16)
    bias, positives = jnp.full(300, -100, jnp.bfloat16), jnp.array([[7], [7], [-1], [290]])
    value, d_x, new_kernel, new_bias = fan_in_sgd_step(x, kernel, indices, bias, positives, 1e-3)
    changed = np.flatnonzero(np.any(np.asarray(new_kernel) != np.asarray(kernel), axis=1))
    assert set(changed) <= {7, 290}
    assert set(np.flatnonzero(np.asarray(new_bias) != np.asarray(bias))) <= {7, 290}
    assert value > 0
    assert np.any(np.asarray(d_x) != 0)


# ---- Adam and SGD ----


def test_nan_propagates_to_weights_that_read_it():
    x = jnp.array([[jnp.nan, 1]], jnp.bfloat16)
    kernel, indices = jnp.ones((200, 1), jnp.bfloat16), jnp.arange(200)[:, None] % 2
    new = fan_in_sgd_step(x, kernel, indices, None, jnp.array([[-1]]), 1.0)[2]
    np.testing.assert_array_equal(np.isnan(np.asarray(new, np.float32))[:, 0], np.arange(200) % 2 == 0)


def test_donated_arrays_are_updated_in_place():
    x, kernel, indices, bias, positives = make_layer(4, 50, 2000, 8)
    state = adam_init(kernel, bias)

    @functools.partial(jax.jit, donate_argnums=(1, 3, 5))
    def adam(x, kernel, indices, bias, positives, state):
        return fan_in_adam_step(x, kernel, indices, bias, positives, state, 0.1)

    @functools.partial(jax.jit, donate_argnums=(1, 3))
    def sgd(x, kernel, indices, bias, positives):
        return fan_in_sgd_step(x, kernel, indices, bias, positives, 0.1)

    size = 4 * kernel.size
    if jax.default_backend() == "cpu":  # on a GPU, the workspace is larger than this small layer
        compiled = adam.lower(x, kernel, indices, bias, positives, state).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < size / 4
    before = {a.unsafe_buffer_pointer() for a in (kernel, state.mu_kernel, state.nu_kernel)}
    _, _, kernel, bias, state = adam(x, kernel, indices, bias, positives, state)
    assert {a.unsafe_buffer_pointer() for a in (kernel, state.mu_kernel, state.nu_kernel)} == before
    pointer = kernel.unsafe_buffer_pointer()
    assert sgd(x, kernel, indices, bias, positives)[2].unsafe_buffer_pointer() == pointer


def test_arrays_not_donated_do_not_change():
    x, kernel, indices, bias, positives = make_layer(4, 50, 200, 8)
    copies = [np.array(a) for a in (kernel, bias)]
    state = adam_init(kernel, bias)
    fan_in_adam_step(x, kernel, indices, bias, positives, state, 0.1)
    fan_in_sgd_step(x, kernel, indices, bias, positives, 0.1)
    for array, copy in zip((kernel, bias), copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert not np.any(state.mu_kernel)


def test_adam_accepts_lists():
    x, kernel, indices, bias, positives = make_layer(2, 5, 7, 3)
    state = adam_init(kernel, bias)
    lists = jax.tree.map(lambda a: np.asarray(a).tolist(), state)
    expected = fan_in_adam_step(x, kernel, indices, bias, positives, state, 0.1)
    actual = fan_in_adam_step(x, np.asarray(kernel).tolist(), indices, bias, positives, lists, 0.1)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="calls the CPU handler")
def test_handler_without_aliasing_raises():
    x, kernel, indices, bias, positives = make_layer(2, 5, 7, 3)
    results = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((), x.shape, kernel.shape, bias.shape)]
    call = jax.ffi.ffi_call("xla_ops.fan_in_step.sgd", results)
    no_sparse = (jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32), jnp.zeros(0))
    arguments = (x, *no_sparse, kernel, indices, bias, positives, jnp.float32(1), jnp.zeros(4, jnp.uint32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="kernel must be updated in place"):
        jax.block_until_ready(
            call(*arguments, num_columns=np.int64(0), loss=np.int64(0), num_labels=np.int64(7))
        )


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_shard_map_takes_a_step_per_device(optimizer):
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    x, *layer, positives = make_layer(8, 12, 10, 4)

    def step(x, kernel, indices, bias, positives):
        arguments = (x, kernel, indices, bias, positives)
        if optimizer == "adam":
            _, d_x, kernel, *_ = fan_in_adam_step(*arguments, adam_init(kernel, bias), 0.1)
        else:
            _, d_x, kernel, _ = fan_in_sgd_step(*arguments, 0.1)
        return d_x, kernel[None]

    batch_spec, replicated = jax.P("i"), jax.P()
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(batch_spec, replicated, replicated, replicated, batch_spec),
        out_specs=(batch_spec, batch_spec),
    )
    actual = jax.jit(sharded)(x, *layer, positives)
    batches = zip(jnp.split(x, devices), jnp.split(positives, devices), strict=True)
    steps = [step(x, *layer, positives) for x, positives in batches]
    for result, expected in zip(actual, zip(*steps, strict=True), strict=True):
        np.testing.assert_allclose(result, np.concatenate(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 37, 64, 101])
@pytest.mark.parametrize("optimizer", ["adam", "sgd float32", "sgd bfloat16"])
def test_steps_of_label_shards_match_full_step(instruction_set, optimizer, cut):
    labels = 130
    x, *layer, positives = make_layer(9, 12, labels, 3)
    if optimizer == "sgd bfloat16":
        x, layer[0], layer[2] = (a.astype(jnp.bfloat16) for a in (x, layer[0], layer[2]))

    def step(shard):
        kernel, indices, bias = (a[shard] for a in layer)
        arguments = (x, kernel, indices, bias, positives - shard.start)
        if optimizer != "adam":
            options = {"seed": 5, "step": 7, "first_label": shard.start, "num_labels": labels}
            return fan_in_sgd_step(*arguments, 200.0, **options)
        loss, d_x, kernel, bias, state = fan_in_adam_step(
            *arguments, adam_init(kernel, bias), 0.1, epsilon=1e-3, num_labels=labels
        )
        return loss, d_x, kernel, bias, *state[1:]

    full, shards = step(slice(0, labels)), [step(slice(0, cut)), step(slice(cut, labels))]
    for i, (expected, *results) in enumerate(zip(full, *shards, strict=True)):
        results = [np.asarray(result, np.float32) for result in results]
        if i < 2:  # loss and d_x are sums over labels
            rtol = 2e-2 if x.dtype == jnp.bfloat16 and i == 1 else 1e-5
            np.testing.assert_allclose(
                sum(results), np.asarray(expected, np.float32), rtol=rtol, atol=1e-2 * rtol
            )
        else:
            np.testing.assert_array_equal(np.concatenate(results), np.asarray(expected, np.float32))
