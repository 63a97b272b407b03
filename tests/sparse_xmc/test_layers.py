import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparse_xmc.layers import Connectivity, FixedFanInLinear, flat_glorot_uniform


def forward_by_loop(x, layer):
    """Return the layer's output in float64, computed one connection at a time."""
    kernel, indices = np.asarray(layer.kernel[...], np.float64), np.asarray(layer.indices[...])
    y = np.zeros((len(x), layer.out_features))
    for label in range(layer.out_features):
        for weight, i in zip(kernel[label], indices[label], strict=True):
            y[:, label] += weight * x[:, i].astype(np.float64)
        if layer.bias is not None:
            y[:, label] += float(layer.bias[label])
    return y


class TestFixedFanInLinear:
    @pytest.mark.parametrize("use_bias", [True, False])
    def test_output_matches_loop(self, use_bias):
        init = nnx.initializers.normal(1)
        layer = FixedFanInLinear(
            20, 30, 4, use_bias=use_bias, kernel_init=init, bias_init=init, rngs=nnx.Rngs(0)
        )
        x = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)
        y = layer(x)
        np.testing.assert_allclose(y, forward_by_loop(x, layer), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(layer(x.reshape(2, 3, 20)), y.reshape(2, 3, 30))
        assert (layer.bias is not None) == use_bias

    def test_variables(self):
        layer = FixedFanInLinear(20, 30, 4, rngs=nnx.Rngs(0))
        assert {path[0]: type(v) for path, v in nnx.to_flat_state(nnx.state(layer))} == {
            "kernel": nnx.Param,
            "bias": nnx.Param,
            "indices": Connectivity,
        }
        assert not issubclass(Connectivity, nnx.Param)
        assert layer.kernel.shape == layer.indices.shape == (30, 4)
        assert layer.indices.dtype == jnp.uint16
        assert all(len(set(row)) == 4 for row in np.asarray(layer.indices[...]).tolist())
        assert 0.04 < np.abs(layer.kernel[...]).max() <= 0.05
        np.testing.assert_allclose(layer.bias[...], np.full(30, -np.log(30)), rtol=1e-6)

    def test_flat_glorot_uniform_is_uniform_within_its_bound(self):
        kernel = flat_glorot_uniform(jax.random.key(0), (300, 40))
        bound = np.sqrt(3 / (300 * 40))
        assert np.abs(kernel).max() <= bound
        assert kernel.max() > 0.99 * bound
        assert kernel.min() < -0.99 * bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.03)

    def test_training_in_custom_model_keeps_connections(self):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.hidden = nnx.Linear(5, 16, rngs=rngs)
                self.output = FixedFanInLinear(16, 40, 3, rngs=rngs)

            def __call__(self, x):
                return self.output(nnx.relu(self.hidden(x)))

        rng = np.random.default_rng(0)
        x, target = rng.normal(size=(8, 5)).astype(np.float32), rng.normal(size=(8, 40)).astype(np.float32)
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        def loss(model):
            return jnp.mean((model(x) - target) ** 2)

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value, grads

        before = jax.tree.map(np.array, nnx.state(model))
        with jax.numpy_dtype_promotion("standard"):  # Optax needs it
            _, grads = step(model, optimizer)
            values = [float(step(model, optimizer)[0]) for _ in range(20)]
        assert values[-1] < 0.9 * values[0]
        assert set(grads["output"]) == {"kernel", "bias"}  # none for the indices
        np.testing.assert_array_equal(model.output.indices[...], before["output"]["indices"][...])
        for kernel, old in ((model.hidden.kernel, before["hidden"]), (model.output.kernel, before["output"])):
            assert np.any(kernel[...] != old["kernel"][...])

    @pytest.mark.parametrize(
        ("dtype", "param_dtype", "expected"),
        [
            (None, jnp.float32, jnp.float32),
            (None, jnp.bfloat16, jnp.bfloat16),
            (jnp.bfloat16, jnp.float32, jnp.bfloat16),
            (jnp.float32, jnp.bfloat16, jnp.float32),
        ],
    )
    def test_dtypes(self, dtype, param_dtype, expected):
        init = nnx.initializers.normal(1)
        layer = FixedFanInLinear(
            20, 30, 4, dtype=dtype, param_dtype=param_dtype, kernel_init=init, rngs=nnx.Rngs(0)
        )
        x = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)
        y = layer(x)
        assert layer.kernel.dtype == layer.bias.dtype == param_dtype
        assert y.dtype == expected
        # Each of 4 products and their sum is rounded.
        tolerance = 8 * float(jnp.finfo(expected).eps)
        np.testing.assert_allclose(
            np.asarray(y, np.float64), forward_by_loop(x, layer), rtol=tolerance, atol=tolerance * 4
        )
        grads = nnx.grad(lambda layer: layer(x).astype(jnp.float32).sum())(layer)
        assert grads["kernel"].dtype == grads["bias"].dtype == param_dtype

    @pytest.mark.parametrize("fan_in", [0, 21, -1])
    def test_invalid_fan_in_raises(self, fan_in):
        with pytest.raises(ValueError, match=f"fan_in must be between 1 and in_features = 20, got {fan_in}"):
            FixedFanInLinear(20, 30, fan_in, rngs=nnx.Rngs(0))

    @pytest.mark.parametrize("width", [19, 21])
    def test_features_of_wrong_width_raise(self, width):
        message = rf"FixedFanInLinear: features must have shape \[\.\.\., 20\], got \[2, {width}\]"
        with pytest.raises(ValueError, match=message):
            FixedFanInLinear(20, 30, 4, rngs=nnx.Rngs(0))(jnp.ones((2, width)))

    @pytest.mark.parametrize("name", ["dtype", "param_dtype"])
    def test_float16_raises(self, name):
        with pytest.raises(TypeError, match=f"^{name} must be float32 or bfloat16, got float16"):
            FixedFanInLinear(20, 30, 4, **{name: jnp.float16}, rngs=nnx.Rngs(0))

    def test_second_derivatives_raise(self):
        graphdef, state = nnx.split(FixedFanInLinear(20, 30, 4, rngs=nnx.Rngs(0)))
        message = "xla_ops.fan_in_matmul has first derivatives alone"
        with pytest.raises(ValueError, match=message):
            jax.hessian(lambda x: jnp.sum(nnx.merge(graphdef, state)(x)))(jnp.ones(20))
