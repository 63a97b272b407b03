"""Argument checks that the ops share: raised in Python, before XLA sees anything."""

import jax.numpy as jnp

VALUE_DTYPES = (jnp.float32, jnp.bfloat16)
INDEX_DTYPES = (jnp.uint16, jnp.int32)
UINT16_FEATURES = 65_536


def index_dtype(in_features: int):
    """The narrowest dtype of indices into `in_features` inputs: uint16 up to 65,536 of them, else int32."""
    return jnp.uint16 if in_features <= UINT16_FEATURES else jnp.int32


def _names(dtypes) -> str:
    return " or ".join(jnp.dtype(d).name for d in dtypes)


def check_dtype(name: str, array, dtypes) -> None:
    """Raises TypeError unless `array` has one of `dtypes`."""
    if array.dtype not in [jnp.dtype(d) for d in dtypes]:
        raise TypeError(f"{name} must have dtype {_names(dtypes)}, got {array.dtype.name}")


def check_shape(name: str, array, shape: tuple[int, ...], why: str) -> None:
    """Raises ValueError unless `array` has `shape`; `why` says what fixes that shape."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)} ({why}), got {list(array.shape)}")


def check_values(name: str, array, *, ndim_at_least: int) -> None:
    """Raises unless `array` holds float32 or bfloat16 values in at least so many dimensions."""
    check_dtype(name, array, VALUE_DTYPES)
    if array.ndim < ndim_at_least:
        raise ValueError(
            f"{name} must have at least {ndim_at_least} dimension(s), got shape {list(array.shape)}"
        )


def check_connections(kernel, indices, bias, *, dtype, in_features: int) -> None:
    """Raises unless kernel [L, F], indices [L, F] and bias ([L] or None) fit inputs of `dtype`."""
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


def next_step(state, kind):
    """The number of the step, from 1, after Adam's `state`; raises unless that is a `kind` with a count."""
    if not isinstance(state, kind):
        raise TypeError(f"state must be of type {kind.__name__}, got {type(state).__name__}")
    count = jnp.asarray(state.count)
    check_dtype("state.count", count, [jnp.int32])
    check_shape("state.count", count, (), "a scalar")
    return count + 1


def check_rate(learning_rate):
    """The learning rate as a float32 scalar; raises if it has a shape."""
    rate = jnp.asarray(learning_rate, jnp.float32)
    check_shape("learning_rate", rate, (), "a scalar")
    return rate


def adam_rates(learning_rate, count, b1: float, b2: float):
    """What the handlers of Adam take as rates, float32 [3], for step `count` (from 1).

    The learning rate, and the factors that undo the moments' start at 0.
    """
    t = count.astype(jnp.float32)
    return jnp.stack([check_rate(learning_rate), 1 / (1 - b1**t), 1 / (1 - b2**t)])


def rounding_key(seed, step, *more):
    """What the handlers take as the key of stochastic rounding, uint32 [3 + ...], from integer scalars."""
    return jnp.stack([jnp.asarray(a, jnp.uint32) for a in (seed, 0, step, *more)])
