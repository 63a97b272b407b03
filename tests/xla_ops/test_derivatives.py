"""Derivatives that no op defines are errors that say so."""

import jax
import jax.numpy as jnp
import pytest
from op_table import EXAMPLE, OPS

NATIVE = [name for name, op in OPS.items() if op.is_native and op.expected is not None]
FIRST = [name for name in NATIVE if OPS[name].differentiable]
NONE = [name for name in NATIVE if not OPS[name].differentiable]


def of_x(name):
    """Return an op as a function of x, with a scalar result that is not linear in those of the op."""
    op = OPS[name]
    arguments = op.arguments(*EXAMPLE)

    def function(x):
        results = jax.tree.leaves(op.function(**arguments | {"x": x}))
        return sum(jnp.sum(result**3) for result in results if result.dtype == x.dtype)

    return function


def of_gradient(function):
    """Return the gradient of a function of another's gradient."""
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
X = jnp.asarray(EXAMPLE[0].x)


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("op", FIRST)
def test_second_derivatives(op, second):
    with pytest.raises(ValueError, match=f"xla_ops.{op} has first derivatives alone.*no second derivatives"):
        SECOND[second](of_x(op))(X)


@pytest.mark.parametrize("op", FIRST)
def test_forward_mode(op):
    with pytest.raises(TypeError, match="can't apply forward-mode"):
        jax.jvp(of_x(op), (X,), (X,))


@pytest.mark.parametrize("op", NONE)
def test_ops_without_derivatives(op):
    with pytest.raises(ValueError, match=f"xla_ops.{op} has no derivatives"):
        jax.grad(of_x(op))(X)
