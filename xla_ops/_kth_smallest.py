"""Selection of the k-th smallest magnitude, for rewiring."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xla_ops import _native
from xla_ops._arguments import VALUE_DTYPES, as_array, as_integer, check_dtype
from xla_ops._partition import partitioned

_HANDLER = "xla_ops.kth_smallest"


def kth_smallest_magnitude(x: ArrayLike, k: int, *, axes: tuple[str, ...] = ()) -> Array:
    """Return the k-th smallest |x| (k = 1 is the smallest), exactly and without sorting.

    It takes two counting passes over x on a CPU, three on a GPU, without temporaries of its size.

    Args:
      x: array of any shape, float32 or bfloat16, without NaN.
      k: in 1..x.size, or up to the total size of all shards with `axes`.
      axes: within `jax.shard_map`, the mesh axes over which an array is sharded evenly; the result is for the
        whole array. This takes 31 passes over x, and as many sums of two numbers over devices.

    Returns:
      float32 scalar.

    Raises:
      TypeError, ValueError: x has another dtype, or k is out of range.
    """
    x, k = _check(x, k, axes)
    if axes:
        return _bisect(x, k, axes)
    _native.register()

    def native(x, workspace=()):
        mesh, axis_type = jax.sharding.get_abstract_mesh(), jax.typeof(x).manual_axis_type
        replicated = None if mesh.empty else jax.NamedSharding(mesh, jax.P())
        types = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=replicated, manual_axis_type=axis_type)
            for shape, dtype in [((), jnp.float32), *workspace]
        ]
        return jax.ffi.ffi_call(_HANDLER, types, vmap_method="sequential")(x, k=np.int64(k))[0]

    def on_any_platform(x):
        if _native.cuda() is None:
            reference = functools.partial(_bisect, k=k, axes=())
            return (jax.lax.platform_dependent(x, cpu=native, default=reference),)
        from xla_ops import _cuda  # which exists only if it was built with nvcc

        size = _cuda.workspace_bytes(_HANDLER, x.dtype == jnp.bfloat16, 0, 0, 0, 0, 0, 0, 0)
        on_cuda = functools.partial(native, workspace=[((size,), jnp.uint8)])
        return (jax.lax.platform_dependent(x, cuda=on_cuda, default=native),)

    return partitioned(_HANDLER, [jax.ShapeDtypeStruct((), jnp.float32)], lambda _: on_any_platform, x)[0]


def kth_smallest_magnitude_reference(x: ArrayLike, k: int, *, axes: tuple[str, ...] = ()) -> Array:
    """Compute `kth_smallest_magnitude` with plain `jax.numpy`. Same arguments and result."""
    x, k = _check(x, k, axes)
    return _bisect(x, k, axes)


def _check(x: ArrayLike, k: int, axes: tuple[str, ...]) -> tuple[Array, int]:
    x = as_array("x", x)
    check_dtype("x", x, VALUE_DTYPES)
    size = x.size * math.prod(jax.lax.axis_size(axis) for axis in axes)
    return x, as_integer("k", k, 1, size, " (the size of x)")


def _bisect(x: Array, k: int, axes: tuple[str, ...]) -> Array:
    """Bisect on the bits, which have the order of |x|; k may exceed the size of x with `axes`."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)

    def halve(_, bounds):  # Invariant: the bits of the answer are in low..high.
        low, high = bounds
        middle = low + (high - low) // 2
        count = jnp.sum(bits <= middle, dtype=jnp.uint32)
        # Sum 16-bit halves, because all shards together may have more elements than uint32 can count.
        upper, lower = count >> 16, count & 0xFFFF
        if axes:
            upper, lower = jax.lax.psum((upper, lower), axes)
        upper, lower = upper + (lower >> 16), lower & 0xFFFF
        enough = (upper > k >> 16) | ((upper == k >> 16) & (lower >= k & 0xFFFF))
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = jnp.uint32(0), jnp.uint32(0x7F800000)
    if not axes:  # With axes, the bounds are the same on all devices.
        _, low, high = _native.match_varying_axes(bits, *bounds)
        bounds = (low, high)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, bounds)[0], jnp.float32)
