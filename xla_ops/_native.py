"""Native modules: loading, registration of their handlers with XLA, and calls of the handlers."""

import functools
import importlib
import pathlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xla_ops._partition import partitioned

_REBUILD = "python -m pip install --force-reinstall --no-deps -e ."


def runtime_ffi_version() -> tuple[int, int]:
    """Return the XLA FFI version of the installed jaxlib, read from its headers."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    versions = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text))
    return int(versions["MAJOR"]), int(versions["MINOR"])


def check_ffi_version(module: Any) -> None:
    """Raise ImportError unless the installed jaxlib can run the handlers of a native module.

    If handlers built with newer headers than jaxlib's were registered, every JAX operation would fail with
    "Unable to initialize backend"; therefore call this function before registration.
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
    """Register the handlers with XLA, as the first call of any op does, and return their names.

    It is needed only for direct use of `jax.export`, without `save_exported` and `load_exported`. A program
    that runs an exported program must call it first. To export a program with ops, pass
    `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in xla_ops.register()]`.
    """
    cuda()
    return tuple(cpu().registrations())


def platforms() -> tuple[str, ...]:
    """Return the JAX backends that the ops support: "cpu", and "gpu" if the CUDA module is built."""
    return ("cpu",) if cuda() is None else ("cpu", "gpu")


@functools.cache
def cpu():
    """Return the CPU module after registration of its handlers.

    Raises:
      ImportError: the module is missing, or does not match the installed jaxlib.
    """
    try:
        module = importlib.import_module("xla_ops._cpu")
    except ModuleNotFoundError as error:
        where = pathlib.Path(__file__).parent
        raise ImportError(
            f"The native module xla_ops._cpu has not been built for this Python in {where}. "
            f"Build it from the root of the repository:\n    {_REBUILD}\n"
            "If xla_ops is also installed elsewhere, start Python outside of the clone to use that one."
        ) from error
    _register_handlers(module, "cpu")
    return module


@functools.cache
def cuda():
    """Return the CUDA module after registration of its handlers under the same names; None without one.

    Loading needs neither a GPU nor the CUDA libraries. Raises ImportError if it does not match jaxlib.
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


def call(
    handler: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Array,
    aliases: Mapping[int, int] | None = None,
    **attributes: np.generic,
) -> tuple[Array, ...]:
    """Call a handler that exists on all platforms; `jax.vmap` turns the call into a loop.

    In a build with CUDA, the size of the workspace is computed from the shapes of the operands and of the
    first result (`cuda_workspace`). A handler with other operands than those below calls `jax.ffi.ffi_call`
    itself, within `_partition.partitioned`, like `_kth_smallest.py`.

    Args:
      handler: name of the handler.
      results: shapes of the results, without the workspace that CUDA handlers have as their last result.
      operands: x [B, D], the kernel (a matrix), and all others, after `match_varying_axes`. Handlers with
        an attribute `num_columns` have sparse inputs: rows, columns and values between x and the kernel.
      aliases: number of the result that reuses the memory of an operand, by number of the operand.
      attributes: attributes of the handler, NumPy scalars.
    """
    return _call(
        handler, tuple(results), tuple((aliases or {}).items()), tuple(attributes.items()), *operands
    )


def match_varying_axes(*operands: Array) -> tuple[Array, ...]:
    """Return the operands of an op, each varying over all mesh axes over which any of them varies.

    Within `jax.shard_map`, a batch may differ between devices while the layer is the same on all. JAX then
    sums the gradient of the layer over the devices. Elsewhere the operands are returned unchanged.
    """
    axes = [jax.typeof(a).manual_axis_type.varying for a in operands]
    missing = [tuple(sorted(frozenset().union(*axes) - own)) for own in axes]
    return tuple(jax.lax.pcast(a, names, to="varying") for a, names in zip(operands, missing, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)  # caches the programs of eager calls
def _call(handler, results, aliases, attributes, *operands):
    # If all results are empty, no handler is called: it would launch nothing, and an empty CUDA graph is an
    # error.
    if all(0 in result.shape for result in results):
        zeros = (jnp.zeros(result.shape, result.dtype) for result in results)
        return tuple(match_varying_axes(array, *operands)[0] for array in zeros)

    def call(results):
        """Return the call for results of these shapes, of whole arrays or of the shards of one device."""

        def native(*operands, workspace=()):
            # Within `jax.shard_map`, results vary over the same axes as the operands.
            mesh, axis_type = jax.sharding.get_abstract_mesh(), jax.typeof(operands[0]).manual_axis_type
            replicated = None if mesh.empty else jax.NamedSharding(mesh, jax.P())
            types = [
                jax.ShapeDtypeStruct(
                    r.shape, r.dtype, sharding=r.sharding or replicated, manual_axis_type=axis_type
                )
                for r in (*results, *workspace)
            ]
            ffi_call = jax.ffi.ffi_call(handler, types, input_output_aliases=dict(aliases))
            return tuple(ffi_call(*operands, **dict(attributes))[: len(results)])

        def on_any_platform(*operands):
            if cuda() is None:
                return native(*operands)
            workspace = [cuda_workspace(handler, results, dict(attributes).get("num_columns"), *operands)]
            on_cuda = functools.partial(native, workspace=workspace)
            return jax.lax.platform_dependent(*operands, cuda=on_cuda, default=native)

        # vmap of ffi_call would be a loop that keeps the workspace of each iteration.
        return jax.custom_batching.sequential_vmap(on_any_platform)

    return partitioned(handler, results, call, *operands)


# With a symbolic batch, the workspace is ceil(batch / 256) times the workspace of 256 points. With a symbolic
# number of sparse entries, it has ceil(entries / 4,096) further pieces, each enough for 4,096 entries.
_SYMBOLIC_BATCH, _SYMBOLIC_ENTRIES = 256, 4096


def cuda_workspace(
    handler: str,
    results: Sequence[jax.ShapeDtypeStruct],
    num_columns: np.int64 | None,
    x: Array,
    *others: Array,
) -> jax.ShapeDtypeStruct:
    """Return the shape of the workspace, the last result of a CUDA handler; its size may be 0.

    Args:
      handler: name of the handler.
      results: shapes of the results; the last dimension of the first result of `fan_in_top_k` is k.
      num_columns: number of sparse inputs; None for a handler without sparse inputs.
      x: [B, D].
      others: the operands after x, as for `call`.
    """
    from xla_ops import _cuda  # which exists only if it was built with nvcc

    entries, kernel = (0, others[0]) if num_columns is None else (others[0].shape[0], others[3])
    pieces, (batch, in_features), (labels, fan_in) = 1, x.shape, kernel.shape
    if not isinstance(batch, int):
        pieces, batch = (batch + _SYMBOLIC_BATCH - 1) // _SYMBOLIC_BATCH, _SYMBOLIC_BATCH
    if not isinstance(entries, int):
        pieces += (entries + _SYMBOLIC_ENTRIES - 1) // _SYMBOLIC_ENTRIES
        entries = _SYMBOLIC_ENTRIES
    k = results[0].shape[-1] if results[0].shape else 0  # only `fan_in_top_k` uses it
    is_bfloat16 = x.dtype == jnp.bfloat16
    size = _cuda.workspace_bytes(
        handler, is_bfloat16, batch, in_features, labels, fan_in, k, entries, int(num_columns or 0)
    )
    return jax.ShapeDtypeStruct((pieces, size), jnp.uint8)


def _register_handlers(module: Any, platform: str) -> None:
    check_ffi_version(module)
    for name, handler in module.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform=platform)
