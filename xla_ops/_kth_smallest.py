"""Selection by magnitude, for rewiring."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xla_ops import _native
from xla_ops._arguments import VALUE_DTYPES, check_dtype


def kth_smallest_magnitude(x: ArrayLike, k: int) -> Array:
    """The k-th smallest |x| (k = 1 is the smallest), exactly and without sorting.

    On a CPU, two counting passes over x, without temporaries; elsewhere `kth_smallest_magnitude_reference`.

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
    _native.register()

    def native(x):
        result = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.ffi.ffi_call("xla_ops.kth_smallest", result, vmap_method="sequential")(x, k=np.int64(k))

    return jax.lax.platform_dependent(x, cpu=native, default=lambda x: kth_smallest_magnitude_reference(x, k))


def kth_smallest_magnitude_reference(x: ArrayLike, k: int) -> Array:
    """`kth_smallest_magnitude` in plain `jax.numpy`: bisects on the bits, which are in the order of |x|."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(jnp.asarray(x).astype(jnp.float32)), jnp.uint32)

    def halve(_, bounds):  # the answer's bits are in low..high
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle, dtype=jnp.int32) >= k
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = jnp.uint32(0), jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, bounds)[0], jnp.float32)
