"""The inputs of a fixed fan-in layer: dense ones, and sparse ones behind them in the same index space."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xla_ops._arguments import (
    as_array,
    as_integer,
    check_connections,
    check_dtype,
    check_shape,
    check_values,
)

_INT32_MAX = 2**31 - 1


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
        """Returns the same inputs as an array [B, C], for B examples.

        Raises:
          TypeError, ValueError: for an attribute of the wrong dtype or shape, or a batch out of range.
        """
        rows, columns, values = check_entries(self)
        batch = as_integer("batch", batch, 0, _INT32_MAX)
        inside = (rows >= 0) & (rows < batch) & (columns >= 0) & (columns < self.num_columns)
        dense = jnp.zeros((batch, self.num_columns), values.dtype)
        return dense.at[jnp.where(inside, rows, batch), columns].add(values, mode="drop")


class Layer(NamedTuple):
    """The arguments of a fixed fan-in layer, converted to arrays and checked, as the handlers take them.

    Attributes:
      x: [..., D], float32 or bfloat16.
      entries: rows, columns and values of the sparse inputs; of no entries where there are none.
      kernel: [L, F], of x's dtype.
      indices: [L, F], uint16 or int32.
      bias: [L], of x's dtype; [0] for none.
      num_columns: the handlers' attribute C; 0 where there are no sparse inputs.
    """

    x: Array
    entries: tuple[Array, Array, Array]
    kernel: Array
    indices: Array
    bias: Array
    num_columns: np.int64


def check_layer(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None,
    sparse: SparseInputs | None,
    *,
    ndim_at_least: int = 1,
) -> Layer:
    """Converts and checks the arguments that all ops of a fixed fan-in layer have.

    Raises:
      TypeError, ValueError: for an argument of the wrong type, dtype or shape, naming it.
    """
    x, kernel, indices = as_array("x", x), as_array("kernel", kernel), as_array("indices", indices)
    bias = None if bias is None else as_array("bias", bias)
    check_values("x", x, ndim_at_least=ndim_at_least)
    nothing = jnp.zeros(0, jnp.int32)
    entries, num_columns = (nothing, nothing, jnp.zeros(0, x.dtype)), 0
    if sparse is not None:
        (rows, columns, values), num_columns = check_entries(sparse, x), sparse.num_columns
        entries = (rows, columns, _constant(values))
    check_connections(kernel, indices, bias, dtype=x.dtype, in_features=x.shape[-1] + num_columns)
    bias = jnp.zeros(0, x.dtype) if bias is None else bias
    return Layer(x, entries, kernel, indices, bias, np.int64(num_columns))


def check_entries(sparse: SparseInputs, x: Array | None = None) -> tuple[Array, Array, Array]:
    """Returns rows, columns and values of sparse inputs as checked arrays, which fit x [..., D] if given."""
    if not isinstance(sparse, SparseInputs):
        raise TypeError(f"sparse must be SparseInputs or None, got a value of type {type(sparse).__name__}")
    rows, columns, values = (
        as_array(f"sparse.{name}", getattr(sparse, name)) for name in ("rows", "columns", "values")
    )
    most = _INT32_MAX - (0 if x is None else x.shape[-1])
    as_integer("sparse.num_columns", sparse.num_columns, 0, most, " (beside x, for int32 indices)")
    check_dtype("sparse.rows", rows, [jnp.int32])
    check_dtype("sparse.columns", columns, [jnp.int32])
    check_values("sparse.values", values, ndim_at_least=1)
    if x is not None:
        check_dtype("sparse.values", values, [x.dtype])
    for name, array in (("rows", rows), ("columns", columns)):
        check_shape(f"sparse.{name}", array, (values.size,), "one per value")
    check_shape("sparse.values", values, (values.size,), "a flat list")
    return rows, columns, values


def gradient_of(x: Array, wanted: bool) -> jax.ShapeDtypeStruct:
    """The result of a handler for the gradient of x [B, D]: of no elements where nobody asks for it."""
    return jax.ShapeDtypeStruct(x.shape if wanted else (0, 0), x.dtype)


def with_sparse(x: Array, sparse: SparseInputs | None) -> Array:
    """Returns all inputs [..., D + C] in one array, for references."""
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
