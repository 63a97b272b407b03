"""Conversion and validation of the arguments of ops, with errors raised in Python before XLA runs.

Dtypes and shapes are checked for traced values too. The values of traced arrays cannot be checked.
"""

import numbers
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

VALUE_DTYPES = (jnp.float32, jnp.bfloat16)
INDEX_DTYPES = (jnp.uint16, jnp.int32)
UINT16_FEATURES = 65_536
UINT32_MAX = 2**32 - 1


def index_dtype(in_features: int) -> DTypeLike:
    """Return the narrowest dtype of indices into `in_features` inputs: uint16 up to 65,536, else int32."""
    in_features = as_integer("in_features", in_features, 0, 2**31 - 1)
    return jnp.uint16 if in_features <= UINT16_FEATURES else jnp.int32


def as_array(name: str, value: ArrayLike, expected: str = "an array of numbers") -> Array:
    """Return `value` as a JAX array; a big-endian NumPy array is converted to native byte order.

    Args:
      name: name of the argument, for errors.
      value: an array, traced or not, a number, or nested lists of them.
      expected: description of the expected value, for errors.

    Raises:
      TypeError: `value` is not an array of numbers: None, a string, a masked array, a ragged list.
      ValueError: an integer is out of range of the dtype to which JAX converts it, int32 without x64.
    """
    if isinstance(value, Array):
        return jnp.asarray(value)
    if isinstance(value, str | bytes):  # JAX would read it as the name of a dtype
        raise TypeError(f"{name} must be {expected}, got {_describe(value)}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be {expected}, got a masked array: use its method filled")
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    try:
        array = jnp.asarray(value)
    except OverflowError as error:
        raise ValueError(f"{name} must hold integers that fit its dtype, got: {error}") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be {expected}, got {_describe(value)}") from error
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "iu" and value.size:
        limits = np.iinfo(array.dtype)  # JAX wraps 64-bit integers around without an error.
        for extreme in (value.min(), value.max()) if value.dtype != array.dtype else ():
            if not limits.min <= extreme <= limits.max:
                raise ValueError(f"{name} must hold integers that fit {array.dtype.name}, got {extreme}")
    return array


def as_integer(name: str, value: Any, low: int, high: int, why: str = "") -> int:
    """Return a static argument as an int.

    Args:
      name: name of the argument, for errors.
      value: an integer of Python or NumPy, or an integer array without axes; not a bool.
      low, high: bounds of the allowed values, inclusive.
      why: text after the range in the error, such as " (the size of x)".

    Raises:
      TypeError: `value` is not an integer, or traced.
      ValueError: `value` is out of range.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name} must be static under jit, an int, got a traced value")
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError("bool is a subclass of int")
        value = operator.index(value)
    except Exception as error:  # JAX raises its own class for a symbolic dimension.
        raise TypeError(f"{name} must be an integer, got {_describe(value)}") from error
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}{why}, got {value}")
    return value


def as_float(name: str, value: Any, *, below: float | None = None) -> np.float32:
    """Return a static argument as a finite float32 of at least 0 that is less than `below`, if given.

    Raises:
      TypeError: `value` is not a real number, or traced.
      ValueError: `value` is out of range once it is rounded to float32.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name} must be static under jit, a float, got a traced value")
    array = np.asarray(value if isinstance(value, numbers.Real | np.ndarray | np.generic | Array) else None)
    if array.ndim or not _is_real(array):
        raise TypeError(f"{name} must be a number, got {_describe(value)}")
    with np.errstate(over="ignore"):
        number = np.float32(array)
    if not (np.isfinite(number) and number >= 0 and (below is None or number < below)):
        expected = "finite and at least 0" if below is None else f"at least 0 and below {below:g} in float32"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return number


def as_uint32(name: str, value: ArrayLike) -> np.uint32 | Array:
    """Return an integer scalar as uint32.

    Traced arrays, and int32 arrays such as a wrapped step counter, are reduced to their lower 32 bits.

    Raises:
      TypeError: `value` is not an integer.
      ValueError: `value` is not a scalar, or not in 0..2**32 - 1.
    """
    if not (isinstance(value, Array) or hasattr(value, "__jax_array__")):
        return np.uint32(as_integer(name, value, 0, UINT32_MAX))
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer, got dtype {array.dtype.name}")
    check_shape(name, array, (), "a scalar")
    if array.dtype.itemsize > 4 and _is_concrete(array):
        as_integer(name, array, 0, UINT32_MAX)
    return jnp.asarray(array, jnp.uint32)


def _is_real(array: np.ndarray | Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)


def _is_concrete(value: Any) -> bool:
    """Return whether this process can read the values of a number or an array now."""
    if isinstance(value, jax.core.Tracer):
        return False
    return not isinstance(value, Array) or value.is_fully_addressable


def _describe(value: Any) -> str:
    """Describe a value of a wrong type in one short line, for errors."""
    if value is None or isinstance(value, bool | int | float | complex | np.bool_ | np.number):
        return str(value)
    if isinstance(value, np.ndarray | Array):
        return f"an array of dtype {value.dtype.name} and shape {list(value.shape)}"
    if isinstance(value, str) and len(value) <= 20:
        return repr(value)
    return f"a value of type {type(value).__name__}"


def _join_names(dtypes: Iterable[DTypeLike]) -> str:
    return " or ".join(jnp.dtype(d).name for d in dtypes)


def check_dtype(name: str, array: Array, dtypes: Iterable[DTypeLike]) -> None:
    """Raise TypeError unless `array` has one of `dtypes`."""
    if array.dtype not in [jnp.dtype(d) for d in dtypes]:
        raise TypeError(f"{name} must have dtype {_join_names(dtypes)}, got {array.dtype.name}")


def check_shape(name: str, array: Array, shape: tuple[int, ...], why: str) -> None:
    """Raise ValueError unless `array` has `shape`; `why` explains the shape in the error."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)} ({why}), got {list(array.shape)}")


def check_values(name: str, array: Array, *, ndim_at_least: int) -> None:
    """Raise TypeError or ValueError unless `array` is float32 or bfloat16 with enough axes."""
    check_dtype(name, array, VALUE_DTYPES)
    if array.ndim < ndim_at_least:
        raise ValueError(
            f"{name} must have at least {ndim_at_least} dimension(s), got shape {list(array.shape)}"
        )


def check_connections(
    kernel: Array, indices: Array, bias: Array | None, *, dtype: DTypeLike, in_features: int
) -> None:
    """Raise TypeError or ValueError unless kernel [L, F], indices [L, F] and bias ([L] or None) fit inputs.

    Args:
      kernel, indices, bias: the arrays of the layer.
      dtype: dtype of the inputs.
      in_features: number of inputs.
    """
    check_dtype("kernel", kernel, [dtype])
    check_dtype("indices", indices, INDEX_DTYPES)
    if indices.ndim != 2 or indices.shape[1] < 1:
        raise ValueError(f"indices must have shape [L, F] with F >= 1, got {list(indices.shape)}")
    check_shape("kernel", kernel, indices.shape, "that of indices")
    if bias is not None:
        check_dtype("bias", bias, [dtype])
        check_shape("bias", bias, indices.shape[:1], "one per row of indices")
    if indices.dtype == jnp.uint16 and in_features > UINT16_FEATURES:
        raise TypeError(
            f"indices must have dtype int32 where there are more than {UINT16_FEATURES} inputs, "
            f"got uint16 for {in_features}"
        )


def next_step(state: Any, state_type: type[Any]) -> Array:
    """Return the number of the next step, from 1, after checking that `state` is of type `state_type`."""
    if not isinstance(state, state_type):
        raise TypeError(f"state must be of type {state_type.__name__}, got {type(state).__name__}")
    count = as_array("state.count", state.count)
    check_dtype("state.count", count, [jnp.int32])
    check_shape("state.count", count, (), "a scalar")
    return count + 1


def as_learning_rate(learning_rate: ArrayLike) -> Array:
    """Return the learning rate as a float32 scalar; raise an error unless it is a finite number."""
    rate = as_array("learning_rate", learning_rate, "a number")
    if not _is_real(rate):
        raise TypeError(f"learning_rate must be a number, got {_describe(learning_rate)}")
    check_shape("learning_rate", rate, (), "a scalar")
    # Check a number before its conversion, because under jit its conversion is traced.
    value = learning_rate if isinstance(learning_rate, numbers.Real | np.ndarray | np.generic) else rate
    if _is_concrete(value):
        with np.errstate(over="ignore"):
            if not np.isfinite(np.asarray(value).astype(np.float32)):
                raise ValueError(f"learning_rate must be finite in float32, got {learning_rate}")
    return jnp.asarray(rate, jnp.float32)


def adam_attributes(b1: float, b2: float, epsilon: float) -> dict[str, np.float32]:
    """Return the attributes of Adam's handlers; raise an error unless b1 and b2 are below 1 in float32."""
    return {
        "b1": as_float("b1", b1, below=1),
        "b2": as_float("b2", b2, below=1),
        "epsilon": as_float("epsilon", epsilon),
    }


def adam_rates(learning_rate: ArrayLike, count: Array, b1: np.float32, b2: np.float32) -> Array:
    """Return the rates of Adam's handlers for step `count` (from 1), float32 [3].

    They are the learning rate, and the bias-correction factors of both moments.
    """
    t = count.astype(jnp.float32)
    return jnp.stack([as_learning_rate(learning_rate), 1 / (1 - b1**t), 1 / (1 - b2**t)])


def rounding_key(seed: ArrayLike, step: ArrayLike, **counters: ArrayLike) -> Array:
    """Return the key of stochastic rounding for the handlers, uint32 [3 + number of counters].

    Args:
      seed: integer scalar, the lower word of the seed; the upper word is 0.
      step: integer scalar, the number of the step.
      counters: further integer scalars of the key, by argument name.
    """
    words = [as_uint32("seed", seed), np.uint32(0), as_uint32("step", step)]
    words += [as_uint32(name, value) for name, value in counters.items()]
    if any(isinstance(word, Array) for word in words):
        return jnp.stack(words)
    return jnp.asarray(np.stack(words))
