"""Loads the compiled module of each platform and registers its handlers with XLA."""

import functools
import importlib
import pathlib
import re
import warnings

import jax

_REBUILD = "python -m pip install --force-reinstall --no-deps -e ."


def runtime_ffi_version() -> tuple[int, int]:
    """The version of XLA's FFI that the installed jaxlib speaks, read from the headers it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    major, minor = (
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", text).group(1)) for part in ("MAJOR", "MINOR")
    )
    return major, minor


def check_ffi_version(module) -> None:
    """Raises ImportError unless the installed jaxlib can run the handlers of a native module.

    Registering handlers built with newer headers than jaxlib's would make every JAX operation fail with
    "Unable to initialize backend", so this is asked first.
    """
    built, runtime = tuple(module.ffi_version), runtime_ffi_version()
    if built[0] != runtime[0] or built > runtime:
        raise ImportError(
            f"{module.__name__} was built for XLA FFI {built[0]}.{built[1]}, but the installed jaxlib "
            f"{jax.lib.__version__} has {runtime[0]}.{runtime[1]}. Rebuild it, "
            f"from the root of the repository:\n    {_REBUILD}"
        )


@functools.cache
def register() -> tuple[str, ...]:
    """Registers the handlers with XLA, as the first call of any op does, and returns their names.

    A program that runs what `jax.export` saved needs the first; exporting with ops in it needs the second:
    `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in xla_ops.register()]`.
    """
    cuda()
    return tuple(cpu().registrations())


@functools.cache
def cpu():
    """The CPU module, its handlers registered. Raises ImportError if it is missing or does not fit jaxlib."""
    try:
        module = importlib.import_module("xla_ops._cpu")
    except ModuleNotFoundError as error:
        raise ImportError(
            "The native module xla_ops._cpu has not been built for this Python. "
            f"Build it from the root of the repository:\n    {_REBUILD}"
        ) from error
    _register_handlers(module, "cpu")
    return module


@functools.cache
def cuda():
    """The CUDA module, its handlers registered under the same names; None where there is none.

    It needs neither a GPU nor CUDA's libraries to load. Raises ImportError if it does not fit jaxlib.
    """
    try:
        module = importlib.import_module("xla_ops._cuda")
    except ModuleNotFoundError:
        return None  # built without nvcc
    except ImportError as error:
        warnings.warn(f"xla_ops runs on CPUs only: xla_ops._cuda does not load: {error}", stacklevel=2)
        return None
    _register_handlers(module, "CUDA")
    return module


def _register_handlers(module, platform: str) -> None:
    check_ffi_version(module)
    for name, handler in module.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)
