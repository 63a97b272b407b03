"""The inputs of a fixed fan-in layer: dense ones, and sparse ones behind them in the same index space."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xla_ops._arguments import check_dtype, check_shape, check_values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseInputs:
    """Sparse inputs [B, C] of a batch, such as the words of its texts, as one flat list of entries.

    An op that takes x [B, D] and these reads input i of an example from x if i < D, else from column i - D
    here. What a batch has no entry of costs nothing: it is 0, and is neither gathered nor gets a gradient.

    Attributes:
      rows: int32 [N], which example an entry is of. Entries out of range, of rows or columns, are padding.
      columns: int32 [N], in 0..C-1.
      values: [N], of x's dtype. Entries of the same row and column are added. Not differentiable.
      num_columns: C (static under `jit`).
    """

    rows: ArrayLike
    columns: ArrayLike
    values: ArrayLike
    num_columns: int = dataclasses.field(metadata={"static": True})

    def densify(self, batch: int) -> Array:
        """The same as an array [B, C], for B examples."""
        rows, columns, values = (jnp.asarray(a) for a in (self.rows, self.columns, self.values))
        inside = (rows >= 0) & (rows < batch) & (columns >= 0) & (columns < self.num_columns)
        dense = jnp.zeros((batch, self.num_columns), values.dtype)
        return dense.at[jnp.where(inside, rows, batch), columns].add(values, mode="drop")


def in_features(x: Array, sparse: SparseInputs | None) -> int:
    """The number of inputs, dense and sparse."""
    return x.shape[-1] + (0 if sparse is None else sparse.num_columns)


def check_sparse(sparse: SparseInputs | None, x: Array) -> tuple[tuple[Array, Array, Array], np.int64]:
    """Checks sparse inputs beside x [B, D].

    Returns:
      rows, columns and values as the handlers take them, and `num_columns` as their attribute; where there
      are no sparse inputs, arrays of no entries and 0.
    """
    if sparse is None:
        nothing = jnp.zeros(0, jnp.int32)
        return (nothing, nothing, jnp.zeros(0, x.dtype)), np.int64(0)
    rows, columns, values = (jnp.asarray(a) for a in (sparse.rows, sparse.columns, sparse.values))
    if sparse.num_columns < 0 or x.shape[-1] + sparse.num_columns > np.iinfo(np.int32).max:
        raise ValueError(
            f"sparse.num_columns must be at least 0, and fit int32 indices, got {sparse.num_columns}"
        )
    check_dtype("sparse.rows", rows, [jnp.int32])
    check_dtype("sparse.columns", columns, [jnp.int32])
    check_values("sparse.values", values, ndim_at_least=1)
    check_dtype("sparse.values", values, [x.dtype])
    for name, array in (("rows", rows), ("columns", columns)):
        check_shape(f"sparse.{name}", array, (values.size,), "one per value")
    check_shape("sparse.values", values, (values.size,), "a flat list")
    return (rows, columns, _constant(values)), np.int64(sparse.num_columns)


def gradient_of(x: Array, wanted: bool) -> jax.ShapeDtypeStruct:
    """The result of a handler for the gradient of x [B, D]: of no elements where nobody asks for it."""
    return jax.ShapeDtypeStruct(x.shape if wanted else (0, 0), x.dtype)


def with_sparse(x: ArrayLike, sparse: SparseInputs | None) -> Array:
    """All inputs [..., D + C] in one array, for references."""
    x = jnp.asarray(x)
    if sparse is None:
        return x
    examples = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    both = jnp.concatenate([examples, sparse.densify(examples.shape[0])], axis=1)
    return both.reshape(*x.shape[:-1], both.shape[1])


@jax.custom_jvp
def _constant(values: Array) -> Array:
    return values


@_constant.defjvp
def _not_differentiable(primals, tangents):
    raise TypeError("sparse.values have no gradient: use jax.lax.stop_gradient on what they are made of")
