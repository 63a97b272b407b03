import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xla_ops import fan_in_matmul, index_dtype

GOOD = {
    "x": np.zeros((2, 5), np.float32),
    "kernel": np.zeros((4, 3), np.float32),
    "indices": np.zeros((4, 3), np.int32),
    "bias": np.zeros(4, np.float32),
}
WIDE = np.zeros((2, 65_537), np.float32)

# What is wrong, the arguments that are, and the error.
BAD = {
    "x of integers": (
        {"x": np.zeros((2, 5), np.int32)},
        TypeError,
        "x must have dtype float32 or bfloat16, got int32",
    ),
    "x in half precision": (
        {"x": np.zeros((2, 5), np.float16)},
        TypeError,
        "x must have dtype float32 or bfloat16, got float16",
    ),
    "x a scalar": (
        {"x": np.float32(1)},
        ValueError,
        "x must have at least 1 dimension(s), got shape []",
    ),
    "kernel of another dtype than x": (
        {"kernel": jnp.zeros((4, 3), jnp.bfloat16)},
        TypeError,
        "kernel must have dtype float32, got bfloat16",
    ),
    "kernel transposed": (
        {"kernel": np.zeros((3, 4), np.float32)},
        ValueError,
        "kernel must have shape [4, 3] (that of indices), got [3, 4]",
    ),
    "kernel of one row": (
        {"kernel": np.zeros(3, np.float32)},
        ValueError,
        "kernel must have shape [4, 3] (that of indices), got [3]",
    ),
    "indices of floats": (
        {"indices": np.zeros((4, 3), np.float32)},
        TypeError,
        "indices must have dtype uint16 or int32, got float32",
    ),
    "indices of unsupported integers": (
        {"indices": np.zeros((4, 3), np.int16)},
        TypeError,
        "indices must have dtype uint16 or int32, got int16",
    ),
    "indices of one row": (
        {"indices": np.zeros(3, np.int32)},
        ValueError,
        "indices must have shape [L, F] with F >= 1, got [3]",
    ),
    "indices without columns": (
        {"indices": np.zeros((4, 0), np.int32)},
        ValueError,
        "indices must have shape [L, F] with F >= 1, got [4, 0]",
    ),
    "indices too narrow for the features": (
        {"x": WIDE, "indices": np.zeros((4, 3), np.uint16)},
        TypeError,
        "indices must have dtype int32 where there are more than 65536 inputs, got uint16 for 65537",
    ),
    "bias of another dtype than x": (
        {"bias": jnp.zeros(4, jnp.bfloat16)},
        TypeError,
        "bias must have dtype float32, got bfloat16",
    ),
    "bias per input": (
        {"bias": np.zeros(5, np.float32)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [5]",
    ),
    "bias empty": (
        {"bias": np.zeros(0, np.float32)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [0]",
    ),
    "bias a column": (
        {"bias": np.zeros((4, 1), np.float32)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [4, 1]",
    ),
}


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(changes, error, message, traced):
    call = (lambda **arguments: jax.eval_shape(fan_in_matmul, **arguments)) if traced else fan_in_matmul
    with pytest.raises(error) as raised:
        call(**GOOD | changes)
    assert str(raised.value) == message


def test_good_arguments_pass():
    assert fan_in_matmul(**GOOD).shape == (2, 4)
    assert fan_in_matmul(**GOOD | {"x": WIDE[:, :-1], "indices": np.zeros((4, 3), np.uint16)}).shape == (2, 4)


@pytest.mark.parametrize(
    ("in_features", "expected"), [(1, jnp.uint16), (65_536, jnp.uint16), (65_537, jnp.int32)]
)
def test_index_dtype_is_the_narrowest(in_features, expected):
    assert index_dtype(in_features) == expected
