"""Tests of export; `tests/sparse_xmc/test_exporting.py` loads exported programs in a new process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_problems import assert_all_close
from op_table import every_op, make_example

import xla_ops
from xla_ops import _native

WEIGHTS = {"kernel": jnp.ones((4, 2), jnp.bfloat16), "indices": jnp.array([[0, 1], [1, 2], [2, 0], [0, 0]])}


def logits(weights, x):
    return {"logits": xla_ops.fan_in_matmul(x.astype(jnp.bfloat16), weights["kernel"], weights["indices"])}


@pytest.mark.usefixtures("x64")
@every_op(lambda op: op.is_native)
def test_export_with_symbolic_batch(op, is_sparse):
    batch, entries = jax.export.symbolic_shape("batch, entries")
    first_axis = {"sparse": entries} | dict.fromkeys(("x", "positives", "dy", "depends_on"), batch)

    def shape_of(path, leaf):
        shape = leaf.shape and (first_axis.get(path[0].key, leaf.shape[0]), *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    def make(size):
        problem, sparse = make_example(batch=size)
        arguments = op.arguments(problem, sparse if is_sparse else None)
        function, arrays = op.traceable(arguments)
        return function, jax.tree.map(jnp.asarray, arrays), op.expected(arguments)

    function, arrays, _ = make(2)
    leaves, tree = jax.tree.flatten(jax.tree.map_with_path(shape_of, arrays))
    # The program takes and returns flat lists, since other containers would need to be registered.
    program = jax.jit(lambda *leaves: jax.tree.leaves(function(jax.tree.unflatten(tree, leaves))))
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in xla_ops.register()]
    saved = jax.export.export(program, disabled_checks=checks)(*leaves).serialize()
    loaded = jax.export.deserialize(saved)
    for size in (1, 33):
        _, arrays, expected = make(size)
        assert_all_close(loaded.call(*jax.tree.leaves(arrays)), jax.tree.leaves(expected))


def save(path, weights=WEIGHTS):
    (batch,) = jax.export.symbolic_shape("batch")
    xla_ops.save_exported(path, logits, weights, jax.ShapeDtypeStruct((batch, 3), jnp.float32))


@pytest.mark.usefixtures("x64")
def test_save_and_load(tmp_path):
    save(tmp_path / "program")
    run = xla_ops.load_exported(tmp_path / "program")
    for batch in (1, 3):
        result = run(np.tile(np.array([1, 10, 100], np.float32), (batch, 1)))
        assert result["logits"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(result["logits"].astype(jnp.float32), [[11, 110, 101, 2]] * batch)
    with pytest.raises(ValueError, match=r"expected \(batch, 3\) and called with \(2, 4\)"):
        run(np.ones((2, 4), np.float32))


def test_load_on_other_platform_raises(tmp_path, monkeypatch):
    save(tmp_path / "program")
    monkeypatch.setattr(jax.export, "default_export_platform", lambda: "tpu")
    with pytest.raises(ValueError, match=r"program: exported for cpu.*, but this process runs on tpu"):
        xla_ops.load_exported(tmp_path / "program")


def test_program_is_exported_for_all_platforms_with_kernels(tmp_path, monkeypatch):
    platforms = {"cpu"} if _native.cuda() is None else {"cpu", "cuda"}
    save(tmp_path / "program")
    program = (tmp_path / "program" / "program.jax_export").read_bytes()
    assert set(jax.export.deserialize(bytearray(program)).platforms) == platforms


def test_load_of_mismatched_or_damaged_files_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        xla_ops.load_exported(tmp_path / "none")
    save(tmp_path / "program")
    save(tmp_path / "other", WEIGHTS | {"indices": jnp.zeros((4, 2), jnp.uint16)})
    save(tmp_path / "third", jax.tree.map(lambda array: array[:3], WEIGHTS))
    save(tmp_path / "fourth", WEIGHTS | {"more": jnp.ones(3)})
    for name in ("other", "third", "fourth"):
        (tmp_path / name / "weights.npz").rename(tmp_path / "program" / "weights.npz")
        with pytest.raises(ValueError, match=r"weights\.npz: not the weights of .*program"):
            xla_ops.load_exported(tmp_path / "program")
    for name in ("weights.npz", "program.jax_export"):
        (tmp_path / "program" / name).write_bytes(b"something else")
        with pytest.raises(ValueError, match="program: not an exported program"):
            xla_ops.load_exported(tmp_path / "program")
