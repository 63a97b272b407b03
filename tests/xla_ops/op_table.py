"""The table of all ops, which parametrizes the tests of every op; a new op joins them by an entry here."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_problems import (
    Problem,
    brute_force_loss,
    brute_force_matmul,
    brute_force_top_k,
    make_problem,
    rounding_bits,
    sparsify,
)

import xla_ops
from xla_ops import SparseInputs

# Arguments that are static under jit; all others are arrays, which can be traced.
STATIC = {"k", "num_labels", "first", "row_length", "batch", "in_features", "loss", "b1", "b2", "epsilon"}
DENSE_INPUTS, COLUMNS = 5, 3  # dense and sparse inputs of `EXAMPLE`

BadArguments = Mapping[str, tuple[dict[str, Any], type[Exception], str]]


@dataclasses.dataclass(frozen=True)
class Op:
    """A public function of `xla_ops`, and the properties that the tests of every op check.

    Attributes:
      function: the function.
      arguments: function that maps a problem and its sparse inputs, or None, to valid arguments by name.
      expected: function that maps these arguments to the expected results in NumPy. If the op is
        differentiable, the gradients by name follow; the cotangent is 3 for a scalar result, and the result
        itself for an array. None for helpers, whose results are checked in other tests.
      differentiable: names of the arguments that have gradients.
      dtypes: supported dtypes of the problem.
      can_be_empty: dimensions of the problem that can have size 0.
      is_native: True if the function calls a handler, False if it is plain `jax.numpy`.
      shards: True if its handlers are partitioned along batch and labels under plain `jax.jit`.
      bad_arguments: for each test of an error, a name, a change to the arguments of `EXAMPLE`, and the error.
    """

    function: Callable
    arguments: Callable[[Problem, SparseInputs | None], dict[str, Any]]
    expected: Callable | None = None
    differentiable: tuple[str, ...] = ()
    dtypes: tuple = (jnp.float32, jnp.bfloat16)
    can_be_empty: tuple[str, ...] = ()
    is_native: bool = True
    shards: bool = False
    bad_arguments: BadArguments = dataclasses.field(default_factory=dict)

    @property
    def takes_sparse(self) -> bool:
        """True if the op has an argument `sparse`."""
        return "sparse" in self.arguments(*EXAMPLE)

    def results(self, arguments, transform=lambda function: function):
        """Return the results of the op.

        If it is differentiable, it is transformed first, and a dict of its gradients is added to the results.
        """
        if not self.differentiable:
            return self.function(**arguments)
        given = {n: arguments[n] for n in self.differentiable if arguments[n] is not None}
        y, vjp = jax.vjp(transform(lambda given: self.function(**arguments | given)), given)
        return y, *vjp(y if y.ndim else jnp.full_like(y, 3))

    def traceable(self, arguments, transform=lambda function: function):
        """Return `results` as a function of the array arguments, and these arrays."""
        static = {n: v for n, v in arguments.items() if n in STATIC}
        arrays = {n: v for n, v in arguments.items() if n not in STATIC}
        return lambda arrays: self.results(arrays | static, transform), arrays


# ---- valid arguments, from a problem and its sparse inputs ----


def make_example(*, batch=2, dense=DENSE_INPUTS, columns=COLUMNS, labels=4, fan_in=3, seed=0, **options):
    """Return a problem and its sparse inputs, which are the arguments of `Op.arguments`."""
    full = make_problem(batch, dense + columns, labels, fan_in, num_positives=2, seed=seed, **options)
    return sparsify(full, dense, density=0.5, entries=3 * batch * columns, seed=seed)[1:]


EXAMPLE = make_example()


def layer_arguments(problem, sparse):
    return dict(zip(("x", "kernel", "indices", "bias"), problem[:4], strict=True)) | {"sparse": sparse}


def top_k_arguments(problem, sparse):
    return layer_arguments(problem, sparse) | {"k": min(6, len(problem.kernel))}


def loss_arguments(problem, sparse):
    return layer_arguments(problem, sparse) | {
        "positives": problem.positives,
        "num_labels": len(problem.kernel),
    }


ADAM = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "epsilon": 1e-3}


def adam_arguments(problem, sparse):
    return loss_arguments(problem, sparse) | ADAM | {"state": xla_ops.adam_init(problem.kernel, problem.bias)}


def sgd_arguments(problem, sparse):
    return loss_arguments(problem, sparse) | {"learning_rate": 0.1, "seed": 1, "step": 2, "first_label": 3}


def dense_arguments(problem, _):
    kernel = np.ones((problem.x.shape[1], problem.dy.shape[1]), np.float32)
    arrays = {"x": problem.x, "dy": problem.dy, "kernel": kernel, "depends_on": problem.x}
    return arrays | ADAM | {"seed": 1, "state": xla_ops.dense_adam_init(kernel)}


def rounding_arguments(problem, _):
    return {"x": problem.x, "seed": 1, "step": 2, "first": 4, "row_length": 20, "first_row": 6}


# ---- expected results ----


def full_problem(a):
    """Return the problem that has these arguments, with the sparse inputs as columns of x."""
    x, sparse = np.asarray(a["x"]), a["sparse"]
    if sparse is not None:
        both = np.zeros((len(x), x.shape[1] + sparse.num_columns), x.dtype)
        both[:, : x.shape[1]] = x
        inside = (sparse.rows >= 0) & (sparse.rows < len(x))
        inside &= (sparse.columns >= 0) & (sparse.columns < sparse.num_columns)
        np.add.at(both, (sparse.rows[inside], x.shape[1] + sparse.columns[inside]), sparse.values[inside])
        x = both
    y = np.zeros((len(x), len(a["kernel"])))
    return Problem(x, a["kernel"], a["indices"], a["bias"], a.get("positives"), y)


def gradients_by_name(a, d_x, d_kernel, d_bias):
    """Return the gradients of the arguments that are not None."""
    gradients = {"x": d_x[:, : a["x"].shape[1]], "kernel": d_kernel, "bias": d_bias}
    return {name: gradient for name, gradient in gradients.items() if a[name] is not None}


def expected_matmul(a):
    problem = full_problem(a)
    y = brute_force_matmul(problem)[0]
    return y, gradients_by_name(a, *brute_force_matmul(problem._replace(dy=y))[1:])


def expected_loss(a):
    (value, *gradients), _ = brute_force_loss(full_problem(a), "squared_hinge")
    return value, gradients_by_name(a, *(3 * gradient for gradient in gradients))


def expected_sgd(a):
    (value, d_x, *gradients), _ = brute_force_loss(full_problem(a), "squared_hinge")
    layer = (a["kernel"], a["bias"])
    new = (w if w is None else w - 0.1 * d for w, d in zip(layer, gradients, strict=True))
    return value, d_x[:, : a["x"].shape[1]], *new


def first_adam_step(weights, gradient):
    """Return the weights and both moments after the first step with the settings of `ADAM`."""
    if weights is None:
        return None, None, None
    return weights - 0.1 * gradient / (np.abs(gradient) + 1e-3), 0.1 * gradient, 0.01 * gradient**2


def expected_adam(a):
    (value, d_x, d_kernel, d_bias), _ = brute_force_loss(full_problem(a), "squared_hinge")
    kernel, mu_kernel, nu_kernel = first_adam_step(a["kernel"], d_kernel)
    bias, mu_bias, nu_bias = first_adam_step(a["bias"], d_bias)
    state = xla_ops.AdamState(np.int32(1), mu_kernel, nu_kernel, mu_bias, nu_bias)
    return value, d_x[:, : a["x"].shape[1]], kernel, bias, state


def expected_dense(a):
    gradient = a["x"].T.astype(np.float64) @ a["dy"]
    kernel, mu, nu = first_adam_step(a["kernel"], gradient)
    return kernel, xla_ops.DenseAdamState(np.int32(1), mu, nu)


def expected_rounding(a):
    rows, columns = np.indices(a["x"].shape)
    positions = 4 + (6 + rows) * 20 + columns
    bits = a["x"].view(np.uint32) + rounding_bits(positions.ravel().tolist(), 1, 2).reshape(positions.shape)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


# ---- bad arguments: changes to `EXAMPLE`, with B = 2, D = 5, C = 3, L = 4, F = 3 and P = 2 ----

F16 = np.zeros((2, 5), np.float16)
BF16 = jnp.zeros((4, 3), jnp.bfloat16)
WIDE = np.zeros((2, 65_537), np.float32)
NARROW = np.zeros((4, 3), np.uint16)
TOO_NARROW = "indices must have dtype int32 where there are more than 65536 inputs, got uint16 for 65537"


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def sparse_argument(**changes):
    """Return an argument `sparse` that is valid, except for the changes."""
    arrays = {"rows": zeros(3, dtype=np.int32), "columns": zeros(3, dtype=np.int32), "values": zeros(3)}
    return {"sparse": SparseInputs(**arrays | {"num_columns": COLUMNS} | changes)}


BAD_LAYER: BadArguments = {
    "integer x": (
        {"x": zeros(2, 5, dtype=np.int32)},
        TypeError,
        "x must have dtype float32 or bfloat16, got int32",
    ),
    "float16 x": ({"x": F16}, TypeError, "x must have dtype float32 or bfloat16, got float16"),
    "kernel dtype differs from x": (
        {"kernel": BF16},
        TypeError,
        "kernel must have dtype float32, got bfloat16",
    ),
    "transposed kernel": (
        {"kernel": zeros(3, 4)},
        ValueError,
        "kernel must have shape [4, 3] (that of indices), got [3, 4]",
    ),
    "1-D kernel": (
        {"kernel": zeros(3)},
        ValueError,
        "kernel must have shape [4, 3] (that of indices), got [3]",
    ),
    "kernel with fewer labels": (
        {"kernel": zeros(3, 3)},
        ValueError,
        "kernel must have shape [4, 3] (that of indices), got [3, 3]",
    ),
    "float indices": (
        {"indices": zeros(4, 3)},
        TypeError,
        "indices must have dtype uint16 or int32, got float32",
    ),
    "int16 indices": (
        {"indices": zeros(4, 3, dtype=np.int16)},
        TypeError,
        "indices must have dtype uint16 or int32, got int16",
    ),
    "1-D indices": (
        {"indices": zeros(3, dtype=np.int32)},
        ValueError,
        "indices must have shape [L, F] with F >= 1, got [3]",
    ),
    "fan-in of 0": (
        {"indices": zeros(4, 0, dtype=np.int32)},
        ValueError,
        "indices must have shape [L, F] with F >= 1, got [4, 0]",
    ),
    "uint16 indices for too many dense inputs": (
        {"x": WIDE, "indices": NARROW, "sparse": None},
        TypeError,
        TOO_NARROW,
    ),
    "uint16 indices for too many sparse inputs": (
        {"indices": NARROW} | sparse_argument(num_columns=65_532),
        TypeError,
        TOO_NARROW,
    ),
    "bias dtype differs from x": (
        {"bias": BF16[:, 0]},
        TypeError,
        "bias must have dtype float32, got bfloat16",
    ),
    "bias with one value per input": (
        {"bias": zeros(5)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [5]",
    ),
    "empty bias": (
        {"bias": zeros(0)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [0]",
    ),
    "2-D bias": (
        {"bias": zeros(4, 1)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [4, 1]",
    ),
    "unsigned sparse rows": (
        sparse_argument(rows=zeros(3, dtype=np.uint32)),
        TypeError,
        "sparse.rows must have dtype int32, got uint32",
    ),
    "int16 sparse columns": (
        sparse_argument(columns=zeros(3, dtype=np.int16)),
        TypeError,
        "sparse.columns must have dtype int32, got int16",
    ),
    "integer sparse values": (
        sparse_argument(values=zeros(3, dtype=np.int32)),
        TypeError,
        "sparse.values must have dtype float32 or bfloat16, got int32",
    ),
    "sparse values dtype differs from x": (
        sparse_argument(values=BF16[:3, 0]),
        TypeError,
        "sparse.values must have dtype float32, got bfloat16",
    ),
    "scalar sparse values": (
        sparse_argument(values=np.float32(1)),
        ValueError,
        "sparse.values must have at least 1 dimension(s), got shape []",
    ),
    "too few sparse rows": (
        sparse_argument(rows=zeros(2, dtype=np.int32)),
        ValueError,
        "sparse.rows must have shape [3] (one per value), got [2]",
    ),
    "too many sparse columns": (
        sparse_argument(columns=zeros(4, dtype=np.int32)),
        ValueError,
        "sparse.columns must have shape [3] (one per value), got [4]",
    ),
    "2-D sparse columns": (
        sparse_argument(columns=zeros(3, 1, dtype=np.int32)),
        ValueError,
        "sparse.columns must have shape [3] (one per value), got [3, 1]",
    ),
    "2-D sparse values": (
        sparse_argument(values=zeros(1, 3)),
        ValueError,
        "sparse.values must have shape [3] (a flat list), got [1, 3]",
    ),
    "negative num_columns": (
        sparse_argument(num_columns=-1),
        ValueError,
        "sparse.num_columns must be in 0..2147483642 (beside x, for int32 indices), got -1",
    ),
    "too large num_columns": (
        sparse_argument(num_columns=2**31 - 5),
        ValueError,
        "sparse.num_columns must be in 0..2147483642 (beside x, for int32 indices), got 2147483643",
    ),
}
BAD_FORWARD = BAD_LAYER | {
    "scalar x": ({"x": np.float32(1)}, ValueError, "x must have at least 1 dimension(s), got shape []"),
}
BAD_TOP_K = BAD_FORWARD | {
    "negative k": ({"k": -1}, ValueError, "k must be in 0..4 (the number of labels), got -1"),
    "k above the number of labels": (
        {"k": 5},
        ValueError,
        "k must be in 0..4 (the number of labels), got 5",
    ),
}
BAD_LOSS = BAD_LAYER | {
    "1-D x": ({"x": zeros(5)}, ValueError, "x must have at least 2 dimension(s), got shape [5]"),
    "3-D x": ({"x": zeros(1, 2, 5)}, ValueError, "x must have shape [B, D], got [1, 2, 5]"),
    "dense float positives": (
        {"positives": zeros(2, 4)},
        TypeError,
        "positives must have dtype int32, got float32",
    ),
    "1-D positives": (
        {"positives": zeros(2, dtype=np.int32)},
        ValueError,
        "positives must have shape [2, P] (one row per row of x), got [2]",
    ),
    "positives with fewer points": (
        {"positives": zeros(1, 2, dtype=np.int32)},
        ValueError,
        "positives must have shape [2, P] (one row per row of x), got [1, 2]",
    ),
    "unknown loss": ({"loss": "hinge"}, ValueError, "loss must be one of squared_hinge, bce, got 'hinge'"),
    "loss is None": ({"loss": None}, ValueError, "loss must be one of squared_hinge, bce, got None"),
    "array for loss": (
        {"loss": np.array(["bce", "bce"])},
        ValueError,
        "loss must be one of squared_hinge, bce, got array(['bce', 'bce'], dtype='<U3')",
    ),
    "num_labels below the layer's": (
        {"num_labels": 3},
        ValueError,
        "num_labels must be in 4..9223372036854775807 (at least L), got 3",
    ),
}
BAD_STEP = BAD_LOSS | {
    "learning_rate is not a scalar": (
        {"learning_rate": zeros(1)},
        ValueError,
        "learning_rate must have shape [] (a scalar), got [1]",
    ),
}
STATE = xla_ops.adam_init(zeros(4, 3), zeros(4))
DENSE_STATE = xla_ops.dense_adam_init(zeros(5, 4))


def bad_states(state):
    """Return the bad states that are tested for both types of Adam's state."""
    kind = type(state).__name__
    return {
        "list for state": (
            {"state": list(state)},
            TypeError,
            f"state must be of type {kind}, got list",
        ),
        "tuple for state": (
            {"state": tuple(state)},
            TypeError,
            f"state must be of type {kind}, got tuple",
        ),
        "state is None": ({"state": None}, TypeError, f"state must be of type {kind}, got NoneType"),
        "count is not a scalar": (
            {"state": state._replace(count=zeros(1, dtype=np.int32))},
            ValueError,
            "state.count must have shape [] (a scalar), got [1]",
        ),
        "float count": (
            {"state": state._replace(count=np.float32(0))},
            TypeError,
            "state.count must have dtype int32, got float32",
        ),
    }


BAD_ADAM = (
    BAD_STEP
    | bad_states(STATE)
    | {
        "bfloat16 x and layer": (
            {"x": BF16, "kernel": BF16, "bias": BF16[:, 0]},
            TypeError,
            "kernel must have dtype float32, got bfloat16",
        ),
        "nu with fewer labels": (
            {"state": STATE._replace(nu_kernel=zeros(3, 3))},
            ValueError,
            "state.nu_kernel must have shape [4, 3] (that of the kernel), got [3, 3]",
        ),
        "bfloat16 mu": (
            {"state": STATE._replace(mu_kernel=BF16)},
            TypeError,
            "state.mu_kernel must have dtype float32, got bfloat16",
        ),
        "no moments for bias": (
            {"state": xla_ops.adam_init(zeros(4, 3), None)},
            ValueError,
            "state.mu_bias must have shape [4] (that of the bias), got [0]",
        ),
        "mu with one label": (
            {"state": STATE._replace(mu_bias=zeros(1))},
            ValueError,
            "state.mu_bias must have shape [4] (that of the bias), got [1]",
        ),
    }
)
BAD_DENSE = bad_states(DENSE_STATE) | {
    "learning_rate is not a scalar": BAD_STEP["learning_rate is not a scalar"],
    "dy with fewer outputs": (
        {"dy": zeros(2, 3)},
        ValueError,
        "dy must have shape [2, 4] (rows of x by columns of kernel), got [2, 3]",
    ),
    "x with fewer inputs": (
        {"x": zeros(2, 4)},
        ValueError,
        "kernel must have shape [4, 4] (columns of x by columns of dy), got [5, 4]",
    ),
    "1-D x": ({"x": zeros(5)}, ValueError, "x must be a matrix, got shape [5]"),
    "bfloat16 kernel": (
        {"kernel": jnp.zeros((5, 4), jnp.bfloat16)},
        TypeError,
        "kernel must have dtype float32, got bfloat16",
    ),
    "mu shape differs from kernel": (
        {"state": DENSE_STATE._replace(mu=zeros(4, 3))},
        ValueError,
        "state.mu must have shape [5, 4] (that of the kernel), got [4, 3]",
    ),
    "nu with fewer outputs": (
        {"state": DENSE_STATE._replace(nu=zeros(5, 3))},
        ValueError,
        "state.nu must have shape [5, 4] (that of the kernel), got [5, 3]",
    ),
    "float16 moments": (
        {"state": DENSE_STATE._replace(mu=zeros(5, 4, dtype=np.float16))},
        TypeError,
        "state.mu must have dtype float32 or bfloat16, got float16",
    ),
    "moments with different dtypes": (
        {"state": DENSE_STATE._replace(mu=jnp.zeros((5, 4), jnp.bfloat16))},
        TypeError,
        "state.nu must have dtype bfloat16, got float32",
    ),
}
BAD_ROUNDING: BadArguments = {
    "bfloat16 x": ({"x": BF16}, TypeError, "x must have dtype float32, got bfloat16"),
    "integer x": ({"x": zeros(3, dtype=np.int32)}, TypeError, "x must have dtype float32, got int32"),
    "scalar x": ({"x": np.float32(1)}, ValueError, "x must have at least 1 dimension(s), got shape []"),
    "row_length below row size": (
        {"row_length": 4},
        ValueError,
        "row_length must be in 5..4294967295, got 4",
    ),
    "row_length too large": (
        {"row_length": 2**32},
        ValueError,
        "row_length must be in 5..4294967295, got 4294967296",
    ),
    "negative first": ({"first": -1}, ValueError, "first must be in 0..18446744073709551615, got -1"),
}
BAD_KTH: BadArguments = {
    "integer x": (
        {"x": zeros(3, dtype=np.int32)},
        TypeError,
        "x must have dtype float32 or bfloat16, got int32",
    ),
    "k is 0": ({"k": 0}, ValueError, "k must be in 1..10 (the size of x), got 0"),
    "k above size of x": ({"k": 11}, ValueError, "k must be in 1..10 (the size of x), got 11"),
}

# ---- the table ----

WEIGHTS, SIZES, FLOAT32 = ("x", "kernel", "bias"), ("batch", "labels", "dense"), (jnp.float32,)
OPS = {
    "fan_in_matmul": Op(
        xla_ops.fan_in_matmul,
        layer_arguments,
        expected_matmul,
        differentiable=WEIGHTS,
        can_be_empty=SIZES,
        shards=True,
        bad_arguments=BAD_FORWARD,
    ),
    "fan_in_loss": Op(
        xla_ops.fan_in_loss,
        loss_arguments,
        expected_loss,
        differentiable=WEIGHTS,
        can_be_empty=SIZES,
        shards=True,
        bad_arguments=BAD_LOSS,
    ),
    "fan_in_top_k": Op(
        xla_ops.fan_in_top_k,
        top_k_arguments,
        lambda a: brute_force_top_k(full_problem(a), a["k"]),
        can_be_empty=SIZES,
        shards=True,
        bad_arguments=BAD_TOP_K,
    ),
    "fan_in_adam_step": Op(
        xla_ops.fan_in_adam_step,
        adam_arguments,
        expected_adam,
        dtypes=FLOAT32,
        can_be_empty=SIZES,
        bad_arguments=BAD_ADAM,
    ),
    "fan_in_sgd_step": Op(
        xla_ops.fan_in_sgd_step, sgd_arguments, expected_sgd, can_be_empty=SIZES, bad_arguments=BAD_STEP
    ),
    "dense_adam_step": Op(
        xla_ops.dense_adam_step,
        dense_arguments,
        expected_dense,
        dtypes=FLOAT32,
        can_be_empty=SIZES,
        bad_arguments=BAD_DENSE,
    ),
    "kth_smallest_magnitude": Op(
        xla_ops.kth_smallest_magnitude,
        lambda problem, _: {"x": problem.x, "k": 2},
        lambda a: np.sort(np.abs(a["x"].astype(np.float32)), axis=None)[a["k"] - 1],
        bad_arguments=BAD_KTH,
    ),
    "round_stochastically": Op(
        xla_ops.round_stochastically,
        rounding_arguments,
        expected_rounding,
        dtypes=FLOAT32,
        can_be_empty=("batch", "dense"),
        is_native=False,
        bad_arguments=BAD_ROUNDING,
    ),
}
REFERENCES = {
    "fan_in_matmul": xla_ops.fan_in_matmul_reference,
    "fan_in_loss": xla_ops.fan_in_loss_reference,
    "fan_in_top_k": xla_ops.fan_in_top_k_reference,
    "kth_smallest_magnitude": xla_ops.kth_smallest_magnitude_reference,
}
OPS |= {
    f"{name}_reference": dataclasses.replace(
        OPS[name], function=function, can_be_empty=(), is_native=False, shards=False
    )
    for name, function in REFERENCES.items()
}
OPS |= {
    "adam_init": Op(xla_ops.adam_init, lambda problem, _: {"kernel": problem.kernel, "bias": problem.bias}),
    "dense_adam_init": Op(xla_ops.dense_adam_init, lambda problem, _: {"kernel": problem.kernel}),
    "densify": Op(SparseInputs.densify, lambda _, sparse: {"self": sparse, "batch": 2}),
    "index_dtype": Op(xla_ops.index_dtype, lambda *_: {"in_features": 5}),
}


def every_op(selected=lambda op: True):
    """Return a mark that runs a test for each selected op, without and, if it takes them, with sparse inputs.

    Helpers, which have no expected results, are left out.
    """
    return pytest.mark.parametrize(
        ("op", "is_sparse"),
        [
            pytest.param(op, is_sparse, id=name + "-sparse" * is_sparse)
            for name, op in OPS.items()
            if op.expected is not None and selected(op)
            for is_sparse in [False, True][: 1 + op.takes_sparse]
        ],
    )
