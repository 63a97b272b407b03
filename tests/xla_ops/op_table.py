"""The table of all ops, which the generic tests go through: a new op is tested once it has an entry."""

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

# Arguments that are constants of a program; all others are arrays, which may be traced.
STATIC = {"k", "num_labels", "first", "row_length", "batch", "in_features", "loss", "b1", "b2", "epsilon"}
DENSE_INPUTS, COLUMNS = 5, 3  # of `EXAMPLE`, and its sparse inputs

BadArguments = Mapping[str, tuple[dict[str, Any], type[Exception], str]]


@dataclasses.dataclass(frozen=True)
class Op:
    """A public function of `xla_ops`, and the properties that the generic tests check.

    Attributes:
      function: the function.
      arguments: function from a problem and its sparse inputs, or None, to valid arguments by name.
      expected: function from such arguments to the results in NumPy. If the op is differentiable, the
        gradients by name follow, for a cotangent of 3 (a scalar) or of the result itself (an array). None for
        a helper, of which other tests check the results.
      differentiable: names of the arguments that have gradients.
      dtypes: dtypes of the problem that the op supports.
      can_be_empty: dimensions of the problem that may have size 0.
      is_native: whether the function calls a handler; else it is plain `jax.numpy`.
      shards: whether its handlers are partitioned along batch and labels under plain `jax.jit`.
      bad_arguments: changes to the arguments of `EXAMPLE`, and the errors, by a description of the change.
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
        """Whether the op has an argument `sparse`."""
        return "sparse" in self.arguments(*EXAMPLE)

    def results(self, arguments, transform=lambda function: function):
        """Return the results, with the gradients of the transformed op by name if it is differentiable."""
        if not self.differentiable:
            return self.function(**arguments)
        given = {n: arguments[n] for n in self.differentiable if arguments[n] is not None}
        y, vjp = jax.vjp(transform(lambda given: self.function(**arguments | given)), given)
        return y, *vjp(y if y.ndim else jnp.full_like(y, 3))

    def traceable(self, arguments, transform=lambda function: function):
        """Return `results` as a function of the arrays among the arguments, and the arrays."""
        static = {n: v for n, v in arguments.items() if n in STATIC}
        arrays = {n: v for n, v in arguments.items() if n not in STATIC}
        return lambda arrays: self.results(arrays | static, transform), arrays


# ---- arguments ----


def make_example(*, batch=2, dense=DENSE_INPUTS, columns=COLUMNS, labels=4, fan_in=3, seed=0, **options):
    """Return the arguments of `Op.arguments`: a problem and its sparse inputs."""
    full = make_problem(batch, dense + columns, labels, fan_in, num_positives=2, seed=seed, **options)
    return sparsify(full, dense, density=0.5, entries=3 * batch * columns, seed=seed)[1:]


EXAMPLE = make_example()


def layer(problem, sparse):
    return dict(zip(("x", "kernel", "indices", "bias"), problem[:4], strict=True)) | {"sparse": sparse}


def top_k(problem, sparse):
    return layer(problem, sparse) | {"k": min(6, len(problem.kernel))}


def loss(problem, sparse):
    return layer(problem, sparse) | {"positives": problem.positives, "num_labels": len(problem.kernel)}


ADAM = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "epsilon": 1e-3}


def adam(problem, sparse):
    return loss(problem, sparse) | ADAM | {"state": xla_ops.adam_init(problem.kernel, problem.bias)}


def sgd(problem, sparse):
    return loss(problem, sparse) | {"learning_rate": 0.1, "seed": 1, "step": 2, "first_label": 3}


def dense(problem, _):
    kernel = np.ones((problem.x.shape[1], problem.dy.shape[1]), np.float32)
    arrays = {"x": problem.x, "dy": problem.dy, "kernel": kernel, "depends_on": problem.x}
    return arrays | ADAM | {"seed": 1, "state": xla_ops.dense_adam_init(kernel)}


def rounding(problem, _):
    return {"x": problem.x, "seed": 1, "step": 2, "first": 4, "row_length": 20, "first_row": 6}


# ---- results ----


def full_problem(a):
    """Return the problem of arguments, with the sparse inputs in x."""
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


def by_name(a, d_x, d_kernel, d_bias):
    gradients = {"x": d_x[:, : a["x"].shape[1]], "kernel": d_kernel, "bias": d_bias}
    return {name: gradient for name, gradient in gradients.items() if a[name] is not None}


def expected_matmul(a):
    problem = full_problem(a)
    y = brute_force_matmul(problem)[0]
    return y, by_name(a, *brute_force_matmul(problem._replace(dy=y))[1:])


def expected_loss(a):
    (value, *gradients), _ = brute_force_loss(full_problem(a), "squared_hinge")
    return value, by_name(a, *(3 * gradient for gradient in gradients))


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


# ---- bad arguments: of `EXAMPLE`, with B = 2, D = 5, C = 3, L = 4, F = 3 and P = 2 ----

F16 = np.zeros((2, 5), np.float16)
BF16 = jnp.zeros((4, 3), jnp.bfloat16)
WIDE = np.zeros((2, 65_537), np.float32)
NARROW = np.zeros((4, 3), np.uint16)
TOO_NARROW = "indices must have dtype int32 where there are more than 65536 inputs, got uint16 for 65537"


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def entries(**changes):
    arrays = {"rows": zeros(3, dtype=np.int32), "columns": zeros(3, dtype=np.int32), "values": zeros(3)}
    return {"sparse": SparseInputs(**arrays | {"num_columns": COLUMNS} | changes)}


OF_LAYER: BadArguments = {
    "x of integers": (
        {"x": zeros(2, 5, dtype=np.int32)},
        TypeError,
        "x must have dtype float32 or bfloat16, got int32",
    ),
    "x in half precision": ({"x": F16}, TypeError, "x must have dtype float32 or bfloat16, got float16"),
    "kernel of another dtype than x": (
        {"kernel": BF16},
        TypeError,
        "kernel must have dtype float32, got bfloat16",
    ),
    "kernel transposed": (
        {"kernel": zeros(3, 4)},
        ValueError,
        "kernel must have shape [4, 3] (that of indices), got [3, 4]",
    ),
    "kernel of one row": (
        {"kernel": zeros(3)},
        ValueError,
        "kernel must have shape [4, 3] (that of indices), got [3]",
    ),
    "kernel of fewer labels": (
        {"kernel": zeros(3, 3)},
        ValueError,
        "kernel must have shape [4, 3] (that of indices), got [3, 3]",
    ),
    "indices of floats": (
        {"indices": zeros(4, 3)},
        TypeError,
        "indices must have dtype uint16 or int32, got float32",
    ),
    "indices of unsupported integers": (
        {"indices": zeros(4, 3, dtype=np.int16)},
        TypeError,
        "indices must have dtype uint16 or int32, got int16",
    ),
    "indices of one row": (
        {"indices": zeros(3, dtype=np.int32)},
        ValueError,
        "indices must have shape [L, F] with F >= 1, got [3]",
    ),
    "indices without columns": (
        {"indices": zeros(4, 0, dtype=np.int32)},
        ValueError,
        "indices must have shape [L, F] with F >= 1, got [4, 0]",
    ),
    "indices too narrow for the inputs": (
        {"x": WIDE, "indices": NARROW, "sparse": None},
        TypeError,
        TOO_NARROW,
    ),
    "indices too narrow for all inputs": (
        {"indices": NARROW} | entries(num_columns=65_532),
        TypeError,
        TOO_NARROW,
    ),
    "bias of another dtype than x": (
        {"bias": BF16[:, 0]},
        TypeError,
        "bias must have dtype float32, got bfloat16",
    ),
    "bias per input": (
        {"bias": zeros(5)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [5]",
    ),
    "bias empty": (
        {"bias": zeros(0)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [0]",
    ),
    "bias a column": (
        {"bias": zeros(4, 1)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [4, 1]",
    ),
    "rows of unsigned integers": (
        entries(rows=zeros(3, dtype=np.uint32)),
        TypeError,
        "sparse.rows must have dtype int32, got uint32",
    ),
    "columns of short integers": (
        entries(columns=zeros(3, dtype=np.int16)),
        TypeError,
        "sparse.columns must have dtype int32, got int16",
    ),
    "values of integers": (
        entries(values=zeros(3, dtype=np.int32)),
        TypeError,
        "sparse.values must have dtype float32 or bfloat16, got int32",
    ),
    "values of another dtype than x": (
        entries(values=BF16[:3, 0]),
        TypeError,
        "sparse.values must have dtype float32, got bfloat16",
    ),
    "a scalar for values": (
        entries(values=np.float32(1)),
        ValueError,
        "sparse.values must have at least 1 dimension(s), got shape []",
    ),
    "fewer rows": (
        entries(rows=zeros(2, dtype=np.int32)),
        ValueError,
        "sparse.rows must have shape [3] (one per value), got [2]",
    ),
    "more columns": (
        entries(columns=zeros(4, dtype=np.int32)),
        ValueError,
        "sparse.columns must have shape [3] (one per value), got [4]",
    ),
    "columns a matrix": (
        entries(columns=zeros(3, 1, dtype=np.int32)),
        ValueError,
        "sparse.columns must have shape [3] (one per value), got [3, 1]",
    ),
    "values a matrix": (
        entries(values=zeros(1, 3)),
        ValueError,
        "sparse.values must have shape [3] (a flat list), got [1, 3]",
    ),
    "fewer than no columns": (
        entries(num_columns=-1),
        ValueError,
        "sparse.num_columns must be in 0..2147483642 (beside x, for int32 indices), got -1",
    ),
    "too many columns": (
        entries(num_columns=2**31 - 5),
        ValueError,
        "sparse.num_columns must be in 0..2147483642 (beside x, for int32 indices), got 2147483643",
    ),
}
OF_FORWARD = OF_LAYER | {
    "x a scalar": ({"x": np.float32(1)}, ValueError, "x must have at least 1 dimension(s), got shape []"),
}
OF_TOP_K = OF_FORWARD | {
    "k negative": ({"k": -1}, ValueError, "k must be in 0..4 (the number of labels), got -1"),
    "k above the number of labels": (
        {"k": 5},
        ValueError,
        "k must be in 0..4 (the number of labels), got 5",
    ),
}
OF_LOSS = OF_LAYER | {
    "x of one point": ({"x": zeros(5)}, ValueError, "x must have at least 2 dimension(s), got shape [5]"),
    "x of three dimensions": ({"x": zeros(1, 2, 5)}, ValueError, "x must have shape [B, D], got [1, 2, 5]"),
    "positives a dense matrix of floats": (
        {"positives": zeros(2, 4)},
        TypeError,
        "positives must have dtype int32, got float32",
    ),
    "positives of one point": (
        {"positives": zeros(2, dtype=np.int32)},
        ValueError,
        "positives must have shape [2, P] (one row per row of x), got [2]",
    ),
    "positives of fewer points": (
        {"positives": zeros(1, 2, dtype=np.int32)},
        ValueError,
        "positives must have shape [2, P] (one row per row of x), got [1, 2]",
    ),
    "an unknown loss": ({"loss": "hinge"}, ValueError, "loss must be one of squared_hinge, bce, got 'hinge'"),
    "no loss": ({"loss": None}, ValueError, "loss must be one of squared_hinge, bce, got None"),
    "an array for the loss": (
        {"loss": np.array(["bce", "bce"])},
        ValueError,
        "loss must be one of squared_hinge, bce, got array(['bce', 'bce'], dtype='<U3')",
    ),
    "fewer labels than in the layer": (
        {"num_labels": 3},
        ValueError,
        "num_labels must be in 4..9223372036854775807 (at least L), got 3",
    ),
}
OF_STEP = OF_LOSS | {
    "a rate that is not a scalar": (
        {"learning_rate": zeros(1)},
        ValueError,
        "learning_rate must have shape [] (a scalar), got [1]",
    ),
}
STATE = xla_ops.adam_init(zeros(4, 3), zeros(4))
DENSE_STATE = xla_ops.dense_adam_init(zeros(5, 4))


def bad_states(state):
    """Return the errors that both states of Adam have in common."""
    kind = type(state).__name__
    return {
        "a list for the state": (
            {"state": list(state)},
            TypeError,
            f"state must be of type {kind}, got list",
        ),
        "a tuple for the state": (
            {"state": tuple(state)},
            TypeError,
            f"state must be of type {kind}, got tuple",
        ),
        "no state": ({"state": None}, TypeError, f"state must be of type {kind}, got NoneType"),
        "a count that is not a scalar": (
            {"state": state._replace(count=zeros(1, dtype=np.int32))},
            ValueError,
            "state.count must have shape [] (a scalar), got [1]",
        ),
        "a count of floats": (
            {"state": state._replace(count=np.float32(0))},
            TypeError,
            "state.count must have dtype int32, got float32",
        ),
    }


OF_ADAM = (
    OF_STEP
    | bad_states(STATE)
    | {
        "x and the layer in bfloat16": (
            {"x": BF16, "kernel": BF16, "bias": BF16[:, 0]},
            TypeError,
            "kernel must have dtype float32, got bfloat16",
        ),
        "nu of fewer labels": (
            {"state": STATE._replace(nu_kernel=zeros(3, 3))},
            ValueError,
            "state.nu_kernel must have shape [4, 3] (that of the kernel), got [3, 3]",
        ),
        "mu in bfloat16": (
            {"state": STATE._replace(mu_kernel=BF16)},
            TypeError,
            "state.mu_kernel must have dtype float32, got bfloat16",
        ),
        "no moments of the bias": (
            {"state": xla_ops.adam_init(zeros(4, 3), None)},
            ValueError,
            "state.mu_bias must have shape [4] (that of the bias), got [0]",
        ),
        "mu of one label": (
            {"state": STATE._replace(mu_bias=zeros(1))},
            ValueError,
            "state.mu_bias must have shape [4] (that of the bias), got [1]",
        ),
    }
)
OF_DENSE = bad_states(DENSE_STATE) | {
    "a rate that is not a scalar": OF_STEP["a rate that is not a scalar"],
    "dy of fewer outputs": (
        {"dy": zeros(2, 3)},
        ValueError,
        "dy must have shape [2, 4] (rows of x by columns of kernel), got [2, 3]",
    ),
    "x of fewer inputs": (
        {"x": zeros(2, 4)},
        ValueError,
        "kernel must have shape [4, 4] (columns of x by columns of dy), got [5, 4]",
    ),
    "x of one point": ({"x": zeros(5)}, ValueError, "x must be a matrix, got shape [5]"),
    "kernel in bfloat16": (
        {"kernel": jnp.zeros((5, 4), jnp.bfloat16)},
        TypeError,
        "kernel must have dtype float32, got bfloat16",
    ),
    "mu of another kernel": (
        {"state": DENSE_STATE._replace(mu=zeros(4, 3))},
        ValueError,
        "state.mu must have shape [5, 4] (that of the kernel), got [4, 3]",
    ),
    "nu of fewer outputs": (
        {"state": DENSE_STATE._replace(nu=zeros(5, 3))},
        ValueError,
        "state.nu must have shape [5, 4] (that of the kernel), got [5, 3]",
    ),
    "moments in half precision": (
        {"state": DENSE_STATE._replace(mu=zeros(5, 4, dtype=np.float16))},
        TypeError,
        "state.mu must have dtype float32 or bfloat16, got float16",
    ),
    "moments of two dtypes": (
        {"state": DENSE_STATE._replace(mu=jnp.zeros((5, 4), jnp.bfloat16))},
        TypeError,
        "state.nu must have dtype bfloat16, got float32",
    ),
}
OF_ROUNDING: BadArguments = {
    "x in bfloat16": ({"x": BF16}, TypeError, "x must have dtype float32, got bfloat16"),
    "x of integers": ({"x": zeros(3, dtype=np.int32)}, TypeError, "x must have dtype float32, got int32"),
    "x a scalar": ({"x": np.float32(1)}, ValueError, "x must have at least 1 dimension(s), got shape []"),
    "short rows": ({"row_length": 4}, ValueError, "row_length must be in 5..4294967295, got 4"),
    "long rows": ({"row_length": 2**32}, ValueError, "row_length must be in 5..4294967295, got 4294967296"),
    "first negative": ({"first": -1}, ValueError, "first must be in 0..18446744073709551615, got -1"),
}
OF_KTH: BadArguments = {
    "x of integers": (
        {"x": zeros(3, dtype=np.int32)},
        TypeError,
        "x must have dtype float32 or bfloat16, got int32",
    ),
    "k of 0": ({"k": 0}, ValueError, "k must be in 1..10 (the size of x), got 0"),
    "k above the size": ({"k": 11}, ValueError, "k must be in 1..10 (the size of x), got 11"),
}

# ---- the table ----

WEIGHTS, SIZES, FLOAT32 = ("x", "kernel", "bias"), ("batch", "labels", "dense"), (jnp.float32,)
OPS = {
    "fan_in_matmul": Op(
        xla_ops.fan_in_matmul,
        layer,
        expected_matmul,
        differentiable=WEIGHTS,
        can_be_empty=SIZES,
        shards=True,
        bad_arguments=OF_FORWARD,
    ),
    "fan_in_loss": Op(
        xla_ops.fan_in_loss,
        loss,
        expected_loss,
        differentiable=WEIGHTS,
        can_be_empty=SIZES,
        shards=True,
        bad_arguments=OF_LOSS,
    ),
    "fan_in_top_k": Op(
        xla_ops.fan_in_top_k,
        top_k,
        lambda a: brute_force_top_k(full_problem(a), a["k"]),
        can_be_empty=SIZES,
        shards=True,
        bad_arguments=OF_TOP_K,
    ),
    "fan_in_adam_step": Op(
        xla_ops.fan_in_adam_step,
        adam,
        expected_adam,
        dtypes=FLOAT32,
        can_be_empty=SIZES,
        bad_arguments=OF_ADAM,
    ),
    "fan_in_sgd_step": Op(
        xla_ops.fan_in_sgd_step, sgd, expected_sgd, can_be_empty=SIZES, bad_arguments=OF_STEP
    ),
    "dense_adam_step": Op(
        xla_ops.dense_adam_step,
        dense,
        expected_dense,
        dtypes=FLOAT32,
        can_be_empty=SIZES,
        bad_arguments=OF_DENSE,
    ),
    "kth_smallest_magnitude": Op(
        xla_ops.kth_smallest_magnitude,
        lambda problem, _: {"x": problem.x, "k": 2},
        lambda a: np.sort(np.abs(a["x"].astype(np.float32)), axis=None)[a["k"] - 1],
        bad_arguments=OF_KTH,
    ),
    "round_stochastically": Op(
        xla_ops.round_stochastically,
        rounding,
        expected_rounding,
        dtypes=FLOAT32,
        can_be_empty=("batch", "dense"),
        is_native=False,
        bad_arguments=OF_ROUNDING,
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
    """Return the mark of a test of the selected ops except helpers, with sparse inputs too where possible."""
    return pytest.mark.parametrize(
        ("op", "is_sparse"),
        [
            pytest.param(op, is_sparse, id=name + "-sparse" * is_sparse)
            for name, op in OPS.items()
            if op.expected is not None and selected(op)
            for is_sparse in [False, True][: 1 + op.takes_sparse]
        ],
    )
