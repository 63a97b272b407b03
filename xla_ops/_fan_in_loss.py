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

LOSSES = ("squared_hinge", "bce")


def fan_in_loss(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    positives: ArrayLike,
    *,
    loss: str = "squared_hinge",
) -> Array:
    """The mean over batch and labels of a loss of `fan_in_matmul(x, kernel, indices, bias)`.

    Labels are taken in blocks through logits, loss and all gradients, so that neither logits nor their
    gradient [B, L] exist, forward or backward; and where the squared hinge has no gradient the backward
    products are skipped. Differentiable (reverse mode, once) in x, kernel and bias. Results repeat bit for
    bit on the same machine with the same number of threads; on a GPU all but the gradient of x do.

    Args:
      x: [B, D], float32 or bfloat16.
      kernel: [L, F], of x's dtype.
      indices: [L, F], uint16 (for D <= 65,536) or int32; one outside [0, D) contributes nothing.
      bias: [L], of x's dtype, or None.
      positives: [B, P] int32, the labels of each point, padded with -1. A label listed twice counts once, one
        outside [0, L) not at all. All other labels are negatives.
      loss: "squared_hinge", `max(0, 1 - y s)^2` with y = +1 for positives and -1 for negatives, or "bce", the
        binary cross-entropy with logits.

    Returns:
      float32 scalar. Where B or L is 0 it is NaN, as the mean of nothing.

    Raises:
      TypeError, ValueError: for an argument of the wrong dtype or shape, naming it.

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 2.
    """
    return _loss(*check_loss(x, kernel, indices, bias, positives, loss), loss)


def fan_in_loss_reference(x, kernel, indices, bias, positives, *, loss: str = "squared_hinge") -> Array:
    """`fan_in_loss` in plain `jax.numpy`, with a dense target matrix. Same arguments and result."""
    logits = fan_in_matmul_reference(x, kernel, indices, bias).astype(jnp.float32)
    is_positive = jnp.any(positives[:, :, None] == jnp.arange(kernel.shape[0])[None, None], axis=1)
    margin = jnp.where(is_positive, logits, -logits)
    if loss == "squared_hinge":
        return jnp.mean(jnp.square(jnp.maximum(0, 1 - margin)))
    return jnp.mean(jax.nn.softplus(-margin))


def check_loss(x, kernel, indices, bias, positives, loss) -> tuple[Array, ...]:
    """Checks the arguments of `fan_in_loss`, and returns the arrays as its handlers take them."""
    x, kernel, indices, positives = (jnp.asarray(a) for a in (x, kernel, indices, positives))
    bias = None if bias is None else jnp.asarray(bias)
    check_values("x", x, ndim_at_least=2)
    if x.ndim != 2:
        raise ValueError(f"x must have shape [B, D], got {list(x.shape)}")
    check_connections(kernel, indices, bias, dtype=x.dtype, in_features=x.shape[1])
    check_dtype("positives", positives, [jnp.int32])
    if positives.ndim != 2 or positives.shape[0] != x.shape[0]:
        raise ValueError(
            f"positives must have shape [{x.shape[0]}, P] (one row per row of x), got {list(positives.shape)}"
        )
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    _native.register()
    bias = jnp.zeros(0, x.dtype) if bias is None else bias
    return _native.varying(x, kernel, indices, bias, positives)


def loss_code(loss: str) -> np.int64:
    """How the handlers are told which loss."""
    return np.int64(LOSSES.index(loss))


_SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loss(x, kernel, indices, bias, positives, loss):
    operands = (x, kernel, indices, bias, positives)
    return _native.call("xla_ops.fan_in_loss.value", [_SCALAR], *operands, loss=loss_code(loss))[0]


def _loss_fwd(x, kernel, indices, bias, positives, loss):
    results = [_SCALAR, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel, bias))]
    operands = (x, kernel, indices, bias, positives)
    value, *gradients = _native.call(
        "xla_ops.fan_in_loss.gradients", results, *operands, loss=loss_code(loss)
    )
    return value, gradients


def _loss_bwd(loss, gradients, d_value):
    d_x, d_kernel, d_bias = ((d_value * g.astype(jnp.float32)).astype(g.dtype) for g in gradients)
    return d_x, d_kernel, None, d_bias, None


_loss.defvjp(_loss_fwd, _loss_bwd, optimize_remat=True)
