"""Tests that derivatives which an op does not define raise an error."""

import jax
import jax.numpy as jnp
import pytest
from op_table import EXAMPLE, OPS

NATIVE = [name for name, op in OPS.items() if op.is_native and op.expected is not None]
DIFFERENTIABLE = [name for name in NATIVE if OPS[name].differentiable]
NOT_DIFFERENTIABLE = [name for name in NATIVE if not OPS[name].differentiable]


def scalar_function_of_x(name):
    """Return an op as a function of x with a scalar result, the sum of the cubes of the op's results."""
    op = OPS[name]
    arguments = op.arguments(*EXAMPLE)

    def function(x):
        results = jax.tree.leaves(op.function(**arguments | {"x": x}))
        return sum(jnp.sum(result**3) for result in results if result.dtype == x.dtype)

    return function


def grad_of_grad(function):
    """Return the gradient of the squared norm of a function's gradient."""
    return jax.grad(lambda x: jnp.sum(jax.grad(function)(x) ** 2))


def grad_of_grad_in_shard_map(function):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(grad_of_grad(function), mesh=mesh, in_specs=jax.P(), out_specs=jax.P())


SECOND_DERIVATIVES = {
    "grad of grad": grad_of_grad,
    "jit": lambda function: jax.jit(grad_of_grad(function)),
    "checkpoint": lambda function: grad_of_grad(jax.checkpoint(function)),
    "hessian": jax.hessian,
    "jvp of grad": lambda function: lambda x: jax.jvp(jax.grad(function), (x,), (x,)),
    "vmap": lambda function: lambda x: jax.vmap(grad_of_grad(function))(x[None]),
    "shard_map": grad_of_grad_in_shard_map,
}
X = jnp.asarray(EXAMPLE[0].x)


@pytest.mark.parametrize("second", SECOND_DERIVATIVES)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_raise(op, second):
    with pytest.raises(ValueError, match=f"xla_ops.{op} has first derivatives alone.*no second derivatives"):
        SECOND_DERIVATIVES[second](scalar_function_of_x(op))(X)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_raises(op):
    with pytest.raises(TypeError, match="can't apply forward-mode"):
        jax.jvp(scalar_function_of_x(op), (X,), (X,))


@pytest.mark.parametrize("op", NOT_DIFFERENTIABLE)
def test_grad_of_op_without_derivatives_raises(op):
    with pytest.raises(ValueError, match=f"xla_ops.{op} has no derivatives"):
        jax.grad(scalar_function_of_x(op))(X)
