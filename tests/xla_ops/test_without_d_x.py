"""Tests that the gradient of x is not computed if it is not needed, and that other results do not change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_problems import DTYPE, make_problem, sparsify

from xla_ops import adam_init, fan_in_adam_step, fan_in_loss, fan_in_matmul, fan_in_sgd_step

SPARSE = pytest.mark.parametrize("is_sparse", [False, True])


def make_inputs(dtype, is_sparse):
    """Return a problem whose batch has more than one tile, and its sparse inputs or None."""
    problem = make_problem(70, 40, 130, 9, dtype=dtype)
    return sparsify(problem, 20)[1:] if is_sparse else (problem, None)


def d_x_shapes(function, *arguments, result):
    """Return the shape of a result, such as "70x20", of each call of a handler that computes gradients."""
    text = jax.jit(function).lower(*arguments).as_text()
    calls = re.findall(r"custom_call @xla_ops\.\S*(?:gradients|step\S*)\(.*-> (.*)", text)
    return [re.findall(r"tensor<([\dx]*)x(?:f32|bf16)>", types)[result] for types in calls]


@DTYPE
@SPARSE
def test_matmul_without_d_x(instruction_set, dtype, is_sparse):
    problem, sparse = make_inputs(dtype, is_sparse)

    def y(x, kernel, bias):
        return fan_in_matmul(x, kernel, problem.indices, bias, sparse=sparse)

    def layer_gradients(x, kernel, bias, dy):
        return jax.vjp(lambda *layer: y(x, *layer), kernel, bias)[1](dy)

    arguments = (problem.x, problem.kernel, problem.bias, problem.dy)
    assert d_x_shapes(layer_gradients, *arguments, result=0) == ["0x0"]
    _, *expected = jax.vjp(y, *arguments[:3])[1](problem.dy)
    for a, b in zip(jax.jit(layer_gradients)(*arguments), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    (d_x,) = jax.vjp(lambda x: y(x, *arguments[1:3]), problem.x)[1](problem.dy)
    assert d_x.shape == problem.x.shape
    assert np.any(d_x)


@DTYPE
@SPARSE
def test_loss_without_d_x(instruction_set, dtype, is_sparse):
    problem, sparse = make_inputs(dtype, is_sparse)

    def loss(x, kernel, bias):
        return fan_in_loss(x, kernel, problem.indices, bias, problem.positives, sparse=sparse)

    layer_gradients = jax.value_and_grad(loss, (1, 2))
    arguments = (problem.x, problem.kernel, problem.bias)
    assert d_x_shapes(layer_gradients, *arguments, result=0) == ["0x0"]
    value, (_, *expected) = jax.value_and_grad(loss, (0, 1, 2))(*arguments)
    actual = jax.jit(layer_gradients)(*arguments)
    assert actual[0] == value
    for a, b in zip(actual[1], expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@SPARSE
def test_step_without_d_x(instruction_set, optimizer, is_sparse):
    problem, sparse = make_inputs(jnp.float32, is_sparse)
    layer = (problem.kernel, problem.indices, problem.bias)
    state = [adam_init(problem.kernel, problem.bias)] if optimizer == "adam" else []
    op = {"adam": fan_in_adam_step, "sgd": fan_in_sgd_step}[optimizer]
    step = functools.partial(op, problem.x, *layer, problem.positives, *state, 0.1, sparse=sparse)
    value, d_x, *new = jax.jit(functools.partial(step, wants_d_x=True))()
    assert np.any(d_x)
    same_value, no_d_x, *same_new = jax.jit(functools.partial(step, wants_d_x=False))()
    assert d_x_shapes(functools.partial(step, wants_d_x=False), result=0) == ["0x0"]
    assert no_d_x is None
    assert same_value == value
    jax.tree.map(np.testing.assert_array_equal, same_new, new)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
@pytest.mark.parametrize(("labels", "batch"), ["ab", "ba"])
def test_sharded_loss_without_d_x(labels, batch):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    problem = make_problem(8, 12, 20, 4)

    def loss(kernel, bias, x):
        return fan_in_loss(x, kernel, problem.indices, bias, problem.positives)

    expected = jax.grad(loss, (0, 1))(problem.kernel, problem.bias, problem.x)
    sharded = [
        jax.device_put(array, jax.NamedSharding(mesh, jax.P(axis)))
        for axis, array in ((labels, problem.kernel), (labels, problem.bias), (batch, problem.x))
    ]
    actual = jax.jit(jax.grad(loss, (0, 1)))(*sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, expected)


def test_checkpoint_and_vmap_without_d_x():
    problem = make_problem(8, 12, 20, 4)

    def loss(kernel, x):
        return fan_in_loss(x, kernel, problem.indices, problem.bias, problem.positives)

    expected = jax.grad(loss)(problem.kernel, problem.x)
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(problem.kernel, problem.x)
    np.testing.assert_allclose(again, expected, rtol=1e-6)
    mapped = jax.vmap(jax.grad(loss), (None, 0))(problem.kernel, np.stack([problem.x] * 3))
    np.testing.assert_allclose(mapped, np.stack([expected] * 3), rtol=1e-6)
