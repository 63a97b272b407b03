import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
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


# ---- all ops: arguments that are not arrays or numbers, and numbers out of range ----

SPARSE = xla_ops.SparseInputs(np.zeros(2, np.int32), np.ones(2, np.int32), np.ones(2, np.float32), 3)
MATRIX = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
LAYER = GOOD | {"sparse": SPARSE}
LOSS = LAYER | {"positives": np.array([[1, 2], [3, -1]], np.int32), "num_labels": 4}
ADAM = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "epsilon": 1e-7}

# Every op, and arguments that it takes.
OPS = {
    "fan_in_matmul": (xla_ops.fan_in_matmul, LAYER),
    "fan_in_matmul_reference": (xla_ops.fan_in_matmul_reference, LAYER),
    "fan_in_loss": (xla_ops.fan_in_loss, LOSS),
    "fan_in_loss_reference": (xla_ops.fan_in_loss_reference, LOSS),
    "fan_in_top_k": (xla_ops.fan_in_top_k, LAYER | {"k": 2}),
    "fan_in_top_k_reference": (xla_ops.fan_in_top_k_reference, LAYER | {"k": 2}),
    "fan_in_adam_step": (
        xla_ops.fan_in_adam_step,
        LOSS | ADAM | {"state": xla_ops.adam_init(GOOD["kernel"], GOOD["bias"])},
    ),
    "fan_in_sgd_step": (
        xla_ops.fan_in_sgd_step,
        LOSS | {"learning_rate": 0.1, "seed": 1, "step": 2, "first_label": 3},
    ),
    "dense_adam_step": (
        xla_ops.dense_adam_step,
        ADAM
        | {"x": MATRIX, "dy": MATRIX, "kernel": MATRIX.T @ MATRIX, "seed": 1, "before": MATRIX}
        | {"state": xla_ops.dense_adam_init(MATRIX.T @ MATRIX)},
    ),
    "round_stochastically": (
        xla_ops.round_stochastically,
        {"x": MATRIX, "seed": 1, "step": 2, "first": 4, "row_length": 5, "first_row": 6},
    ),
    "kth_smallest_magnitude": (xla_ops.kth_smallest_magnitude, {"x": MATRIX, "k": 2}),
    "kth_smallest_magnitude_reference": (
        xla_ops.kth_smallest_magnitude_reference,
        {"x": MATRIX, "k": 2},
    ),
    "adam_init": (xla_ops.adam_init, {"kernel": GOOD["kernel"], "bias": GOOD["bias"]}),
    "dense_adam_init": (xla_ops.dense_adam_init, {"kernel": GOOD["kernel"]}),
    "densify": (xla_ops.SparseInputs.densify, {"self": SPARSE, "batch": 2}),
    "index_dtype": (index_dtype, {"in_features": 5}),
}

ARRAYS = ("x", "kernel", "indices", "bias", "positives", "dy", "before")
BAD_ARRAYS = {
    "None": (None, "an array of numbers, got None"),
    "a string": ("abc", "an array of numbers, got 'abc'"),
    "strings": (np.array(["a", "b"]), "an array of numbers, got an array of dtype str32 and shape [2]"),
    "objects": (np.array([None]), "an array of numbers, got an array of dtype object and shape [1]"),
    "a ragged list": ([[1.0], [1.0, 2.0]], "an array of numbers, got a value of type list"),
    "masked": (np.ma.zeros(3), "an array of numbers, got a masked array: use its method filled"),
}
STATIC_INTEGERS = ("k", "num_labels", "first", "row_length", "batch", "in_features")
UINT32 = ("seed", "step", "first_label", "first_row")
BAD_INTEGERS = {
    "6.5": (6.5, TypeError, "an integer, got 6.5"),
    "None": (None, TypeError, "an integer, got None"),
    "True": (True, TypeError, "an integer, got True"),
    "a string": ("2", TypeError, "an integer, got '2'"),
    "an array": (np.ones(2, int), TypeError, "an integer, got an array of dtype int64 and shape [2]"),
    "negative": (-1, ValueError, "in "),
    "large": (2**64, ValueError, "in "),
}
BAD_FLOATS = {
    "None": (None, TypeError, "a number, got None"),
    "True": (True, TypeError, "a number, got True"),
    "a string": ("0.5", TypeError, "a number, got '0.5'"),
    "complex": (1j, TypeError, "a number, got 1j"),
    "NaN": (float("nan"), ValueError, ""),
    "infinite": (np.float64("inf"), ValueError, ""),
    "too large for float32": (1e300, ValueError, ""),
}


def bad_numbers():
    """Yields the op, the argument, its value, the error and how the message goes on after the argument."""
    for op, (_, good) in OPS.items():
        for name in [name for name in ARRAYS if name in good]:
            for value, message in BAD_ARRAYS.values():
                if value is not None or name not in ("bias", "before"):
                    yield op, name, value, TypeError, message
        for name in [name for name in STATIC_INTEGERS + UINT32 if name in good]:
            for value, error, message in BAD_INTEGERS.values():
                if value is not None or name not in ("num_labels", "row_length"):
                    yield op, name, value, error, message
        for name in [name for name in UINT32 if name in good]:
            yield op, name, 2**32, ValueError, "in 0..4294967295, got 4294967296"
            yield op, name, jnp.float32(1), TypeError, "an integer, got dtype float32"
            yield op, name, jnp.ones(1, jnp.uint32), ValueError, "have shape [] (a scalar), got [1]"
        for name in [name for name in ADAM if name in good]:
            for value, error, message in BAD_FLOATS.values():
                yield op, name, value, error, message
        if "learning_rate" in good:
            yield op, "learning_rate", jnp.float32(np.nan), ValueError, "finite in float32, got nan"
            yield op, "learning_rate", np.ones(1), ValueError, "have shape [] (a scalar), got [1]"
        if "epsilon" in good:
            yield op, "epsilon", -1e-7, ValueError, "finite and at least 0, got -1e-07"
            for name in ("b1", "b2"):
                for value in (1.5, 1, -0.1, 1 - 1e-12):
                    message = f"at least 0 and below 1 in float32, got {value}"
                    yield op, name, value, ValueError, message


@pytest.mark.parametrize("op", OPS)
def test_every_op_names_a_bad_array_or_number(op):
    function, good = OPS[op]
    cases = [case[1:] for case in bad_numbers() if case[0] == op]
    assert cases
    for name, value, error, message in cases:
        with pytest.raises(error) as raised:
            function(**good | {name: value})
        start = f"{name} must {message}" if message.startswith("have ") else f"{name} must be {message}"
        assert str(raised.value).startswith(start), (name, value, str(raised.value))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("op", OPS)
def test_every_op_takes_big_endian_arrays(op):
    function, good = OPS[op]

    def swap(value):
        return value.astype(value.dtype.newbyteorder(">")) if isinstance(value, np.ndarray) else value

    expected, got = function(**good), function(**{name: swap(value) for name, value in good.items()})
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("op", [op for op, (_, good) in OPS.items() if "sparse" in good or op == "densify"])
def test_every_op_names_a_bad_attribute_of_sparse_inputs(op):
    function, good = OPS[op]
    changes = {
        "sparse.rows must be an array of numbers, got None": {"rows": None},
        "sparse.columns must be an array of numbers, got 'a'": {"columns": "a"},
        "sparse.values must be an array of numbers, got a masked array": {"values": np.ma.ones(2)},
        "sparse.num_columns must be an integer, got 2.5": {"num_columns": 2.5},
        "sparse.num_columns must be an integer, got True": {"num_columns": True},
    }
    for message, change in changes.items():
        sparse = dataclasses.replace(SPARSE, **change)
        with pytest.raises(TypeError, match=message):
            function(**good | {"self" if op == "densify" else "sparse": sparse})
    if op != "densify":
        with pytest.raises(TypeError, match="sparse must be SparseInputs or None, got a value of type tuple"):
            function(**good | {"sparse": (1, 2, 3)})


@pytest.mark.parametrize("op", ["fan_in_adam_step", "dense_adam_step"])
def test_the_moments_of_adam_are_named(op):
    function, good = OPS[op]
    for name in good["state"]._fields:
        state = good["state"]._replace(**{name: "abc"})
        with pytest.raises(TypeError, match=f"state.{name} must be an array of numbers, got 'abc'"):
            function(**good | {"state": state})
        if name not in ("mu_bias", "nu_bias"):
            with pytest.raises(TypeError, match=f"state.{name} must be an array of numbers, got None"):
                function(**good | {"state": good["state"]._replace(**{name: None})})


@pytest.mark.parametrize("op", ["fan_in_loss", "fan_in_loss_reference"])
@pytest.mark.parametrize("loss", ["hinge", None, np.array(["bce", "bce"])])
def test_an_unknown_loss_is_named(op, loss):
    function, good = OPS[op]
    with pytest.raises(ValueError, match="loss must be one of squared_hinge, bce, got "):
        function(**good | {"loss": loss})


def test_numbers_of_numpy_and_jax_pass():
    function, good = OPS["fan_in_sgd_step"]
    wrapped = [function(**good | {"seed": seed}) for seed in (jnp.int32(-1), 2**32 - 1)]
    jax.tree.map(np.testing.assert_array_equal, *wrapped)
    numbers = {"seed": np.uint32(1), "step": jnp.int32(2), "first_label": np.array(3, ">i8")}
    got = function(**good | numbers | {"learning_rate": np.float64(0.1), "num_labels": np.int64(4)})
    jax.tree.map(np.testing.assert_array_equal, got, function(**good))
    assert xla_ops.kth_smallest_magnitude(MATRIX, np.uint8(2)) == xla_ops.kth_smallest_magnitude(MATRIX, 2)


def test_integers_that_jax_would_wrap_are_errors():
    indices = GOOD["indices"].astype(np.int64)
    assert fan_in_matmul(**GOOD | {"indices": indices}).shape == (2, 4)
    indices[1, 1] = 2**32 + 1
    with pytest.raises(ValueError, match="indices must hold integers that fit int32, got 4294967297"):
        fan_in_matmul(**GOOD | {"indices": indices})
    with pytest.raises(ValueError, match="indices must hold integers that fit its dtype, got: "):
        fan_in_matmul(**GOOD | {"indices": indices.tolist()})


def test_values_of_traced_numbers_pass_unchecked_and_their_dtypes_do_not():
    (function, good), (dense_step, dense) = OPS["fan_in_sgd_step"], OPS["dense_adam_step"]

    def step(learning_rate, seed):
        return function(**good | {"learning_rate": learning_rate, "seed": seed})[0]

    assert jax.jit(step)(jnp.float32(np.nan), jnp.int32(-1)).shape == ()
    assert jax.vmap(step)(jnp.ones(3), jnp.arange(3)).shape == (3,)
    with pytest.raises(TypeError, match="seed must be an integer, got dtype float32"):
        jax.jit(step)(jnp.float32(0.1), jnp.float32(1))
    with pytest.raises(ValueError, match="learning_rate must be finite in float32, got nan"):
        jax.jit(lambda seed: step(float("nan"), seed))(jnp.int32(1))  # a number, though as an array traced
    with pytest.raises(TypeError, match="k must be static under jit, an int, got a traced value"):
        jax.jit(xla_ops.kth_smallest_magnitude)(MATRIX, 2)
    with pytest.raises(TypeError, match="epsilon must be static under jit, a float, got a traced value"):
        jax.jit(lambda epsilon: dense_step(**dense | {"epsilon": epsilon}))(1e-7)
