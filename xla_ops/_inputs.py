"""Inputs of a fixed fan-in layer: dense inputs, followed by sparse inputs in the same index space."""

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
    """Sparse inputs [B, C] of a batch, such as bags of words, as a flat list of entries.

    An op with the inputs x [B, D] and sparse inputs reads input i of a point from x if i < D, else from
    column i - D of the sparse inputs. Missing entries are 0 and take neither memory nor time.

    Attributes:
      rows: int32 [N], the point of each entry. Entries with rows or columns out of range are padding.
      columns: int32 [N], the column of each entry, in 0..C-1.
      values: [N], of x's dtype. Values of equal row and column are added. Not differentiable: they are data,
        and no op computes their gradient.
      num_columns: C, the number of columns (static under `jit`).
    """

    rows: ArrayLike
    columns: ArrayLike
    values: ArrayLike
    num_columns: int = dataclasses.field(metadata={"static": True})

    def densify(self, batch: int) -> Array:
        """Return the inputs as a dense array [B, C].

        Args:
          batch: B, the number of points.

        Raises:
          TypeError, ValueError: an attribute has a wrong dtype or shape, or `batch` is out of range.
        """
        rows, columns, values = check_entries(self)
        batch = as_integer("batch", batch, 0, _INT32_MAX)
        inside = (rows >= 0) & (rows < batch) & (columns >= 0) & (columns < self.num_columns)
        dense = jnp.zeros((batch, self.num_columns), values.dtype)
        return dense.at[jnp.where(inside, rows, batch), columns].add(values, mode="drop")


class Layer(NamedTuple):
    """The checked arguments of a fixed fan-in layer, as arrays for the handlers.

    Attributes:
      x: [..., D], float32 or bfloat16.
      entries: rows, columns and values of the sparse inputs; empty arrays without sparse inputs.
      kernel: [L, F], of x's dtype.
      indices: [L, F], uint16 or int32.
      bias: [L], of x's dtype; [0] for none.
      num_columns: C, an attribute of the handlers; 0 without sparse inputs.
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
    """Convert and check the common arguments of all ops of a fixed fan-in layer.

    Raises:
      TypeError, ValueError: an argument has a wrong type, dtype or shape; the message names it.
    """
    x, kernel, indices = as_array("x", x), as_array("kernel", kernel), as_array("indices", indices)
    bias = None if bias is None else as_array("bias", bias)
    check_values("x", x, ndim_at_least=ndim_at_least)
    empty = jnp.zeros(0, jnp.int32)
    entries, num_columns = (empty, empty, jnp.zeros(0, x.dtype)), 0
    if sparse is not None:
        (rows, columns, values), num_columns = check_entries(sparse, x), sparse.num_columns
        entries = (rows, columns, _not_differentiable(values))
    check_connections(kernel, indices, bias, dtype=x.dtype, in_features=x.shape[-1] + num_columns)
    bias = jnp.zeros(0, x.dtype) if bias is None else bias
    return Layer(x, entries, kernel, indices, bias, np.int64(num_columns))


def check_entries(sparse: SparseInputs, x: Array | None = None) -> tuple[Array, Array, Array]:
    """Return the checked rows, columns and values of sparse inputs, which must fit x [..., D] if given."""
    if not isinstance(sparse, SparseInputs):
        raise TypeError(f"sparse must be SparseInputs or None, got a value of type {type(sparse).__name__}")
    rows, columns, values = (
        as_array(f"sparse.{name}", getattr(sparse, name)) for name in ("rows", "columns", "values")
    )
    limit = _INT32_MAX - (0 if x is None else x.shape[-1])
    as_integer("sparse.num_columns", sparse.num_columns, 0, limit, " (beside x, for int32 indices)")
    check_dtype("sparse.rows", rows, [jnp.int32])
    check_dtype("sparse.columns", columns, [jnp.int32])
    check_values("sparse.values", values, ndim_at_least=1)
    if x is not None:
        check_dtype("sparse.values", values, [x.dtype])
    for name, array in (("rows", rows), ("columns", columns)):
        check_shape(f"sparse.{name}", array, (values.size,), "one per value")
    check_shape("sparse.values", values, (values.size,), "a flat list")
    return rows, columns, values


def d_x_shape(x: Array, wants_d_x: bool) -> jax.ShapeDtypeStruct:
    """Return the shape of the gradient of x [B, D] that a handler computes; empty unless `wants_d_x`."""
    return jax.ShapeDtypeStruct(x.shape if wants_d_x else (0, 0), x.dtype)


def all_inputs(x: Array, sparse: SparseInputs | None) -> Array:
    """Return the dense and the sparse inputs in one array [..., D + C], for reference implementations."""
    if sparse is None:
        return x
    examples = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    both = jnp.concatenate([examples, sparse.densify(examples.shape[0])], axis=1)
    return both.reshape(*x.shape[:-1], both.shape[1])


@jax.custom_jvp
def _not_differentiable(values: Array) -> Array:
    return values


@_not_differentiable.defjvp
def _raise(primals, tangents):
    raise TypeError(
        "sparse.values have no gradient: use jax.lax.stop_gradient on the arrays that they are computed from"
    )
