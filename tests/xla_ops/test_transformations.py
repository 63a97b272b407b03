"""Tests of every op against its expected results, directly and under JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_problems import assert_all_close
from op_table import every_op, make_example

SHAPE = {"batch": 7, "dense": 12, "columns": 9, "labels": 10, "fan_in": 4}


def make_arguments(op, is_sparse, **changes):
    """Return valid arguments; without sparse inputs, some indices are out of range."""
    problem, sparse = make_example(**SHAPE | changes)
    return op.arguments(problem, sparse if is_sparse else None)


@pytest.mark.usefixtures("x64")
@every_op()
def test_results_match_expected(op, is_sparse):
    arguments = make_arguments(op, is_sparse)
    function, arrays = op.traceable(arguments)
    results = function(arrays)
    assert all(a.dtype in (jnp.float32, jnp.bfloat16, jnp.int32) for a in jax.tree.leaves(results))
    assert_all_close(results, op.expected(arguments))
    assert_all_close(jax.jit(function)(arrays), op.expected(arguments))


@pytest.mark.usefixtures("x64")
@every_op(lambda op: jnp.bfloat16 in op.dtypes)
def test_bfloat16_results_match_expected(op, is_sparse):
    arguments = make_arguments(op, is_sparse, dtype=jnp.bfloat16, integer_values=True)
    function, arrays = op.traceable(arguments)
    assert_all_close(jax.jit(function)(arrays), op.expected(arguments), rtol=2e-2, atol=2e-2)


def shape_and_dtype(array):
    return array.shape, array.dtype


@every_op()
def test_eval_shape_matches_results(op, is_sparse):
    for dtype in op.dtypes:
        arguments = make_arguments(op, is_sparse, dtype=dtype)
        function, arrays = op.traceable(arguments)
        shapes, (first, *_) = jax.eval_shape(function, arrays), jax.tree.leaves(op.expected(arguments))
        results = function(arrays)
        assert jax.tree.map(shape_and_dtype, shapes) == jax.tree.map(shape_and_dtype, results)
        assert jax.tree.leaves(shapes)[0].shape == np.shape(first)


@pytest.mark.parametrize("empty", ["batch", "dense", "labels"])
@every_op(lambda op: op.can_be_empty)
def test_empty_dimension(op, is_sparse, empty):
    if empty not in op.can_be_empty:
        pytest.skip(f"not with {empty} of size 0")
    arguments = make_arguments(op, is_sparse, **{empty: 0})
    function, arrays = op.traceable(arguments)
    assert_all_close(jax.jit(function)(arrays), op.expected(arguments))


@every_op()
def test_results_on_last_device(op, is_sparse):
    device = jax.devices()[-1]
    arguments = make_arguments(op, is_sparse)
    function, arrays = op.traceable(arguments)
    results = jax.jit(function)(jax.device_put(arrays, device))
    assert all(result.devices() == {device} for result in jax.tree.leaves(results))
    assert_all_close(results, op.expected(arguments))


# Sets of arguments that vmap maps over.
MAPPED = {
    "all": ["x", "kernel", "indices", "bias", "positives", "dy", "sparse", "seed"],
    "x": ["x"],
    "kernel": ["kernel"],
    "indices": ["indices"],
    "bias": ["bias"],
    "positives": ["positives"],
    "x and kernel": ["x", "kernel"],
    "kernel and bias": ["kernel", "bias"],
    "entries": ["sparse"],
    "x and entries": ["x", "sparse"],
    "values": ["sparse.values"],
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("first_axis", [True, False], ids=["axis 0", "other axes"])
@every_op(lambda op: op.is_native)
def test_vmap_matches_loop(op, is_sparse, first_axis):
    problems = [op.traceable(make_arguments(op, is_sparse, seed=seed)) for seed in range(3)]
    function = problems[0][0]
    paths, tree = jax.tree.flatten_with_path(problems[0][1])
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    leaves = list(zip(*(jax.tree.leaves(arrays) for _, arrays in problems), strict=True))
    run = jax.jit(lambda *leaves: function(jax.tree.unflatten(tree, leaves)))
    tested = set()
    for mapped in MAPPED.values() if op.shards else (MAPPED["all"], MAPPED["x"]):
        is_mapped = tuple(name in mapped or name.split(".")[0] in mapped for name in names)
        if not any(is_mapped) or is_mapped in tested:
            continue
        tested.add(is_mapped)
        axes, arguments = [], []
        for name, values, m in zip(names, leaves, is_mapped, strict=True):
            axis = 0 if first_axis else 1 if name in ("x", "indices") else np.ndim(values[0])
            axes.append(axis if m else None)
            arguments.append(np.stack(values, axis) if m else values[0])
        each = [run(*(v[i * m] for v, m in zip(leaves, is_mapped, strict=True))) for i in range(3)]
        actual = jax.jit(jax.vmap(run, axes))(*arguments)
        assert_all_close(actual, jax.tree.map(lambda *a: jnp.stack(a), *each))


@pytest.mark.usefixtures("x64")
@every_op(lambda op: op.differentiable)
def test_checkpoint_matches_expected(op, is_sparse):
    arguments = make_arguments(op, is_sparse)
    function, arrays = op.traceable(arguments, jax.checkpoint)
    assert_all_close(jax.jit(function)(arrays), op.expected(arguments))
