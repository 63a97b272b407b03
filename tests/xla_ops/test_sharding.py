"""The ops under plain `jax.jit`, with operands that are spread over devices."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import xla_ops
from sparse_xmc import FixedFanInLinear
from xla_ops import SparseInputs

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")

BATCH, INPUTS, LABELS, FAN_IN, COLUMNS = 8, 12, 16, 3, 7


class Problem(NamedTuple):
    x: np.ndarray
    kernel: np.ndarray
    indices: np.ndarray
    bias: np.ndarray | None
    positives: np.ndarray
    dy: np.ndarray


# What can be cut of each, along batch ("b") and labels ("l").
DIMENSIONS = Problem(x="b", kernel="l", indices="l", bias="l", positives="b", dy="bl")  # type: ignore[arg-type]


def make_problem(dtype=np.float32, *, with_bias=True, inputs=INPUTS, lead=()):
    rng = np.random.default_rng(0)

    def values(*shape):
        return rng.normal(size=(*lead, *shape)).astype(dtype)

    return Problem(
        values(BATCH, INPUTS),
        values(LABELS, FAN_IN),
        rng.integers(-1, inputs + 1, (*lead, LABELS, FAN_IN)).astype(np.int32),
        values(LABELS) if with_bias else None,
        rng.integers(-1, LABELS + 1, (*lead, BATCH, 5)).astype(np.int32),
        values(BATCH, LABELS),
    )


PROBLEM = make_problem()


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2), ("i", "j"), axis_types=(axis_type,) * 2, devices=jax.devices()[:4])


def put(array, *spec, mesh=None):
    return jax.device_put(array, jax.NamedSharding(mesh or make_mesh(), jax.P(*spec)))


def spread(problem=PROBLEM, *, batch=None, labels=None, lead=None, mesh=None):
    """The problem, its batch and labels along these mesh axes; None is replicated on all devices."""
    axes = {"b": batch, "l": labels}

    def along(dimensions):
        if dimensions == "bl" and batch and labels and set(batch) & set(labels):
            return batch, None
        return map(axes.get, dimensions)

    return Problem(
        *(
            None if a is None else put(a, *([lead] if lead else []), *along(d), mesh=mesh)
            for a, d in zip(problem, DIMENSIONS, strict=True)
        )
    )


def logits(p):
    return xla_ops.fan_in_matmul(*p[:4])


def matmul_gradients(p):
    def function(x, kernel, bias):
        return xla_ops.fan_in_matmul(x, kernel, p.indices, bias)

    return jax.vjp(function, p.x, p.kernel, p.bias)[1](p.dy)


def loss(p, name="squared_hinge", sparse=None):
    return xla_ops.fan_in_loss(*p[:5], loss=name, sparse=sparse)


def loss_gradients(p, name="squared_hinge", sparse=None):
    def function(x, kernel, bias):
        return loss(p._replace(x=x, kernel=kernel, bias=bias), name, sparse)

    has_bias = p.bias is not None
    return jax.value_and_grad(function, argnums=(0, 1, 2)[: 2 + has_bias])(p.x, p.kernel, p.bias)


def top_k(p, k=6):
    return xla_ops.fan_in_top_k(*p[:4], k)


OPS = [logits, matmul_gradients, loss, loss_gradients, top_k]


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def assert_close(actual, expected, tolerance=1e-5):
    def close(actual, expected):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        f32 = (np.asarray(a).astype(np.float32) for a in (actual, expected))
        np.testing.assert_allclose(*f32, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, actual, expected)


def gathered(program):
    """The shapes of what is gathered."""
    return re.findall(r"= \(?(\w+\[[\d,]*\])[^=]* all-gather(?:-start)?\(", program.as_text())


def specs(results):
    return [tuple(a.sharding.spec) for a in jax.tree.leaves(results)]


LAYOUTS = {
    "replicated": {},
    "batch": {"batch": "i"},
    "labels": {"labels": "j"},
    "both": {"batch": "i", "labels": "j"},
    "labels over all": {"labels": ("i", "j")},
    "labels over all, the other way round": {"labels": ("j", "i")},
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_without_a_gather(op, layout):
    problem = spread(**LAYOUTS[layout])
    program = compiled(op, problem)
    assert_close(program(problem), op(PROBLEM))
    if op is not top_k:
        assert not gathered(program)


@pytest.mark.parametrize("labels", ["j", ("i", "j")])
def test_top_k_gathers_the_best_alone(labels):
    program = compiled(top_k, spread(labels=labels))
    parts = 2 if labels == "j" else 4
    candidates = parts * min(6, LABELS // parts)
    assert set(gathered(program)) == {f"{dtype}[{BATCH},{candidates}]" for dtype in ("f32", "s32")}
    assert not gathered(compiled(top_k, spread(batch="i")))


def test_top_k_of_equal_scores_and_of_none():
    kernel = np.zeros((LABELS, FAN_IN), np.float32)
    bias = np.float32([0, 1, -0.0, np.nan, 1, 2, -np.inf, 1] * 2)
    for k in (0, 1, 5, LABELS):
        problem = PROBLEM._replace(kernel=kernel, bias=bias)
        actual = jax.jit(top_k, static_argnums=1)(spread(problem, labels=("i", "j")), k)
        assert_close(actual, top_k(problem, k), 0)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (logits, [("i", "j")]),
        (matmul_gradients, [("i",), ("j",), ("j",)]),
        (loss_gradients, [(), ("i",), ("j",), ("j",)]),
        (top_k, [("i",), ("i",)]),
    ],
)
def test_results_are_where_their_parts_are(op, expected):
    assert specs(jax.jit(op)(spread(batch="i", labels="j"))) == expected


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", ["i", ("i", "j"), ("j", "i")])
def test_one_axis_for_batch_and_labels_gathers_the_batch(op, batch):
    problem = spread(batch=batch, labels="i")
    program = compiled(op, problem)
    assert_close(program(problem), op(PROBLEM))
    layer = {f"{t}[{LABELS},{FAN_IN}]" for t in ("f32", "s32")}
    assert gathered(program)
    assert not layer & set(gathered(program))


@pytest.mark.parametrize("op", OPS)
def test_the_kernel_alone_is_spread(op):
    # The indices and the bias, which are everywhere, are cut in place; so is the result, if it is wanted so.
    problem = PROBLEM._replace(kernel=put(PROBLEM.kernel, "j"))
    assert_close(jax.jit(op)(problem), op(PROBLEM))


def test_parts_of_a_result_are_made_where_they_are_wanted():
    wanted = jax.NamedSharding(make_mesh(), jax.P("i", "j"))
    program = compiled(logits, spread(), out_shardings=wanted)
    assert re.search(rf"f32\[{BATCH // 2},{LABELS // 2}\]\S* custom-call\(", program.as_text())
    assert_close(program(spread()), logits(PROBLEM))


@pytest.mark.parametrize("name", ["squared_hinge", "bce"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_losses(name, with_bias, dtype):
    problem = make_problem(dtype, with_bias=with_bias)
    actual = jax.jit(loss_gradients, static_argnums=1)(spread(problem, batch="i", labels="j"), name)
    assert_close(actual, loss_gradients(problem, name), 1e-5 if dtype is np.float32 else 2e-2)


def test_labels_that_are_a_part():
    def of_part(p):
        return xla_ops.fan_in_loss(*p[:5], num_labels=3 * LABELS)

    assert_close(jax.jit(of_part)(spread(batch="i", labels="j")), of_part(PROBLEM))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_inputs(layout):
    rng = np.random.default_rng(1)
    limits = np.iinfo(np.int32)
    rows = np.r_[rng.integers(-2, BATCH + 2, 60), limits.min, limits.max, -1, BATCH].astype(np.int32)
    columns = rng.integers(0, COLUMNS, 64).astype(np.int32)
    sparse = SparseInputs(rows, columns, rng.normal(size=64).astype(np.float32), COLUMNS)
    problem = make_problem(inputs=INPUTS + COLUMNS)

    def run(p, sparse):
        return (
            xla_ops.fan_in_matmul(*p[:4], sparse=sparse),
            loss_gradients(p, sparse=sparse),
            xla_ops.fan_in_top_k(*p[:4], 3, sparse=sparse),
        )

    actual = jax.jit(run)(spread(problem, **LAYOUTS[layout]), jax.tree.map(put, sparse))
    assert_close(actual, run(problem, sparse))


# ---- transforms ----


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_what_is_spread(op):
    problem = make_problem(lead=(2,))
    there = spread(problem, lead="i", labels="j")
    program = compiled(jax.vmap(op), there)
    assert_close(program(there), jax.vmap(op)(problem))
    assert op is top_k or not gathered(program)


@pytest.mark.parametrize("op", OPS)
def test_nested_vmap_with_one_layer(op):
    problem = make_problem(lead=(2,))
    layer = Problem(None, *PROBLEM[1:4], None, None)

    def run(p, layer):
        def one(x, positives, dy, kernel):
            return op(Problem(x, kernel, *layer[2:4], positives, dy))

        over_kernels = jax.vmap(one, (None, None, None, 0))
        return jax.vmap(over_kernels, (0, 0, 0, None))(p.x, p.positives, p.dy, jnp.stack([layer.kernel] * 2))

    actual = jax.jit(run)(
        spread(problem, lead="i"), Problem(*(None if a is None else put(a, "j") for a in layer))
    )
    assert_close(actual, run(problem, layer))


def test_checkpoint_and_scan():
    def run(p):
        function = jax.checkpoint(lambda x, kernel: loss(p._replace(x=2 * x, kernel=kernel)))
        step = jax.value_and_grad(function, argnums=(0, 1))
        return jax.lax.scan(lambda total, _: (total, step(p.x, p.kernel)), 0, None, length=2)[1]

    assert_close(jax.jit(run)(spread(batch="i", labels="j")), run(PROBLEM))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_in_a_mesh_context(op, axis_type):
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        assert_close(jax.jit(op)(spread(mesh=mesh)), op(PROBLEM))
        actual = jax.jit(op)(spread(mesh=mesh, batch="i", labels="j"))
    assert_close(actual, op(PROBLEM))


def test_explicit_axes_are_in_the_types():
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        y = jax.eval_shape(logits, spread(mesh=mesh, batch="i", labels="j"))
        assert y.sharding.spec == jax.P("i", "j")
        with pytest.raises(ValueError, match=r"fan_in_matmul cannot be partitioned: .* another dimension"):
            jax.eval_shape(logits, spread(mesh=mesh, batch="i", labels="i"))


def test_shard_map_is_left_alone():
    mesh, whole = make_mesh(), jax.P()
    layer = jax.shard_map(
        lambda *arguments: xla_ops.fan_in_matmul(*arguments),
        mesh=mesh,
        in_specs=(jax.P("i"), jax.P("j"), jax.P("j"), jax.P("j")),
        out_specs=jax.P("i", "j"),
    )
    assert_close(jax.jit(layer)(*PROBLEM[:4]), logits(PROBLEM))
    abstract = jax.sharding.AbstractMesh((2, 2), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    layer = jax.shard_map(
        lambda *arguments: xla_ops.fan_in_matmul(*arguments),
        mesh=abstract,
        in_specs=whole,
        out_specs=whole,
    )
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(abstract, whole))
        for a in PROBLEM[:4]
    ]
    assert (
        "xla_ops.fan_in_matmul" in jax.jit(layer).trace(*shapes).lower(lowering_platforms=("cpu",)).as_text()
    )


# ---- what is not partitioned ----


def fails(function, *arguments, match):
    with pytest.raises(jax.errors.JaxRuntimeError, match=match) as raised:
        compiled(function, *arguments)
    assert "jax.shard_map" in str(raised.value)


@pytest.mark.parametrize(
    ("op", "name"), [*zip(OPS, ["matmul", "matmul", "loss", "loss", "top_k"], strict=True)]
)
@pytest.mark.parametrize("operand", ["x", "kernel", "indices"])
def test_only_batch_and_labels(op, name, operand):
    weights = np.ones((LABELS, 4), np.float32)
    problem = PROBLEM._replace(kernel=weights, indices=weights.astype(np.int32))
    problem = problem._replace(**{operand: put(getattr(problem, operand), None, "i")})
    fails(
        op,
        problem,
        match=rf"xla_ops\.fan_in_{name} cannot be partitioned: {operand} \[.*\] is sharded along dim",
    )


def test_parts_of_one_layer_along_other_axes():
    problem = PROBLEM._replace(kernel=put(PROBLEM.kernel, "i"), indices=put(PROBLEM.indices, "j"))
    fails(loss, problem, match=r"labels is sharded over \('i',\) in one operand, \('j',\) in another")


def test_spread_entries_of_sparse_inputs():
    sparse = SparseInputs(np.zeros(4, np.int32), np.zeros(4, np.int32), np.ones(4, np.float32), COLUMNS)

    def run(p, sparse):
        return loss(p, sparse=sparse)

    for name in ("rows", "columns", "values"):
        there = dataclasses.replace(sparse, **{name: put(getattr(sparse, name), "i")})
        fails(run, spread(), there, match=rf"fan_in_loss cannot be partitioned: sparse.{name} \[4\]")


def adam_step(p):
    return xla_ops.fan_in_adam_step(*p[:5], xla_ops.adam_init(p.kernel, p.bias), 1e-3)


def sgd_step(p):
    return xla_ops.fan_in_sgd_step(*p[:5], 1e-3)


def dense_step(p):
    kernel = p.kernel.T
    x, dy = jnp.concatenate([p.dy] * 2)[:, :FAN_IN], jnp.concatenate([p.dy] * 2)
    return xla_ops.dense_adam_step(x, dy, kernel, xla_ops.dense_adam_init(kernel), 1e-3)


STEPS = {"fan_in_adam_step": adam_step, "fan_in_sgd_step": sgd_step, "dense_adam_step": dense_step}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_for_replicated_operands(name):
    step = STEPS[name]
    assert_close(jax.jit(step)(spread()), step(PROBLEM))
    for layout in ({"batch": "i"}, {"labels": "j"}):
        fails(step, spread(**layout), match=rf"xla_ops\.{name} cannot be partitioned: operand \d+ \[")


def test_steps_of_layers_that_are_spread():
    problem = make_problem(lead=(4,))
    step = jax.vmap(sgd_step)
    there = spread(problem, lead=("i", "j"))
    program = compiled(step, there)
    assert_close(program(there), step(problem))
    assert not gathered(program)


def test_replicated_layers_are_updated_in_place():
    there = spread()
    program = compiled(
        lambda kernel, bias, p: sgd_step(p._replace(kernel=kernel, bias=bias))[2:],
        there.kernel,
        there.bias,
        there._replace(kernel=None, bias=None),
        donate_argnums=(0, 1),
    )
    assert "output_to_operand_aliasing" in program.as_text()
    assert " copy(" not in program.as_text()


# ---- the layer ----


@nnx.jit
def loss_of_layer(layer, x):
    return nnx.value_and_grad(lambda layer: jnp.sum(jnp.cos(layer(x))))(layer)


@pytest.mark.parametrize("batch", [None, "i"])
def test_layer(batch):
    layer = FixedFanInLinear(INPUTS, LABELS, fan_in=FAN_IN, rngs=nnx.Rngs(0))
    expected, expected_gradients = loss_of_layer(layer, PROBLEM.x)
    graph, state = nnx.split(layer)
    state, x = jax.tree.map(lambda a: put(a, "j"), state), put(PROBLEM.x, batch)
    actual, gradients = loss_of_layer(nnx.merge(graph, state), x)
    assert_close(actual, expected, 1e-4)
    assert_close(*map(nnx.to_pure_dict, (gradients, expected_gradients)))
    assert specs(nnx.to_pure_dict(gradients)) == [("j",), ("j",)]

    program = compiled(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert not gathered(program)
    assert specs(program(state, x)) == [(batch, "j")]
