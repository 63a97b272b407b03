import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.unstructured import UnstructuredConfig, UnstructuredLinear, rewire_unstructured
from sparse_xmc import ClassifierConfig
from sparse_xmc.heads import HEADS, DenseConfig, register_head
from sparse_xmc.heads.rewiring import PAPER, RewireConfig
from sparse_xmc.layers import Connectivity


def dense_matrix(layer):
    """Return the weights of the layer as a dense matrix [L, D]; repeated connections add up."""
    matrix = np.zeros((layer.out_features, layer.in_features))
    np.add.at(matrix, tuple(np.asarray(layer.indices[...]).T), np.asarray(layer.kernel[...], np.float64))
    return matrix


def make_layer(connections, in_features=20, labels=30):
    init = nnx.initializers.normal(1)
    return UnstructuredLinear(
        in_features, labels, connections, kernel_init=init, bias_init=init, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize("connections", [1, 600, 4096, 5000])  # blocks of 4096 connections
def test_unstructured_linear_matches_dense_product(connections):
    layer = make_layer(connections, in_features=40, labels=150)
    x = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    cotangent = np.random.default_rng(1).normal(size=(6, 150)).astype(np.float32)
    matrix = dense_matrix(layer)
    np.testing.assert_allclose(
        jax.jit(lambda layer, x: layer(x))(layer, x),
        x @ matrix.T + np.asarray(layer.bias[...]),
        rtol=1e-4,
        atol=1e-4,
    )

    d_layer, d_x = nnx.grad(lambda layer, x: jnp.sum(layer(x) * cotangent), argnums=(0, 1))(layer, x)
    labels, inputs = np.asarray(layer.indices[...]).T
    np.testing.assert_allclose(d_x, cotangent @ matrix, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        d_layer["kernel"][...], (cotangent[:, labels] * x[:, inputs]).sum(0), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(d_layer["bias"][...], cotangent.sum(0), rtol=1e-4, atol=1e-4)
    assert "indices" not in d_layer


def test_unstructured_linear_draws_uniform_connections():
    layer = UnstructuredLinear(20, 30, 3000 // 5, rngs=nnx.Rngs(0))
    indices = np.asarray(layer.indices[...])
    assert isinstance(layer.indices, Connectivity)
    assert indices.shape == (600, 2)
    assert indices.dtype == np.int32
    for column, size in ((0, 30), (1, 20)):
        counts = np.bincount(indices[:, column], minlength=size)
        assert len(counts) == size
        assert np.all(np.abs(counts - 600 / size) < 5 * np.sqrt(600 / size))
    assert len(set(np.bincount(indices[:, 0], minlength=30))) > 1  # unlike a fixed fan-in
    bound = 0.05
    assert 0.95 * bound < np.abs(layer.kernel[...]).max() <= bound


@pytest.mark.parametrize("connections", [0, 601])
def test_unstructured_linear_raises_for_invalid_connections(connections):
    with pytest.raises(ValueError, match=f"connections must be between 1 and .* = 600, got {connections}"):
        make_layer(connections)


@pytest.mark.parametrize("config", [PAPER, RewireConfig(fraction=0.3)])
def test_rewire_unstructured_moves_weakest_connections(config):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=5000).astype(np.float32)
    indices = np.stack([rng.integers(0, 70, 5000), rng.integers(0, 90, 5000)], axis=1).astype(np.int32)
    new_kernel, new_indices, moved = map(
        np.asarray,
        rewire_unstructured(jax.random.key(0), jnp.array(kernel), jnp.array(indices), 90, 70, config),
    )
    k = round(config.fraction * 5000)
    np.testing.assert_array_equal(moved, np.abs(kernel) < np.sort(np.abs(kernel))[k - 1])
    assert moved.sum() == k - 1
    np.testing.assert_array_equal(new_indices[~moved], indices[~moved])
    np.testing.assert_array_equal(new_kernel, np.where(moved, 0, kernel) if config.zero_weights else kernel)
    for column, size in ((0, 70), (1, 90)):
        assert np.mean(new_indices[moved, column] != indices[moved, column]) > 0.95
        drawn = new_indices[moved, column]
        assert 0 <= drawn.min() < 0.05 * size
        assert 0.95 * size < drawn.max() < size


def test_rewire_unstructured_moves_nothing_if_fraction_rounds_to_zero():
    indices = jnp.zeros((3, 2), jnp.int32)
    _, new, moved = rewire_unstructured(
        jax.random.key(0), jnp.ones(3), indices + 1, 9, 9, RewireConfig(fraction=0.1)
    )
    assert not moved.any()
    np.testing.assert_array_equal(new, np.ones((3, 2)))


def test_from_json_raises_for_unregistered_head(monkeypatch):
    config = ClassifierConfig(4, 9, head=UnstructuredConfig(penultimate=0, fan_in=2))
    fields = config.to_json()
    assert ClassifierConfig.from_json(fields) == config
    monkeypatch.delitem(HEADS, "unstructured")
    with pytest.raises(
        ValueError, match=r"head 'unstructured' is not registered; .* experiments\.unstructured"
    ):
        ClassifierConfig.from_json(fields)
    register_head("unstructured", UnstructuredConfig)
    assert ClassifierConfig.from_json(fields) == config


def test_register_head_raises_for_second_class():
    register_head("unstructured", UnstructuredConfig)
    with pytest.raises(ValueError, match="'unstructured' is registered already, with the class Unst"):
        register_head("unstructured", DenseConfig)
