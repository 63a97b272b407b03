"""Errors for bad arguments, and unusual arguments that are valid, of every op."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_table import ADAM, EXAMPLE, OPS

import xla_ops
from xla_ops import fan_in_matmul, index_dtype

# Valid arguments of every op.
VALID = {name: op.arguments(*EXAMPLE) for name, op in OPS.items()}
LAYER = VALID["fan_in_matmul"]
MATRIX = EXAMPLE[0].x
FOR_EVERY_OP = pytest.mark.parametrize("op", OPS)
SPARSE_OPS = [name for name, valid in VALID.items() if "sparse" in valid or name == "densify"]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(
    ("op", "case"), [(name, case) for name, op in OPS.items() for case in op.bad_arguments]
)
def test_bad_arguments_raise(op, case, traced):
    changes, error, message = OPS[op].bad_arguments[case]
    function, arrays = OPS[op].traceable(VALID[op] | changes)
    with pytest.raises(error) as raised:
        jax.eval_shape(function, arrays) if traced else function(arrays)
    assert str(raised.value) == message


def test_largest_number_of_inputs_for_uint16_is_valid():
    narrow = {"indices": LAYER["indices"].astype(np.uint16)}
    sparse = dataclasses.replace(LAYER["sparse"], num_columns=65_531)
    for op in ("fan_in_matmul", "fan_in_loss", "fan_in_top_k", "fan_in_adam_step", "fan_in_sgd_step"):
        wide = {"x": np.zeros((2, 65_536), np.float32), "sparse": None}
        OPS[op].function(**VALID[op] | narrow | wide)
        OPS[op].function(**VALID[op] | narrow | {"sparse": sparse})


@pytest.mark.parametrize(
    ("in_features", "expected"), [(1, jnp.uint16), (65_536, jnp.uint16), (65_537, jnp.int32)]
)
def test_index_dtype_is_narrowest(in_features, expected):
    assert index_dtype(in_features) == expected


# ---- values that are not arrays or numbers, and numbers out of range ----

ARRAYS = ("x", "kernel", "indices", "bias", "positives", "dy", "depends_on")
# Bad values, and the error messages after "NAME must be ".
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
    """Yield op, argument, bad value, type of the error, and its message after "ARGUMENT must (be)"."""
    for op, valid in VALID.items():
        for name in [name for name in ARRAYS if name in valid]:
            for value, message in BAD_ARRAYS.values():
                if value is not None or name not in ("bias", "depends_on"):
                    yield op, name, value, TypeError, message
        for name in [name for name in STATIC_INTEGERS + UINT32 if name in valid]:
            for value, error, message in BAD_INTEGERS.values():
                if value is not None or name not in ("num_labels", "row_length"):
                    yield op, name, value, error, message
        for name in [name for name in UINT32 if name in valid]:
            yield op, name, 2**32, ValueError, "in 0..4294967295, got 4294967296"
            yield op, name, jnp.float32(1), TypeError, "an integer, got dtype float32"
            yield op, name, jnp.ones(1, jnp.uint32), ValueError, "have shape [] (a scalar), got [1]"
        for name in [name for name in ADAM if name in valid]:
            for value, error, message in BAD_FLOATS.values():
                yield op, name, value, error, message
        if "learning_rate" in valid:
            yield op, "learning_rate", jnp.float32(np.nan), ValueError, "finite in float32, got nan"
            yield op, "learning_rate", np.ones(1), ValueError, "have shape [] (a scalar), got [1]"
        if "epsilon" in valid:
            yield op, "epsilon", -1e-7, ValueError, "finite and at least 0, got -1e-07"
            for name in ("b1", "b2"):
                for value in (1.5, 1, -0.1, 1 - 1e-12):
                    message = f"at least 0 and below 1 in float32, got {value}"
                    yield op, name, value, ValueError, message


@FOR_EVERY_OP
def test_errors_name_bad_arrays_and_numbers(op):
    function, valid = OPS[op].function, VALID[op]
    cases = [case[1:] for case in bad_numbers() if case[0] == op]
    assert cases
    for name, value, error, message in cases:
        with pytest.raises(error) as raised:
            function(**valid | {name: value})
        start = f"{name} must {message}" if message.startswith("have ") else f"{name} must be {message}"
        assert str(raised.value).startswith(start), (name, value, str(raised.value))
        assert "\n" not in str(raised.value)


@FOR_EVERY_OP
def test_big_endian_arrays_are_valid(op):
    function, valid = OPS[op].function, VALID[op]

    def swap(value):
        return value.astype(value.dtype.newbyteorder(">")) if isinstance(value, np.ndarray) else value

    expected, got = function(**valid), function(**{name: swap(value) for name, value in valid.items()})
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("op", SPARSE_OPS)
def test_errors_name_bad_attributes_of_sparse_inputs(op):
    function, valid = OPS[op].function, VALID[op]
    changes = {
        "sparse.rows must be an array of numbers, got None": {"rows": None},
        "sparse.columns must be an array of numbers, got 'a'": {"columns": "a"},
        "sparse.values must be an array of numbers, got a masked array": {"values": np.ma.ones(2)},
        "sparse.num_columns must be an integer, got 2.5": {"num_columns": 2.5},
        "sparse.num_columns must be an integer, got True": {"num_columns": True},
    }
    for message, change in changes.items():
        sparse = dataclasses.replace(LAYER["sparse"], **change)
        with pytest.raises(TypeError, match=message):
            function(**valid | {"self" if op == "densify" else "sparse": sparse})
    if op != "densify":
        with pytest.raises(TypeError, match="sparse must be SparseInputs or None, got a value of type tuple"):
            function(**valid | {"sparse": (1, 2, 3)})


@pytest.mark.parametrize("op", ["fan_in_adam_step", "dense_adam_step"])
def test_errors_name_bad_moments(op):
    function, valid = OPS[op].function, VALID[op]
    for name in valid["state"]._fields:
        state = valid["state"]._replace(**{name: "abc"})
        with pytest.raises(TypeError, match=f"state.{name} must be an array of numbers, got 'abc'"):
            function(**valid | {"state": state})
        if name not in ("mu_bias", "nu_bias"):
            with pytest.raises(TypeError, match=f"state.{name} must be an array of numbers, got None"):
                function(**valid | {"state": valid["state"]._replace(**{name: None})})


def test_numpy_and_jax_scalars_are_valid():
    function, valid = xla_ops.fan_in_sgd_step, VALID["fan_in_sgd_step"]
    wrapped = [function(**valid | {"seed": seed}) for seed in (jnp.int32(-1), 2**32 - 1)]
    jax.tree.map(np.testing.assert_array_equal, *wrapped)
    numbers = {"seed": np.uint32(1), "step": jnp.int32(2), "first_label": np.array(3, ">i8")}
    got = function(**valid | numbers | {"learning_rate": np.float64(0.1), "num_labels": np.int64(4)})
    jax.tree.map(np.testing.assert_array_equal, got, function(**valid))
    assert xla_ops.kth_smallest_magnitude(MATRIX, np.uint8(2)) == xla_ops.kth_smallest_magnitude(MATRIX, 2)


def test_indices_that_overflow_raise():
    indices = LAYER["indices"].astype(np.int64)
    assert fan_in_matmul(**LAYER | {"indices": indices}).shape == (2, 4)
    indices[1, 1] = 2**32 + 1
    with pytest.raises(ValueError, match="indices must hold integers that fit int32, got 4294967297"):
        fan_in_matmul(**LAYER | {"indices": indices})
    with pytest.raises(ValueError, match="indices must hold integers that fit its dtype, got: "):
        fan_in_matmul(**LAYER | {"indices": indices.tolist()})


def test_traced_scalars_are_checked_by_dtype_only():
    valid, dense = VALID["fan_in_sgd_step"], VALID["dense_adam_step"]

    def step(learning_rate, seed):
        return xla_ops.fan_in_sgd_step(**valid | {"learning_rate": learning_rate, "seed": seed})[0]

    assert jax.jit(step)(jnp.float32(np.nan), jnp.int32(-1)).shape == ()
    assert jax.vmap(step)(jnp.ones(3), jnp.arange(3)).shape == (3,)
    with pytest.raises(TypeError, match="seed must be an integer, got dtype float32"):
        jax.jit(step)(jnp.float32(0.1), jnp.float32(1))
    # A number that is not traced is checked under jit, too.
    with pytest.raises(ValueError, match="learning_rate must be finite in float32, got nan"):
        jax.jit(lambda seed: step(float("nan"), seed))(jnp.int32(1))
    with pytest.raises(TypeError, match="k must be static under jit, an int, got a traced value"):
        jax.jit(xla_ops.kth_smallest_magnitude)(MATRIX, 2)
    with pytest.raises(TypeError, match="epsilon must be static under jit, a float, got a traced value"):
        jax.jit(lambda epsilon: xla_ops.dense_adam_step(**dense | {"epsilon": epsilon}))(1e-7)
