"""Tests of the ops under plain `jax.jit` with sharded operands."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from op_problems import DTYPE, LOSS, Problem, loss_results, make_problem
from op_table import OPS

import xla_ops
from sparse_xmc import FixedFanInLinear
from xla_ops import SparseInputs

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")

BATCH, INPUTS, LABELS, FAN_IN, COLUMNS = 8, 12, 16, 3, 7
SHAPE = (BATCH, INPUTS, LABELS, FAN_IN)
# The dimensions of each array that can be sharded: batch (b) and labels (l).
DIMENSIONS = Problem(x="b", kernel="l", indices="l", bias="l", positives="b", dy="bl")  # type: ignore[arg-type]
PROBLEM = make_problem(*SHAPE)


def make_problems(count):
    """Return several problems, stacked along a new first axis."""
    return jax.tree.map(lambda *a: np.stack(a), *(make_problem(*SHAPE, seed=i) for i in range(count)))


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2), ("i", "j"), axis_types=(axis_type,) * 2, devices=jax.devices()[:4])


def place(array, *spec, mesh=None):
    """Return the array sharded by a partition spec."""
    return jax.device_put(array, jax.NamedSharding(mesh or make_mesh(), jax.P(*spec)))


def shard(problem=PROBLEM, *, batch=None, labels=None, lead=None, mesh=None):
    """Return the problem sharded along mesh axes: batch, labels, and a leading axis; None for replicated."""
    axes = {"b": batch, "l": labels}

    def axes_of(dimensions):
        if dimensions == "bl" and batch and labels and set(batch) & set(labels):
            return batch, None
        return map(axes.get, dimensions)

    return Problem(
        *(
            None if a is None else place(a, *([lead] if lead else []), *axes_of(d), mesh=mesh)
            for a, d in zip(problem, DIMENSIONS, strict=True)
        )
    )


def function_of_problem(op):
    """Return the op as a function of a problem."""
    return lambda p: op.function(**op.arguments(p, None))


def gradients_of_problem(op):
    """Return the gradients of a differentiable op as a function of a problem."""

    def gradients(p):
        arguments = op.arguments(p, None)
        given = {name: arguments[name] for name in op.differentiable}
        y, vjp = jax.vjp(lambda given: op.function(**arguments | given), given)
        return vjp(p.dy if y.ndim else jnp.ones_like(y))

    return gradients


SHARDED = {name: op for name, op in OPS.items() if op.shards}
CALLS = {name: function_of_problem(op) for name, op in SHARDED.items()}
CALLS |= {f"{name} gradients": gradients_of_problem(op) for name, op in SHARDED.items() if op.differentiable}
FOR_EVERY_CALL = pytest.mark.parametrize("call", CALLS)
STEPS = {name: function_of_problem(op) for name, op in OPS.items() if name.endswith("_step")}


def top_k(p, k=6):
    return xla_ops.fan_in_top_k(*p[:4], k)


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def assert_close(actual, expected, tolerance=1e-5):
    def close(actual, expected):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        f32 = (np.asarray(a).astype(np.float32) for a in (actual, expected))
        np.testing.assert_allclose(*f32, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, actual, expected)


def all_gathers(program):
    """Return dtype and shape of the result of each all-gather of a program, such as "f32[8,3]"."""
    return re.findall(r"= \(?(\w+\[[\d,]*\])[^=]* all-gather(?:-start)?\(", program.as_text())


def specs(results):
    return [tuple(a.sharding.spec) for a in jax.tree.leaves(results)]


LAYOUTS = {
    "replicated": {},
    "batch": {"batch": "i"},
    "labels": {"labels": "j"},
    "batch and labels": {"batch": "i", "labels": "j"},
    "labels over both axes": {"labels": ("i", "j")},
    "labels over both axes, reversed": {"labels": ("j", "i")},
}


@FOR_EVERY_CALL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_without_all_gather(call, layout):
    problem = shard(**LAYOUTS[layout])
    program = compiled(CALLS[call], problem)
    assert_close(program(problem), CALLS[call](PROBLEM))
    if call != "fan_in_top_k":
        assert not all_gathers(program)


@pytest.mark.parametrize("labels", ["j", ("i", "j")])
def test_top_k_gathers_only_candidates(labels):
    program = compiled(top_k, shard(labels=labels))
    shards = 2 if labels == "j" else 4
    candidates = shards * min(6, LABELS // shards)
    assert set(all_gathers(program)) == {f"{dtype}[{BATCH},{candidates}]" for dtype in ("f32", "s32")}
    assert not all_gathers(compiled(top_k, shard(batch="i")))


def test_top_k_with_ties_and_nan():
    kernel = np.zeros((LABELS, FAN_IN), np.float32)
    bias = np.float32([0, 1, -0.0, np.nan, 1, 2, -np.inf, 1] * 2)
    for k in (0, 1, 5, LABELS):
        problem = PROBLEM._replace(kernel=kernel, bias=bias)
        actual = jax.jit(top_k, static_argnums=1)(shard(problem, labels=("i", "j")), k)
        assert_close(actual, top_k(problem, k), 0)


@pytest.mark.parametrize(
    ("call", "expected"),
    {
        "fan_in_matmul": [("i", "j")],
        "fan_in_matmul gradients": [("j",), ("j",), ("i",)],  # bias, kernel, x
        "fan_in_loss": [()],
        "fan_in_loss gradients": [("j",), ("j",), ("i",)],
        "fan_in_top_k": [("i",), ("i",)],
    }.items(),
)
def test_results_are_sharded_like_operands(call, expected):
    assert specs(jax.jit(CALLS[call])(shard(batch="i", labels="j"))) == expected


@FOR_EVERY_CALL
@pytest.mark.parametrize("batch", ["i", ("i", "j"), ("j", "i")])
def test_batch_is_gathered_if_it_shares_an_axis_with_labels(call, batch):
    problem = shard(batch=batch, labels="i")
    program = compiled(CALLS[call], problem)
    assert_close(program(problem), CALLS[call](PROBLEM))
    layer = {f"{dtype}[{LABELS},{FAN_IN}]" for dtype in ("f32", "s32")}
    assert all_gathers(program)
    assert not layer & set(all_gathers(program))


@FOR_EVERY_CALL
def test_sharded_kernel_with_replicated_indices_and_bias(call):
    # Each device takes its shard of the replicated indices and bias.
    problem = PROBLEM._replace(kernel=place(PROBLEM.kernel, "j"))
    assert_close(jax.jit(CALLS[call])(problem), CALLS[call](PROBLEM))


def test_sharded_result_of_replicated_operands():
    sharding = jax.NamedSharding(make_mesh(), jax.P("i", "j"))
    logits = CALLS["fan_in_matmul"]
    program = compiled(logits, shard(), out_shardings=sharding)
    assert re.search(rf"f32\[{BATCH // 2},{LABELS // 2}\]\S* custom-call\(", program.as_text())
    assert_close(program(shard()), logits(PROBLEM))


@LOSS
@DTYPE
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients(loss, with_bias, dtype):
    problem = make_problem(*SHAPE, dtype=dtype, with_bias=with_bias)
    actual = jax.jit(loss_results, static_argnums=1)(shard(problem, batch="i", labels="j"), loss)
    assert_close(actual, loss_results(problem, loss), 1e-5 if dtype == jnp.float32 else 2e-2)


def test_num_labels_of_larger_layer():
    def run(p):
        return xla_ops.fan_in_loss(*p[:5], num_labels=3 * LABELS)

    assert_close(jax.jit(run)(shard(batch="i", labels="j")), run(PROBLEM))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_inputs(layout):
    rng = np.random.default_rng(1)
    limits = np.iinfo(np.int32)
    rows = np.r_[rng.integers(-2, BATCH + 2, 60), limits.min, limits.max, -1, BATCH].astype(np.int32)
    columns = rng.integers(0, COLUMNS, 64).astype(np.int32)
    sparse = SparseInputs(rows, columns, rng.normal(size=64).astype(np.float32), COLUMNS)
    problem = make_problem(BATCH, INPUTS + COLUMNS, LABELS, FAN_IN)
    problem = problem._replace(x=problem.x[:, :INPUTS])

    def run(p, sparse):
        return (
            xla_ops.fan_in_matmul(*p[:4], sparse=sparse),
            loss_results(p, sparse=sparse),
            xla_ops.fan_in_top_k(*p[:4], 3, sparse=sparse),
        )

    actual = jax.jit(run)(shard(problem, **LAYOUTS[layout]), jax.tree.map(place, sparse))
    assert_close(actual, run(problem, sparse))


# ---- transforms ----


@FOR_EVERY_CALL
def test_vmap_over_sharded_arrays(call):
    problems = make_problems(2)
    sharded = shard(problems, lead="i", labels="j")
    mapped = jax.vmap(CALLS[call])
    program = compiled(mapped, sharded)
    assert_close(program(sharded), mapped(problems))
    assert call == "fan_in_top_k" or not all_gathers(program)


@FOR_EVERY_CALL
def test_nested_vmap_with_one_layer(call):
    problem = make_problems(2)
    layer = Problem(None, *PROBLEM[1:4], None, None)

    def run(p, layer):
        def one(x, positives, dy, kernel):
            return CALLS[call](Problem(x, kernel, *layer[2:4], positives, dy))

        over_kernels = jax.vmap(one, (None, None, None, 0))
        return jax.vmap(over_kernels, (0, 0, 0, None))(p.x, p.positives, p.dy, jnp.stack([layer.kernel] * 2))

    actual = jax.jit(run)(
        shard(problem, lead="i"), Problem(*(None if a is None else place(a, "j") for a in layer))
    )
    assert_close(actual, run(problem, layer))


def test_checkpoint_and_scan():
    def run(p):
        function = jax.checkpoint(lambda x, kernel: CALLS["fan_in_loss"](p._replace(x=2 * x, kernel=kernel)))
        step = jax.value_and_grad(function, argnums=(0, 1))
        return jax.lax.scan(lambda total, _: (total, step(p.x, p.kernel)), 0, None, length=2)[1]

    assert_close(jax.jit(run)(shard(batch="i", labels="j")), run(PROBLEM))


@FOR_EVERY_CALL
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_mesh_context(call, axis_type):
    op = CALLS[call]
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        assert_close(jax.jit(op)(shard(mesh=mesh)), op(PROBLEM))
        actual = jax.jit(op)(shard(mesh=mesh, batch="i", labels="j"))
    assert_close(actual, op(PROBLEM))


def test_explicit_axes_set_the_result_type():
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        y = jax.eval_shape(CALLS["fan_in_matmul"], shard(mesh=mesh, batch="i", labels="j"))
        assert y.sharding.spec == jax.P("i", "j")
        with pytest.raises(ValueError, match=r"fan_in_matmul cannot be partitioned: .* another dimension"):
            jax.eval_shape(CALLS["fan_in_matmul"], shard(mesh=mesh, batch="i", labels="i"))


def test_shard_map_is_not_partitioned():
    mesh, replicated = make_mesh(), jax.P()
    layer = jax.shard_map(
        lambda *arguments: xla_ops.fan_in_matmul(*arguments),
        mesh=mesh,
        in_specs=(jax.P("i"), jax.P("j"), jax.P("j"), jax.P("j")),
        out_specs=jax.P("i", "j"),
    )
    assert_close(jax.jit(layer)(*PROBLEM[:4]), CALLS["fan_in_matmul"](PROBLEM))
    abstract = jax.sharding.AbstractMesh((2, 2), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    layer = jax.shard_map(
        lambda *arguments: xla_ops.fan_in_matmul(*arguments),
        mesh=abstract,
        in_specs=replicated,
        out_specs=replicated,
    )
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(abstract, replicated))
        for a in PROBLEM[:4]
    ]
    assert (
        "xla_ops.fan_in_matmul" in jax.jit(layer).trace(*shapes).lower(lowering_platforms=("cpu",)).as_text()
    )


# ---- errors ----


def assert_cannot_partition(function, *arguments, match):
    """Check that compilation raises an error that suggests `jax.shard_map`."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=match) as raised:
        compiled(function, *arguments)
    assert "jax.shard_map" in str(raised.value)


@FOR_EVERY_CALL
@pytest.mark.parametrize("operand", ["x", "kernel", "indices"])
def test_sharding_other_dimensions_raises(call, operand):
    weights = np.ones((LABELS, 4), np.float32)
    problem = PROBLEM._replace(kernel=weights, indices=weights.astype(np.int32))
    problem = problem._replace(**{operand: place(getattr(problem, operand), None, "i")})
    message = rf"xla_ops\.{call.split()[0]} cannot be partitioned: {operand} \[.*\] is sharded along dim"
    assert_cannot_partition(CALLS[call], problem, match=message)


def test_sharding_kernel_and_indices_differently_raises():
    problem = PROBLEM._replace(kernel=place(PROBLEM.kernel, "i"), indices=place(PROBLEM.indices, "j"))
    assert_cannot_partition(
        CALLS["fan_in_loss"],
        problem,
        match=r"labels is sharded over \('i',\) in one operand, \('j',\) in another",
    )


def test_sharding_sparse_inputs_raises():
    sparse = SparseInputs(np.zeros(4, np.int32), np.zeros(4, np.int32), np.ones(4, np.float32), COLUMNS)

    def run(p, sparse):
        return xla_ops.fan_in_loss(*p[:5], sparse=sparse)

    for name in ("rows", "columns", "values"):
        sharded = dataclasses.replace(sparse, **{name: place(getattr(sparse, name), "i")})
        assert_cannot_partition(
            run, shard(), sharded, match=rf"fan_in_loss cannot be partitioned: sparse.{name} \[4\]"
        )


@pytest.mark.parametrize("name", STEPS)
def test_sharding_operands_of_steps_raises(name):
    step = STEPS[name]
    assert_close(jax.jit(step)(shard()), step(PROBLEM))
    for layout in ({"batch": "i"}, {"labels": "j"}):
        assert_cannot_partition(
            step, shard(**layout), match=rf"xla_ops\.{name} cannot be partitioned: operand \d+ \["
        )


def test_vmap_of_steps_over_sharded_layers():
    problems = make_problems(4)
    step = jax.vmap(STEPS["fan_in_sgd_step"])
    sharded = shard(problems, lead=("i", "j"))
    program = compiled(step, sharded)
    assert_close(program(sharded), step(problems))
    assert not all_gathers(program)


def test_steps_update_replicated_layers_in_place():
    problem = shard()
    program = compiled(
        lambda kernel, bias, p: STEPS["fan_in_sgd_step"](p._replace(kernel=kernel, bias=bias))[2:],
        problem.kernel,
        problem.bias,
        problem._replace(kernel=None, bias=None),
        donate_argnums=(0, 1),
    )
    assert "output_to_operand_aliasing" in program.as_text()
    assert " copy(" not in program.as_text()


# ---- FixedFanInLinear ----


@nnx.jit
def layer_loss(layer, x):
    return nnx.value_and_grad(lambda layer: jnp.sum(jnp.cos(layer(x))))(layer)


@pytest.mark.parametrize("batch", [None, "i"])
def test_fixed_fan_in_linear(batch):
    layer = FixedFanInLinear(INPUTS, LABELS, fan_in=FAN_IN, rngs=nnx.Rngs(0))
    expected, expected_gradients = layer_loss(layer, PROBLEM.x)
    graph, state = nnx.split(layer)
    state, x = jax.tree.map(lambda a: place(a, "j"), state), place(PROBLEM.x, batch)
    actual, gradients = layer_loss(nnx.merge(graph, state), x)
    assert_close(actual, expected, 1e-4)
    assert_close(*map(nnx.to_pure_dict, (gradients, expected_gradients)))
    assert specs(nnx.to_pure_dict(gradients)) == [("j",), ("j",)]

    program = compiled(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert not all_gathers(program)
    assert specs(program(state, x)) == [(batch, "j")]
