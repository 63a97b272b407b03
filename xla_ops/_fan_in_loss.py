"""The loss of a fixed fan-in output layer, without ever holding the logits of all labels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xla_ops import _native
from xla_ops._arguments import check_connections, check_dtype, check_values
from xla_ops._fan_in_matmul import fan_in_matmul_reference
from xla_ops._inputs import SparseInputs, check_sparse, in_features

LOSSES = ("squared_hinge", "bce")


def fan_in_loss(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    positives: ArrayLike,
    *,
    loss: str = "squared_hinge",
    sparse: SparseInputs | None = None,
) -> Array:
    """The mean over batch and labels of a loss of `fan_in_matmul(x, kernel, indices, bias)`.

    Labels are taken in blocks through logits, loss and all gradients, so that neither logits nor their
    gradient [B, L] exist, forward or backward; and where the squared hinge has no gradient the backward
    products are skipped. Differentiable (reverse mode, once) in x, kernel and bias. Results repeat bit for
    bit on the same machine with the same number of threads; on a GPU all but the gradient of x do.

    Args:
      x: [B, D], float32 or bfloat16.
      kernel: [L, F], of x's dtype.
      indices: [L, F], uint16 (for D + C <= 65,536) or int32; one outside [0, D + C) contributes nothing.
      bias: [L], of x's dtype, or None.
      positives: [B, P] int32, the labels of each point, padded with -1. A label listed twice counts once, one
        outside [0, L) not at all. All other labels are negatives.
      loss: "squared_hinge", `max(0, 1 - y s)^2` with y = +1 for positives and -1 for negatives, or "bce", the
        binary cross-entropy with logits.
      sparse: C more inputs, D to D + C - 1, or None.

    Returns:
      float32 scalar. Where B or L is 0 it is NaN, as the mean of nothing.

    Raises:
      TypeError, ValueError: for an argument of the wrong dtype or shape, naming it.

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 2.
    """
    operands, num_columns = check_loss(x, kernel, indices, bias, positives, loss, sparse)
    return _loss(loss, num_columns, *operands)


def fan_in_loss_reference(
    x,
    kernel,
    indices,
    bias,
    positives,
    *,
    loss: str = "squared_hinge",
    sparse: SparseInputs | None = None,
) -> Array:
    """`fan_in_loss` in plain `jax.numpy`, with a dense target matrix. Same arguments and result."""
    logits = fan_in_matmul_reference(x, kernel, indices, bias, sparse=sparse).astype(jnp.float32)
    is_positive = jnp.any(positives[:, :, None] == jnp.arange(kernel.shape[0])[None, None], axis=1)
    margin = jnp.where(is_positive, logits, -logits)
    if loss == "squared_hinge":
        return jnp.mean(jnp.square(jnp.maximum(0, 1 - margin)))
    return jnp.mean(jax.nn.softplus(-margin))


def check_loss(x, kernel, indices, bias, positives, loss, sparse) -> tuple[tuple[Array, ...], np.int64]:
    """Checks the arguments of `fan_in_loss`.

    Returns:
      x, rows, columns, values, kernel, indices, bias and positives as the handlers take them, and their
      attribute `num_columns`.
    """
    x, kernel, indices, positives = (jnp.asarray(a) for a in (x, kernel, indices, positives))
    bias = None if bias is None else jnp.asarray(bias)
    check_values("x", x, ndim_at_least=2)
    if x.ndim != 2:
        raise ValueError(f"x must have shape [B, D], got {list(x.shape)}")
    check_connections(kernel, indices, bias, dtype=x.dtype, in_features=in_features(x, sparse))
    entries, num_columns = check_sparse(sparse, x)
    check_dtype("positives", positives, [jnp.int32])
    if positives.ndim != 2 or positives.shape[0] != x.shape[0]:
        raise ValueError(
            f"positives must have shape [{x.shape[0]}, P] (one row per row of x), got {list(positives.shape)}"
        )
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    _native.register()
    bias = jnp.zeros(0, x.dtype) if bias is None else bias
    return _native.varying(x, *entries, kernel, indices, bias, positives), num_columns


def loss_code(loss: str) -> np.int64:
    """How the handlers are told which loss."""
    return np.int64(LOSSES.index(loss))


_SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(loss, num_columns, *operands):
    attributes = {"loss": loss_code(loss), "num_columns": num_columns}
    return _native.call("xla_ops.fan_in_loss.value", [_SCALAR], *operands, **attributes)[0]


def _loss_fwd(loss, num_columns, *operands):
    x, _, _, _, kernel, _, bias, _ = operands
    results = [_SCALAR, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel, bias))]
    attributes = {"loss": loss_code(loss), "num_columns": num_columns}
    value, *gradients = _native.call("xla_ops.fan_in_loss.gradients", results, *operands, **attributes)
    return value, gradients


def _loss_bwd(loss, num_columns, gradients, d_value):
    d_x, d_kernel, d_bias = ((d_value * g.astype(jnp.float32)).astype(g.dtype) for g in gradients)
    return d_x, None, None, None, d_kernel, None, d_bias, None


_loss.defvjp(_loss_fwd, _loss_bwd, optimize_remat=True)
