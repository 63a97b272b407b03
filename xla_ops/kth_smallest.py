"""Selection by magnitude, for rewiring."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xla_ops import _native
from xla_ops._arguments import VALUE_DTYPES, check_dtype


def kth_smallest_magnitude(x: ArrayLike, k: int) -> Array:
    """The k-th smallest |x| (k = 1 is the smallest), exactly, without sorting and without temporaries.

    Two counting passes over x.

    Args:
      x: array of any shape, float32 or bfloat16, without NaN.
      k: in 1..x.size.

    Returns:
      float32 scalar.

    Raises:
      TypeError, ValueError: x of another dtype, or k out of range.
    """
    x = jnp.asarray(x)
    check_dtype("x", x, VALUE_DTYPES)
    if not 1 <= k <= x.size:
        raise ValueError(f"k must be in 1..{x.size} (the size of x), got {k}")
    _native.cpu()
    result = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.ffi.ffi_call("xla_ops.kth_smallest", result, vmap_method="sequential")(x, k=np.int64(k))
