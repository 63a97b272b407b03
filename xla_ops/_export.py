"""Export of programs with these ops as files, for processes without the code of the programs."""

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
    """Save a function, as a program of `jax.export`, and its weights, for `load_exported`.

    The program runs on CPUs, and also on CUDA if the CUDA module is built, whatever the platform of this
    process.

    Args:
      path: a new directory.
      function: function of the weights and the inputs that returns arrays, or tuples, lists or dictionaries
        of arrays.
      weights: any pytree of arrays, without random keys. They are arguments of the program, not constants.
      inputs: shapes and dtypes of the inputs; sizes may be symbolic (`jax.export.symbolic_shape`).

    Raises:
      FileExistsError: the path exists.
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
    """Load a function saved by `save_exported`; it takes the inputs, as arrays of JAX or NumPy.

    The function is compiled for each new size of its inputs; with symbolic sizes, use few different sizes.
    Files written by one version of JAX can be read by later versions for half a year.

    The program is run without any checks, with the permissions of this process. Load only files of authors
    whom you would trust to give you code, from places where others cannot write.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the program does not support the platform of this process, or the files do not belong
        together.
    """
    path = Path(path)
    register()
    try:
        exported = jax.export.deserialize(bytearray((path / _PROGRAM).read_bytes()))
        with np.load(path / _WEIGHTS) as arrays:
            weights = [arrays[name] for name in arrays.files]
    except (OSError, ImportError):
        raise
    except Exception as error:  # JAX may raise any exception for a damaged file.
        raise ValueError(f"{path}: not an exported program: {error!r}") from error
    if (platform := jax.export.default_export_platform()) not in exported.platforms:
        raise ValueError(
            f"{path}: exported for {' and '.join(exported.platforms)}, but this process runs on {platform}: "
            f"export it where xla_ops is built for {platform}, or set JAX_PLATFORMS"
        )
    (expected, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    if [w.shape for w in weights] == [a.shape for a in expected]:  # NumPy stores bfloat16 as raw two bytes.
        pairs = zip(weights, expected, strict=True)
        weights = [w.view(a.dtype) if w.dtype.kind == "V" else w for w, a in pairs]
    if [(w.shape, w.dtype) for w in weights] != [(a.shape, a.dtype) for a in expected]:
        raise ValueError(f"{path / _WEIGHTS}: not the weights of {path / _PROGRAM}")
    return functools.partial(jax.jit(exported.call), [jax.numpy.asarray(w) for w in weights])
