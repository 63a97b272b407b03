"""Tests of training with settings of JAX and Flax that other parts of a program may have changed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparse_xmc import FixedFanInLinear, XMCClassifier, rewire_layer

TEXTS = ["a small cat", "a big cat", "a small dog", "a big dog"] * 4
NAMES = [["cat", "small"], ["cat"], ["dog", "small"], ["dog"]] * 4

# Flax has two modes from 0.12.5 on: graph mode, and tree mode, in which modules are plain pytrees.
MODES = ("graph", "tree") if hasattr(nnx, "set_graph_mode") else ("graph",)


@pytest.fixture(params=MODES)
def flax_mode(request):
    if request.param == "graph":
        yield
    else:
        with nnx.set_graph_mode(False):
            yield


def fit_and_predict():
    classifier = XMCClassifier(epochs=40, batch_size=4).fit(TEXTS, NAMES)
    assert classifier.predict(["the small cat"], k=2).labels.tolist() == [["cat", "small"]]


def test_fit_and_predict_leak_no_tracers():
    with jax.checking_leaks():
        fit_and_predict()


def test_classifier_in_each_flax_mode(flax_mode):
    fit_and_predict()


def test_custom_training_loop_in_each_flax_mode(flax_mode):
    rngs = nnx.Rngs(0)
    output = FixedFanInLinear(16, 50, fan_in=4, use_bias=False, rngs=rngs)
    model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.relu, output)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    hidden = nnx.relu(model.layers[0](x))
    before, indices = output.kernel[...], output.indices[...]

    def loss(model):
        return jnp.square(1 - model(x)).mean()

    def loss_of_arrays(kernel):
        return jnp.square(1 - (hidden[:, indices] * kernel[None]).sum(-1)).mean()

    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    # Flax's tree mode differentiates all variables of a module, and raises for integers without allow_int.
    gradient = nnx.grad(loss, allow_int=True)(model)
    optimizer.update(model, gradient)
    step = jax.grad(loss_of_arrays)(before)
    np.testing.assert_allclose(output.kernel[...], before - step, atol=1e-6)
    moved = rewire_layer(output, model, optimizer, jax.random.key(0))
    assert (output.indices[...] != indices).any()
    assert ((output.indices[...] == indices) | moved).all()


def test_initial_indices_and_kernel_do_not_depend_on_x64():
    def draw():
        layer = FixedFanInLinear(64, 200, fan_in=8, rngs=nnx.Rngs(0))
        return np.asarray(layer.indices[...]), np.asarray(layer.kernel[...])

    narrow = draw()
    with jax.enable_x64(True):
        wide = draw()
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
