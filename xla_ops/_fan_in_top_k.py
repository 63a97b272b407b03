"""Ranking of the labels of a fixed fan-in output layer, in one pass over all labels."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xla_ops import _native
from xla_ops._arguments import as_integer
from xla_ops._fan_in_matmul import matmul_in_jnp
from xla_ops._inputs import Layer, SparseInputs, all_inputs, check_layer


def fan_in_top_k(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    k: int,
    *,
    sparse: SparseInputs | None = None,
) -> tuple[Array, Array]:
    """Return the k largest values of `fan_in_matmul(x, kernel, indices, bias)` per row, and their labels.

    The logits [..., L] are never stored. Not differentiable.

    Args:
      x: [..., D], float32 or bfloat16.
      kernel: [L, F], of x's dtype.
      indices: [L, F], uint16 (for D + C <= 65,536) or int32, where C is the number of columns of `sparse`, or
        0; indices outside [0, D + C) contribute nothing.
      bias: [L], of x's dtype, or None.
      k: number of labels to return, from 0 to L.
      sparse: C further inputs, numbered D to D + C - 1, of the rows of x in order; or None.

    Returns:
      Scores float32 [..., k], descending, and labels int32 [..., k]. Of labels with equal scores, the lower
      one comes first. Labels with scores NaN or -inf are never chosen: missing entries have the score -inf
      and the label -1.

    Raises:
      TypeError, ValueError: an argument has a wrong dtype or shape; the message names it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import xla_ops
      >>> x = jnp.array([[1.0, 10.0, 100.0]])
      >>> kernel = jnp.ones((4, 2))
      >>> indices = jnp.array([[0, 1], [1, 2], [2, 0], [0, 0]])  # each label reads two of three inputs
      >>> xla_ops.fan_in_matmul(x, kernel, indices).tolist()
      [[11.0, 110.0, 101.0, 2.0]]
      >>> scores, labels = xla_ops.fan_in_top_k(x, kernel, indices, None, 2)
      >>> labels.tolist()
      [[1, 2]]
    """
    (x, entries, kernel, indices, bias, num_columns), k = _check(x, kernel, indices, bias, k, sparse)
    _native.register()
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    results = [jax.ShapeDtypeStruct((rows.shape[0], k), dtype) for dtype in (jnp.float32, jnp.int32)]
    operands = _native.match_varying_axes(rows, *entries, kernel, indices, bias)
    scores, labels = _native.call("xla_ops.fan_in_top_k", results, *operands, num_columns=num_columns)
    return scores.reshape(*x.shape[:-1], k), labels.reshape(*x.shape[:-1], k)


def fan_in_top_k_reference(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    k: int,
    *,
    sparse: SparseInputs | None = None,
) -> tuple[Array, Array]:
    """Compute `fan_in_top_k` with plain `jax.numpy`, storing all logits. Same arguments and result."""
    (x, _, kernel, indices, bias, _), k = _check(x, kernel, indices, bias, k, sparse)
    x, kernel = all_inputs(x, sparse).astype(jnp.float32), kernel.astype(jnp.float32)
    scores, labels = jax.lax.top_k(matmul_in_jnp(x, kernel, indices, bias), k)
    return scores, labels


def _check(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    k: int,
    sparse: SparseInputs | None,
) -> tuple[Layer, int]:
    layer = check_layer(x, kernel, indices, bias, sparse)
    return layer, as_integer("k", k, 0, layer.kernel.shape[0], " (the number of labels)")
