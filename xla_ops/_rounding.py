"""Stochastic rounding to bfloat16, with the random bits of the ops that update weights in place."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from xla_ops._arguments import UINT32_MAX, as_array, as_integer, as_uint32, check_dtype, rounding_key


def round_stochastically(
    x: ArrayLike,
    seed: ArrayLike,
    step: ArrayLike,
    *,
    first: int = 0,
    row_length: int | None = None,
    first_row: ArrayLike = 0,
) -> Array:
    """Round to bfloat16, up or down at random with probabilities that make the result exact on average.

    A value is rounded exactly as in `fan_in_sgd_step` and `dense_adam_step`, given the same seed, step and
    position. Column n of row r has the position `first + (first_row + r) * row_length + n`, where all axes
    but the last form the rows. The positions of their arrays are:

    - kernel [L, F] of `fan_in_sgd_step`: the defaults here; its bias [L]: `first=L * F`.
    - shard of these arrays that begins with the label `first_label`: the kernel: `first_row=first_label`; its
      bias: `x[:, None]`, `first=L * F` with the L of the whole layer, `first_row=first_label`.
    - second moment [D, O] of `dense_adam_step`: a `row_length` of O rounded up to a multiple of 128.

    Values that bfloat16 represents exactly, infinity and NaN do not change. Computed with plain `jax.numpy`,
    on 32-bit integers; the gradient is 0, as for `jax.numpy.round`.

    Args:
      x: [..., N], float32.
      seed: uint32 scalar, the seed.
      step: uint32 or int32 scalar; with one seed, each rounding of a value must have a different step.
      first: position of the first value, at least 0.
      row_length: number of positions between the starts of rows, N to 2**32 - 1; None for N.
      first_row: uint32 scalar, the number of the first row, if the rows are a part of a matrix.

    Returns:
      x in bfloat16.

    Raises:
      TypeError, ValueError: an argument has a wrong dtype or shape, or is out of range; the message names it.

    Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, for the generator
    Philox4x32-10; `csrc/rounding.h` defines which of its bits belong to a position.
    """
    x = as_array("x", x)
    check_dtype("x", x, [jnp.float32])
    if x.ndim < 1:
        raise ValueError("x must have at least 1 dimension(s), got shape []")
    columns = x.shape[-1]
    row_length = as_integer("row_length", columns if row_length is None else row_length, columns, UINT32_MAX)
    first = as_integer("first", first, 0, 2**64 - 1)
    return _round(x, rounding_key(seed, step), as_uint32("first_row", first_row), first, row_length)


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def _round(x, key, first_row, first, row_length):
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    random = _rounding_bits(key, *_positions(rows.shape, first_row, first, row_length))
    is_nan = jnp.isnan(rows)  # The addition could overflow the bits of a NaN to 0.
    rounded = jnp.where(is_nan, bits | np.uint32(0x400000), bits + random) >> np.uint32(16)
    return jax.lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16).reshape(x.shape)


def _positions(shape: tuple[int, int], first_row: Array, first: int, row_length: int) -> tuple[Array, Array]:
    """Return the high and the low word of each position."""
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    row += first_row
    first_high, first_low = np.uint32(first >> 32), np.uint32(first & 0xFFFFFFFF)
    high, start = _product(row, np.uint32(row_length))
    low = start + column
    high += first_high + (low < start).astype(jnp.uint32)
    low += first_low
    return high + (low < first_low).astype(jnp.uint32), low


def _rounding_bits(key: Array, high: Array, low: Array) -> Array:
    """Return 16 random bits for each position: a run of 128 positions shares 16 counters of 4 words each."""

    def bits(first, count):
        return (low >> np.uint32(first)) & np.uint32(2**count - 1)

    run_high, run_low = high >> np.uint32(7), high << np.uint32(25) | low >> np.uint32(7)
    counter_high = run_high << np.uint32(4) | run_low >> np.uint32(28)
    counter_low = run_low << np.uint32(4) | bits(0, 4)
    word = jax.lax.select_n(bits(5, 2).astype(jnp.int32), *_philox(key, counter_high, counter_low))
    return (word >> (bits(4, 1) * np.uint32(16))) & np.uint32(0xFFFF)


def _philox(key: Array, counter_high: Array, counter_low: Array) -> tuple[Array, ...]:
    """Return the four words of Philox4x32-10 for each counter; `key` has two words of seed and the step."""
    k0, k1, step = key
    c0, c1, c2, c3 = counter_low, counter_high, jnp.full_like(counter_low, step), jnp.zeros_like(counter_low)
    for _ in range(10):
        high0, low0 = _product(c0, np.uint32(0xD2511F53))
        high1, low1 = _product(c2, np.uint32(0xCD9E8D57))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + np.uint32(0x9E3779B9), k1 + np.uint32(0xBB67AE85)
    return c0, c1, c2, c3


def _product(a: Array, b: np.uint32) -> tuple[Array, Array]:
    """Return the high and the low word of a * b, computed by half words, as no wider type is available."""
    half = np.uint32(0xFFFF)
    a_high, a_low, b_high, b_low = a >> np.uint32(16), a & half, b >> np.uint32(16), b & half
    middle = a_high * b_low + (a_low * b_low >> np.uint32(16))
    other = a_low * b_high + (middle & half)
    return a_high * b_high + (middle >> np.uint32(16)) + (other >> np.uint32(16)), a * b
