"""Programs with these ops as files of `jax.export`, for processes that lack the code that made them."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xla_ops._native import cuda, register

_PROGRAM, _WEIGHTS = "program.jax_export", "weights.npz"


def save_exported(
    path: str | os.PathLike, function: Callable, weights: Any, *inputs: jax.ShapeDtypeStruct
) -> None:
    """Saves a function and its weights for `load_exported`: a program, by `jax.export`, and a file of arrays.

    The program is for CPUs, and for CUDA too where the CUDA module is built, whatever this process runs on.

    Args:
      path: a new directory.
      function: of the weights and the inputs; it returns arrays, or tuples, lists or dictionaries of them.
      weights: any pytree of arrays, without random keys. They are arguments of the program, not within it.
      inputs: the shapes and dtypes of its inputs; sizes may be symbols (`jax.export.symbolic_shape`).

    Raises:
      FileExistsError: there is something at the path.
    """
    path = Path(path)
    leaves, tree = jax.tree.flatten(weights)

    def program(leaves, *inputs):
        return function(jax.tree.unflatten(tree, leaves), *inputs)

    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in register()]
    platforms = ("cpu",) if cuda() is None else ("cpu", "cuda")
    export = jax.export.export(jax.jit(program), platforms=platforms, disabled_checks=checks)
    exported = export([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves], *inputs)
    arrays = [np.asarray(leaf) for leaf in leaves]
    path.mkdir(parents=True)
    np.savez(path / _WEIGHTS, *arrays)
    (path / _PROGRAM).write_bytes(exported.serialize())


def load_exported(path: str | os.PathLike) -> Callable:
    """The function that `save_exported` saved, of its inputs alone: arrays of JAX or NumPy.

    It is compiled when it is called with inputs of new sizes: where these are symbols, few sizes are better
    than many. Files of one version of JAX are read by later ones for half a year.

    The program in the file is run as it is, with the rights of this process, and nothing checks what it does:
    load files of authors whom you would trust to give you code, from places where others cannot write.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the program is not for this process' platform, or the files are not of one program.
    """
    path = Path(path)
    register()
    try:
        exported = jax.export.deserialize(bytearray((path / _PROGRAM).read_bytes()))
        with np.load(path / _WEIGHTS) as arrays:
            weights = [arrays[name] for name in arrays.files]
    except (OSError, ImportError):
        raise
    except Exception as error:  # of what is damaged JAX may raise anything
        raise ValueError(f"{path}: not an exported program: {error!r}") from error
    if (platform := jax.export.default_export_platform()) not in exported.platforms:
        raise ValueError(
            f"{path}: exported for {' and '.join(exported.platforms)}, but this process runs on {platform}: "
            f"export it where xla_ops is built for {platform}, or set JAX_PLATFORMS"
        )
    (expected, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    if [w.shape for w in weights] == [a.shape for a in expected]:  # NumPy's files have bfloat16 as two bytes
        pairs = zip(weights, expected, strict=True)
        weights = [w.view(a.dtype) if w.dtype.kind == "V" else w for w, a in pairs]
    if [(w.shape, w.dtype) for w in weights] != [(a.shape, a.dtype) for a in expected]:
        raise ValueError(f"{path / _WEIGHTS}: not the weights of {path / _PROGRAM}")
    return functools.partial(jax.jit(exported.call), [jax.numpy.asarray(w) for w in weights])
