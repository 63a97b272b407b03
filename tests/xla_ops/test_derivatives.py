"""Derivatives that there are none of are errors that say so, whatever asks for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32)
INDICES = jnp.asarray(RNG.integers(0, 6, (5, 2)), jnp.int32)
BIAS = jnp.zeros(5)
POSITIVES = jnp.array([[0, 1], [2, -1], [3, 4]], jnp.int32)
LAYER = (KERNEL, INDICES, BIAS)
OPS = {
    "fan_in_matmul": lambda x: jnp.sum(xla_ops.fan_in_matmul(x, *LAYER) ** 3),
    "fan_in_loss": lambda x: xla_ops.fan_in_loss(x, *LAYER, POSITIVES),
}


def of_gradient(function):
    """The gradient of a function of another's gradient."""
    return jax.grad(lambda x: jnp.sum(jax.grad(function)(x) ** 2))


def within_shard_map(function):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(of_gradient(function), mesh=mesh, in_specs=jax.P(), out_specs=jax.P())


SECOND = {
    "grad of grad": of_gradient,
    "jit": lambda function: jax.jit(of_gradient(function)),
    "checkpoint": lambda function: of_gradient(jax.checkpoint(function)),
    "hessian": jax.hessian,
    "jvp of grad": lambda function: lambda x: jax.jvp(jax.grad(function), (x,), (x,)),
    "vmap": lambda function: lambda x: jax.vmap(of_gradient(function))(x[None]),
    "shard_map": within_shard_map,
}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives(op, second):
    with pytest.raises(ValueError, match=f"xla_ops.{op} has first derivatives alone.*no second derivatives"):
        SECOND[second](OPS[op])(X)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode(op):
    with pytest.raises(TypeError, match="can't apply forward-mode"):
        jax.jvp(OPS[op], (X,), (X,))


@pytest.mark.parametrize(
    ("op", "function"),
    {
        "fan_in_top_k": lambda x: xla_ops.fan_in_top_k(x, *LAYER, 2)[0],
        "fan_in_sgd_step": lambda x: xla_ops.fan_in_sgd_step(x, *LAYER, POSITIVES, 0.1)[1],
        "dense_adam_step": lambda x: xla_ops.dense_adam_step(
            x, jnp.ones((3, 4)), jnp.ones((6, 4)), xla_ops.dense_adam_init(jnp.ones((6, 4))), 0.1
        )[0],
        "kth_smallest_magnitude": lambda x: xla_ops.kth_smallest_magnitude(x, 3),
    }.items(),
)
def test_ops_without_any(op, function):
    with pytest.raises(ValueError, match=f"xla_ops.{op} has no derivatives"):
        jax.grad(lambda x: jnp.sum(function(x)))(X)
