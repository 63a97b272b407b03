"""Tests of loading the compiled modules, and of the checks that handlers make."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from xla_ops import _native

MAJOR, MINOR = _native.runtime_ffi_version()
REBUILD = "python -m pip install --force-reinstall --no-deps -e ."


def module_built_for(*version):
    return types.SimpleNamespace(__name__="xla_ops._fake", ffi_version=version)


@pytest.mark.parametrize("minor", {MINOR, MINOR - 1, 0})
def test_same_or_older_minor_ffi_version_is_accepted(minor):
    _native.check_ffi_version(module_built_for(MAJOR, minor))


@pytest.mark.parametrize("version", [(MAJOR, MINOR + 1), (MAJOR + 1, 0), (MAJOR - 1, MINOR)])
def test_other_ffi_version_raises(version):
    with pytest.raises(ImportError) as raised:
        _native.check_ffi_version(module_built_for(*version))
    message = str(raised.value)
    assert f"xla_ops._fake was built for XLA FFI {version[0]}.{version[1]}" in message
    assert f"has {MAJOR}.{MINOR}" in message
    assert REBUILD in message


def test_missing_cpu_module_raises(monkeypatch):
    def raise_not_found(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(_native.importlib, "import_module", raise_not_found)
    with pytest.raises(ImportError, match=r"xla_ops\._cpu has not been built") as raised:
        _native.cpu.__wrapped__()  # without the cache
    assert REBUILD in str(raised.value)


def test_cuda_module_is_optional(monkeypatch):
    def raise_not_found(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(_native.importlib, "import_module", raise_not_found)
    assert _native.cuda.__wrapped__() is None


def test_cuda_module_that_does_not_load_warns(monkeypatch):
    def raise_import_error(name):
        raise ImportError("undefined symbol: cudaLaunch")

    monkeypatch.setattr(_native.importlib, "import_module", raise_import_error)
    with pytest.warns(UserWarning, match=r"CPUs only: xla_ops\._cuda does not load: undefined symbol"):
        assert _native.cuda.__wrapped__() is None


@pytest.mark.parametrize("load", [_native.cpu, _native.cuda])
def test_incompatible_module_registers_no_handlers(monkeypatch, load):
    # Handlers of an incompatible module would break every operation of JAX.
    registered = []
    monkeypatch.setattr(_native.importlib, "import_module", lambda name: module_built_for(MAJOR, MINOR + 1))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **kwargs: registered.append(args))
    with pytest.raises(ImportError, match="Rebuild"):
        load.__wrapped__()
    assert registered == []


@pytest.mark.skipif(_native.cuda() is None, reason="xla_ops._cuda is not built here (no nvcc)")
def test_cuda_and_cpu_modules_have_the_same_handlers():
    handlers = set(_native.cpu().registrations())
    assert set(_native.cuda().registrations()) == handlers
    assert _native.cuda().ffi_version == _native.cpu().ffi_version


def test_unknown_instruction_set_raises():
    default = _native.cpu().isa()
    with pytest.raises(ValueError, match="instruction set 'mmx' is not in this build"):
        _native.cpu().select_isa("mmx")
    assert _native.cpu().isa() == default


X, W, BIAS, Y = (2, 5), (4, 3), (4,), (2, 4)
OTHER = (7, 7)
NO_SPARSE = ((0,), (0,), (0,))  # rows, columns and values of no entries


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="calls the CPU handlers")
@pytest.mark.parametrize(
    ("handler", "shapes", "results", "message"),
    [
        ("forward", (X, OTHER, W, BIAS), (Y,), r"kernel must have shape \[4, 3\], got \[7, 7\]"),
        ("forward", (X, W, W, (9,)), (Y,), r"bias must have shape \[4\], got \[9\]"),
        ("forward", (X, W, W, BIAS), (OTHER,), r"y must have shape \[2, 4\], got \[7, 7\]"),
        ("forward", ((5,), W, W, BIAS), (Y,), r"expected matrices .* got shapes \[5\] and \[4, 3\]"),
        (
            "forward",
            (X, (4, 0), (4, 0), BIAS),
            (Y,),
            r"a fan-in of at least 1, got shapes \[2, 5\] and \[4, 0\]",
        ),
        ("gradients", (X, W, W, OTHER), (X, W, BIAS), r"dy must have shape \[2, 4\], got \[7, 7\]"),
        ("gradients", (X, OTHER, W, Y), (X, W, BIAS), r"kernel must have shape \[4, 3\], got \[7, 7\]"),
        ("gradients", (X, W, W, Y), (OTHER, W, BIAS), r"d_x must have shape \[2, 5\], got \[7, 7\]"),
        ("gradients", (X, W, W, Y), (X, OTHER, BIAS), r"d_kernel must have shape \[4, 3\], got \[7, 7\]"),
        ("gradients", (X, W, W, Y), (X, W, (9,)), r"bias must have shape \[4\], got \[9\]"),
    ],
)
def test_handlers_check_shapes(handler, shapes, results, message):
    # Exported programs call handlers by name, without the checks in Python.
    _native.register()
    shapes = (shapes[0], *NO_SPARSE, *shapes[1:])
    dtypes = (jnp.float32, jnp.int32, jnp.int32, *[jnp.float32] * 2, jnp.int32, jnp.float32)
    arguments = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    call = jax.ffi.ffi_call(f"xla_ops.fan_in_matmul.{handler}", results)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*arguments, num_columns=np.int64(0)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="calls the CPU handlers")
def test_handlers_check_dtypes():
    x, kernel, indices = jnp.zeros(X), jnp.zeros(W, jnp.bfloat16), jnp.zeros(W, jnp.int32)
    call = jax.ffi.ffi_call("xla_ops.fan_in_matmul.forward", jax.ShapeDtypeStruct(Y, jnp.float32))
    operands = (x, *(jnp.zeros(0, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)), kernel, indices)
    with pytest.raises(jax.errors.JaxRuntimeError, match="kernel has an element type that does not fit"):
        jax.block_until_ready(call(*operands, jnp.zeros(BIAS), num_columns=np.int64(0)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="calls the CPU handlers")
@pytest.mark.parametrize(
    ("operands", "results", "attributes", "message"),
    [
        (2, 1, {"k": np.int64(1)}, "expected 1 arguments and 1 results, got 2 and 1"),
        (1, 2, {"k": np.int64(1)}, "expected 1 arguments and 1 results, got 1 and 2"),
        (0, 1, {"k": np.int64(1)}, "arguments: Index out of range"),
        (1, 1, {}, "k: Unexpected attribute"),
        (1, 1, {"k": np.float32(1)}, "k: Wrong scalar data type: expected S64 but got F32"),
    ],
)
def test_handlers_check_number_of_operands_and_attributes(operands, results, attributes, message):
    _native.register()
    shapes = [jax.ShapeDtypeStruct((), jnp.float32)] * results
    call = jax.ffi.ffi_call("xla_ops.kth_smallest", shapes)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*[jnp.ones(3)] * operands, **attributes))


def test_exported_program_runs_in_new_process_after_register(tmp_path):
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in xla_ops.register()]
    kernel, indices = jnp.ones((4, 2)), jnp.array([[0, 1], [1, 2], [2, 0], [0, 0]])
    program = jax.jit(lambda x: xla_ops.fan_in_matmul(x, kernel, indices))
    exported = jax.export.export(program, disabled_checks=checks)(jax.ShapeDtypeStruct((1, 3), jnp.float32))
    (tmp_path / "program").write_bytes(exported.serialize())
    script = (
        "import pathlib, sys, jax, numpy, xla_ops; xla_ops.register(); "
        "program = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes())); "
        "print(program.call(numpy.array([[1, 10, 100]], numpy.float32)).tolist())"
    )
    command = [sys.executable, "-c", script, tmp_path / "program"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[[11.0, 110.0, 101.0, 2.0]]"
