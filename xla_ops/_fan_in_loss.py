"""The loss of a fixed fan-in output layer, computed without storing the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xla_ops import _native
from xla_ops._arguments import as_array, as_integer, check_dtype
from xla_ops._fan_in_matmul import matmul_in_jnp
from xla_ops._inputs import Layer, SparseInputs, all_inputs, check_layer, d_x_shape

LOSSES = ("squared_hinge", "bce")


def fan_in_loss(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    positives: ArrayLike,
    *,
    loss: str = "squared_hinge",
    num_labels: int | None = None,
    sparse: SparseInputs | None = None,
) -> Array:
    """Compute the mean over batch and labels of a loss of `fan_in_matmul(x, kernel, indices, bias)`.

    Logits, loss and gradients are computed in blocks of labels, so that neither the logits nor their gradient
    [B, L] are ever stored. Where the squared hinge has no gradient, the backward products are skipped.
    Differentiable (reverse mode, once) in x, kernel and bias; the gradient with respect to x is computed only
    if it is needed. Results are bit-for-bit reproducible on the same machine with the same number of threads,
    except for the gradient with respect to x on a GPU.

    Under `jax.grad`, the forward pass computes the gradients along with the loss, and the backward pass
    multiplies them by a scalar. Within `jax.checkpoint`, the forward pass discards the gradients, and the
    backward pass computes them again, which doubles the time of this op.

    Args:
      x: [B, D], float32 or bfloat16.
      kernel: [L, F], of x's dtype.
      indices: [L, F], uint16 (for D + C <= 65,536) or int32, where C is the number of columns of `sparse`, or
        0; indices outside [0, D + C) contribute nothing.
      bias: [L], of x's dtype, or None.
      positives: [B, P] int32, the labels of each point, padded with -1. Repeated labels count once, values
        outside [0, L) are ignored. All other labels are negatives.
      loss: "squared_hinge", `max(0, 1 - y s)^2` with y = +1 for positives and -1 for negatives, or "bce", the
        binary cross-entropy with logits.
      num_labels: divisor of the sum over labels; None for L. If labels are sharded over devices, pass the
        total number of labels: the loss is then the sum of the results of all devices, and the gradient with
        respect to x is the sum of their gradients.
      sparse: C further inputs, numbered D to D + C - 1; or None.

    Returns:
      float32 scalar. NaN if B or L is 0, as the mean of no values.

    Raises:
      TypeError, ValueError: an argument has a wrong dtype or shape; the message names it.

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 2.
    """
    operands, attributes = loss_operands(x, kernel, indices, bias, positives, loss, num_labels, sparse)
    return _loss(tuple(attributes.items()), *operands)


def fan_in_loss_reference(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    positives: ArrayLike,
    *,
    loss: str = "squared_hinge",
    num_labels: int | None = None,
    sparse: SparseInputs | None = None,
) -> Array:
    """Compute `fan_in_loss` with plain `jax.numpy` and a dense target matrix. Same arguments and result."""
    layer, positives, num_labels = _check(x, kernel, indices, bias, positives, loss, num_labels, sparse)
    x, _, kernel, indices, bias, _ = layer
    logits = matmul_in_jnp(all_inputs(x, sparse), kernel, indices, bias).astype(jnp.float32)
    is_positive = jnp.any(
        positives[:, :, None] == jnp.arange(kernel.shape[0], dtype=positives.dtype)[None, None], axis=1
    )
    margin = jnp.where(is_positive, logits, -logits)
    count = x.shape[0] * num_labels
    if loss == "squared_hinge":
        return jnp.sum(jnp.square(jnp.maximum(0, 1 - margin))) / count
    return jnp.sum(jax.nn.softplus(-margin)) / count


def _check(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    positives: ArrayLike,
    loss: str,
    num_labels: int | None,
    sparse: SparseInputs | None,
) -> tuple[Layer, Array, int]:
    """Check the arguments of `fan_in_loss`; return the layer, the positives and the number of labels."""
    layer = check_layer(x, kernel, indices, bias, sparse, ndim_at_least=2)
    x, labels = layer.x, layer.kernel.shape[0]
    if x.ndim != 2:
        raise ValueError(f"x must have shape [B, D], got {list(x.shape)}")
    positives = as_array("positives", positives)
    check_dtype("positives", positives, [jnp.int32])
    if positives.ndim != 2 or positives.shape[0] != x.shape[0]:
        raise ValueError(
            f"positives must have shape [{x.shape[0]}, P] (one row per row of x), got {list(positives.shape)}"
        )
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if num_labels is not None:
        num_labels = as_integer("num_labels", num_labels, labels, 2**63 - 1, " (at least L)")
    return layer, positives, labels if num_labels is None else num_labels


def loss_operands(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    positives: ArrayLike,
    loss: str,
    num_labels: int | None,
    sparse: SparseInputs | None,
) -> tuple[tuple[Array, ...], dict[str, np.int64]]:
    """Check the arguments of `fan_in_loss`.

    Returns:
      The operands of the handlers, x, rows, columns, values, kernel, indices, bias and positives, and their
      attributes `loss`, `num_labels` and `num_columns`.
    """
    layer, positives, num_labels = _check(x, kernel, indices, bias, positives, loss, num_labels, sparse)
    x, entries, kernel, indices, bias, num_columns = layer
    _native.register()
    attributes = {
        "loss": np.int64(LOSSES.index(loss)),
        "num_labels": np.int64(num_labels),
        "num_columns": num_columns,
    }
    operands = _native.match_varying_axes(x, *entries, kernel, indices, bias, positives)
    return operands, attributes


_SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(attributes, *operands):
    return _native.call("xla_ops.fan_in_loss.value", [_SCALAR], *operands, **dict(attributes))[0]


def _loss_fwd(attributes, *operands):
    wants_d_x = operands[0].perturbed
    operands = tuple(operand.value for operand in operands)
    x, _, _, _, kernel, _, bias, _ = operands
    results = [
        _SCALAR,
        d_x_shape(x, wants_d_x),
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (kernel, bias)),
    ]
    value, d_x, *d_layer = _native.call(
        "xla_ops.fan_in_loss.gradients", results, *operands, **dict(attributes)
    )
    return value, (d_x if wants_d_x else None, *d_layer)


def _loss_bwd(attributes, gradients, d_value):
    d_x, d_kernel, d_bias = (
        g if g is None else (d_value * g.astype(jnp.float32)).astype(g.dtype) for g in gradients
    )
    return d_x, None, None, None, d_kernel, None, d_bias, None


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)
