"""Tests of the workspaces that XLA plans for calls of CUDA handlers; they need no GPU."""

import ctypes
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xla_ops
from xla_ops import SparseInputs, _native, adam_init, fan_in_loss, fan_in_matmul, fan_in_top_k

pytestmark = pytest.mark.skipif(_native.cuda() is None, reason="xla_ops._cuda is not built here (no nvcc)")

HANDLERS = (
    "xla_ops.fan_in_matmul.forward",
    "xla_ops.fan_in_matmul.gradients",
    "xla_ops.fan_in_loss.value",
    "xla_ops.fan_in_loss.gradients",
    "xla_ops.fan_in_step.sgd",
    "xla_ops.fan_in_step.adam",
    "xla_ops.fan_in_top_k",
    "xla_ops.dense_step.adam",
)
FLOAT32_ONLY = {"xla_ops.fan_in_step.adam", "xla_ops.dense_step.adam"}
WORKSPACE = re.compile(r"tensor<([\w]+x)(\d+)xui8>")


def run_all_ops(x, kernel, bias, indices, positives):
    """Call each of HANDLERS once; the steps of Adam only in float32."""
    y, vjp = jax.vjp(lambda *a: fan_in_matmul(a[0], a[1], indices, a[2]), x, kernel, bias)
    loss = jax.value_and_grad(lambda *a: fan_in_loss(a[0], a[1], indices, a[2], positives), (0, 1, 2))
    value = fan_in_loss(x, kernel, indices, bias, positives)
    layer = (kernel, indices, bias)
    steps = [xla_ops.fan_in_sgd_step(x, *layer, positives, 0.1)]
    if x.dtype == jnp.float32:
        *step, _ = xla_ops.fan_in_adam_step(x, *layer, positives, adam_init(kernel, bias), 0.1)
        steps.append(step)
        dense = jnp.ones((x.shape[1], y.shape[1]))
        steps.append(xla_ops.dense_adam_step(x, y, dense, xla_ops.dense_adam_init(dense), 0.1)[0])
    return y, vjp(y), loss(x, kernel, bias), value, steps, fan_in_top_k(x, *layer, 5)


def argument_shapes(batch=33, in_features=40, labels=70, fan_in=3, dtype=jnp.float32, lead=()):
    """Return shapes and dtypes of the arguments of `run_all_ops`."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((*lead, *shape), dtype)

    indices, positives = array(labels, fan_in, dtype=jnp.int32), array(batch, 2, dtype=jnp.int32)
    return array(batch, in_features), array(labels, fan_in), array(labels), indices, positives


def argument_values(batch=33, seed=0):
    """Return random arrays of `argument_shapes(batch)`."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal(a.shape, np.float32)
        if a.dtype == jnp.float32
        else rng.integers(0, 40, a.shape, np.int32)
        for a in argument_shapes(batch)
    ]


def assert_all_close(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5), actual, expected)


def lower(function, *arguments, platform):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def handler_calls(text):
    """Return a dict from the names of called handlers to the lines of their calls."""
    found = re.findall(r"(.*custom_call @(xla_ops[\w.]+).*)", text)
    return {name: line for line, name in found}


def workspace_bytes(
    handler, batch, in_features, labels, fan_in, dtype=jnp.float32, k=5, entries=0, num_columns=None
):
    """Return the size of a handler's workspace; without sparse inputs if num_columns is None."""
    results = [jax.ShapeDtypeStruct((batch, k), jnp.float32)]
    x, kernel = (jax.ShapeDtypeStruct(s, dtype) for s in ((batch, in_features), (labels, fan_in)))
    sparse = [] if num_columns is None else [jax.ShapeDtypeStruct((entries,), jnp.int32)] * 3
    return np.prod(_native.cuda_workspace(handler, results, num_columns, x, *sparse, kernel).shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cuda_handlers_have_workspaces(dtype):
    called = handler_calls(lower(run_all_ops, *argument_shapes(dtype=dtype), platform="cuda"))
    assert called.keys() == set(HANDLERS) - (FLOAT32_ONLY if dtype == jnp.bfloat16 else set())
    for handler, line in called.items():
        pieces, size = WORKSPACE.findall(line)[-1]
        assert line.endswith(f"tensor<{pieces}{size}xui8>)")
        assert (pieces, int(size)) == ("1x", workspace_bytes(handler, 33, 40, 70, 3, dtype))


def test_cpu_handlers_have_no_workspaces():
    text = lower(run_all_ops, *argument_shapes(), platform="cpu")
    assert handler_calls(text).keys() == set(HANDLERS)
    assert "ui8" not in text
    compiled = jax.jit(run_all_ops).lower(*argument_shapes()).compile().as_text()
    assert "conditional" not in compiled
    if jax.default_backend() == "cpu":
        assert "u8[" not in compiled


def test_vmap_stores_no_workspaces():
    text = lower(jax.vmap(run_all_ops), *argument_shapes(lead=(7,)), platform="cuda")
    assert handler_calls(text).keys() == set(HANDLERS)
    assert {pieces for pieces, _ in WORKSPACE.findall(text)} == {"1x"}


def test_empty_results_need_no_call():
    # XLA cannot add a call to a CUDA graph if the call launches nothing.
    called = handler_calls(lower(run_all_ops, *argument_shapes(batch=0), platform="cuda"))
    assert called.keys() == set(HANDLERS) - {"xla_ops.fan_in_matmul.forward", "xla_ops.fan_in_top_k"}
    x, kernel, bias, indices, _ = argument_shapes(labels=0)
    assert not handler_calls(lower(fan_in_matmul, x, kernel, indices, bias, platform="cuda"))


def test_export_for_cpu_and_cuda():
    pytest.importorskip("flatbuffers", reason="jax needs it to serialize")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in xla_ops.register()]
    (batch,) = jax.export.symbolic_shape("batch")
    export = jax.export.export(jax.jit(run_all_ops), platforms=("cpu", "cuda"), disabled_checks=checks)
    exported = jax.export.deserialize(export(*argument_shapes(batch)).serialize())
    assert exported.platforms == ("cpu", "cuda")
    for b in (1, 300):
        assert_all_close(exported.call(*argument_values(b)), run_all_ops(*argument_values(b)))


def test_repeated_runs_of_a_program():
    # On a GPU, XLA captures the program as a CUDA graph after the first run, and replays the graph.
    program = jax.jit(run_all_ops)
    for seed in range(4):
        assert_all_close(program(*argument_values(seed=seed)), run_all_ops(*argument_values(seed=seed)))


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@given(
    batch=st.integers(1, 20_000),  # a symbolic dimension is at least 1
    in_features=st.integers(0, 1000),
    labels=st.integers(0, 3_000_000),
    fan_in=st.integers(1, 300),
    k=st.integers(0, 2000),
)
def test_workspace_for_symbolic_batch_is_large_enough(handler, dtype, batch, in_features, labels, fan_in, k):
    shape = (in_features, labels, fan_in, dtype, k)
    assert workspace_bytes(handler, batch, *shape) <= -(-batch // 256) * workspace_bytes(handler, 256, *shape)


@pytest.mark.parametrize("handler", HANDLERS[:-1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@given(
    batch=st.integers(1, 20_000),
    in_features=st.integers(0, 1000),
    entries=st.integers(0, 1_000_000),
    columns=st.integers(0, 1_000_000),
    labels=st.integers(1, 3_000_000),
)
def test_workspace_for_symbolic_entries_is_large_enough(
    handler, dtype, batch, in_features, entries, columns, labels
):
    shape, sparse = (in_features, labels, 32, dtype, 5), {"num_columns": columns}
    needed = workspace_bytes(handler, batch, *shape, entries=entries, **sparse)
    assert needed <= -(-batch // 256) * workspace_bytes(handler, 256, *shape, entries=entries, **sparse)
    pieces = -(-entries // 4096)
    assert needed <= (1 + pieces) * workspace_bytes(handler, batch, *shape, entries=4096, **sparse)
    assert needed <= (-(-batch // 256) + pieces) * workspace_bytes(
        handler, 256, *shape, entries=4096, **sparse
    )


def test_export_with_sparse_inputs():
    pytest.importorskip("flatbuffers", reason="jax needs it to serialize")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in xla_ops.register()]
    batch, entries = jax.export.symbolic_shape("batch, entries")

    def run(x, kernel, bias, indices, rows, columns, values):
        sparse = SparseInputs(rows, columns, values, 30)
        return (
            fan_in_matmul(x, kernel, indices, bias, sparse=sparse),
            fan_in_top_k(x, kernel, indices, bias, 5, sparse=sparse),
        )

    lists = [jax.ShapeDtypeStruct((entries,), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
    export = jax.export.export(jax.jit(run), platforms=("cpu", "cuda"), disabled_checks=checks)
    exported = jax.export.deserialize(export(*argument_shapes(batch)[:4], *lists).serialize())
    rng = np.random.default_rng(0)
    for b, n in ((1, 1), (300, 5000)):
        found = [rng.integers(0, size, n, np.int32) for size in (b, 30)] + [np.ones(n, np.float32)]
        operands = [*argument_values(b)[:4], *found]
        assert_all_close(exported.call(*operands), run(*operands))


def test_workspaces_are_small():
    # The size of Amazon-670K with batch 256, where the kernel has 82 MB and x has 32 MB.
    shape = (256, 32_768, 670_091, 32)
    megabytes = {handler: workspace_bytes(handler, *shape) / 1e6 for handler in HANDLERS}
    assert megabytes["xla_ops.fan_in_matmul.forward"] < 35
    assert megabytes["xla_ops.fan_in_matmul.gradients"] < 80
    assert megabytes["xla_ops.fan_in_loss.value"] < 35
    assert megabytes["xla_ops.fan_in_loss.gradients"] < 80
    assert megabytes["xla_ops.fan_in_step.adam"] == megabytes["xla_ops.fan_in_loss.gradients"]
    assert megabytes["xla_ops.fan_in_top_k"] < 90
    assert megabytes["xla_ops.dense_step.adam"] == 0


def test_workspaces_for_sparse_inputs_are_small():
    # 256 texts of 400 words out of a million; a dense array of these would have 1,024 MB.
    sparse = {"entries": 100_000, "num_columns": 1_000_000}
    for handler in HANDLERS[:-1]:
        for dtype, most in ((jnp.float32, 15), (jnp.bfloat16, 22)):
            shape = (256, 128, 670_091, 32, dtype)
            assert workspace_bytes(handler, *shape, **sparse) - workspace_bytes(handler, *shape) < most * 1e6
        assert workspace_bytes(handler, 256, 128, 1000, 32, num_columns=0, entries=1000) == workspace_bytes(
            handler, 256, 128, 1000, 32
        )


def test_error_message_for_old_driver():
    insufficient_driver, invalid_value = 35, 1  # of cudaError_t
    found = r"(there is no driver|the driver is for CUDA \d+\.\d)"
    built = r"xla_ops was built with CUDA \d+\.\d, which needs a driver for it"
    pattern = rf"{built}, but {found}\. Update the driver, .* CUDA_HOME"
    assert re.fullmatch(pattern, _native.cuda().error_message(insufficient_driver))
    assert _native.cuda().error_message(invalid_value) == "CUDA: invalid argument"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kth_smallest_workspace_is_small(dtype):
    x = jax.ShapeDtypeStruct((3_000_000, 64), dtype)
    text = lower(lambda x: xla_ops.kth_smallest_magnitude(x, 1000), x, platform="cuda")
    (line,) = handler_calls(text).values()
    (size,) = re.findall(r"tensor<(\d+)xui8>", line)
    assert int(size) < 100_000


# ---- traits of handlers, read with the structs of XLA's c_api.h ----


class Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
    )


class Metadata(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("version_struct_size", ctypes.c_size_t),
        ("version_extension", ctypes.c_void_p),
        ("version", ctypes.c_int * 2),
        ("traits", ctypes.c_uint32),
        ("state_type_id", ctypes.c_int64),
    )


class CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("rest", ctypes.c_void_p * 19),  # all fields up to the attributes
    )


def traits(capsule) -> int:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    metadata = Metadata(struct_size=ctypes.sizeof(Metadata))
    extension = Extension(ctypes.sizeof(Extension), 1, None, ctypes.addressof(metadata))
    frame = CallFrame(ctypes.sizeof(CallFrame), ctypes.addressof(extension))
    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(pointer(capsule, None))
    assert handler(ctypes.addressof(frame)) is None
    assert tuple(metadata.version) == _native.cuda().ffi_version
    return metadata.traits


def test_handlers_are_compatible_with_command_buffers():
    compatible = 1  # XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE
    found = {name: traits(capsule) for name, capsule in _native.cuda().registrations().items()}
    assert found == dict.fromkeys([*HANDLERS, "xla_ops.kth_smallest"], compatible)
