"""Saving of the arrays of modules and training states by Orbax, in directories of any name."""

import contextlib
import errno
import gc
import hashlib
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from sparse_xmc.data.files import remove
from sparse_xmc.heads import reset_padding_labels, with_label_rows
from sparse_xmc.layers import SparseLinear
from sparse_xmc.model import Classifier
from sparse_xmc.modules import key_path_names, path_name

# Orbax numbers the saves of a process; concurrent saves of two threads would get wrong numbers.
_ORBAX = threading.Lock()
_LIKE_A_PATTERN = re.compile(r"[][*?\\]")


def save_weights(path: str | os.PathLike, model: nnx.Module) -> None:
    """Save all arrays of a module to a directory, replacing an existing directory.

    Raises:
      OSError: the arrays could not be written; an existing directory is kept.
    """
    path = Path(path).absolute()
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # a name without special characters
    new, old = (path.with_name(f".{digest}.{end}") for end in ("new", "old"))
    is_first = jax.process_index() == 0
    if is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(new, model)
    if is_first:
        remove(old)
        if path.exists() or path.is_symlink():
            path.rename(old)
        new.rename(path)
        remove(old)
    wait_for_all("weights")


def write_weights(path: Path, model: nnx.Module) -> None:
    """Save all arrays of a module to a new directory, and check that they can be read.

    Args:
      path: the directory; its name must not contain characters with a meaning in `glob`.
      model: the module.

    Raises:
      OSError: the arrays could not be written.
    """
    state = nnx.split(model)[1]
    with writing(path) as target, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(target, args=ocp.args.StandardSave(state))
        check_sizes(checkpointer.metadata(target).item_metadata, state, path)
    wait_for_all("written weights")  # The caller may move them, and other processes still check them here.


def load_weights(path: str | os.PathLike, model: Any, *, label_rows: int | None = None) -> Any:
    """Load the arrays saved by `save_weights` into a copy of a module.

    Args:
      path: the directory.
      model: an `nnx.Module` of the same structure; only the shapes of its arrays are used.
      label_rows: number of rows by label in the saved head of a `Classifier`; None for the number in `model`.

    Returns:
      A module like `model` with the saved arrays.

    Raises:
      FileNotFoundError: the directory does not exist.
      ValueError: the directory contains the weights of another model.
    """
    graphdef, state = nnx.split(model)
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    with reading(path) as readable, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        saved = state if label_rows is None else with_label_rows(state, model.head, label_rows)
        check_sizes(checkpointer.metadata(readable).item_metadata, saved, path)
        args = ocp.args.StandardRestore(shapes_of(state), strict=False)
        loaded = nnx.merge(graphdef, checkpointer.restore(readable, args=args))
    _check_connections(loaded, path)
    if isinstance(loaded, Classifier):
        reset_padding_labels(loaded.head)
    return loaded


def _check_connections(model: nnx.Module, path: Path) -> None:
    """Raise ValueError if a layer has connections to inputs out of range, which shapes do not reveal."""
    for where, layer in nnx.iter_modules(model):
        if isinstance(layer, SparseLinear):
            last = int(jnp.max(layer.connected_inputs(), initial=0))
            if last >= layer.in_features:
                raise ValueError(
                    f"{path}: not the weights of such a model: {path_name((*where, 'indices'))} has input "
                    f"{last}, expected 0..{layer.in_features - 1}"
                )


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[Path]:
    """Yield a path by which Orbax can read a directory, to one thread at a time.

    Orbax finds files by `glob`, with the directory as a part of the pattern. Therefore a directory whose path
    contains a character with a meaning in patterns is accessed by a symbolic link.

    Raises:
      ValueError: the path of the temporary directory, which would contain the link, has such a character.
    """
    directory = directory.absolute()
    with _ORBAX:
        if not _LIKE_A_PATTERN.search(str(directory)):
            yield directory
            return
        with tempfile.TemporaryDirectory(prefix="sparse_xmc_") as scratch:
            if _LIKE_A_PATTERN.search(scratch):
                raise ValueError(f"{scratch}: expected a path without []*?\\ for temporary files; set TMPDIR")
            link = Path(scratch) / "link"
            link.symlink_to(directory, target_is_directory=True)
            yield link


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a path by which Orbax can write a new directory. An existing directory is deleted first.

    Args:
      path: the directory; its name must not contain characters with a meaning in `glob`.

    Raises:
      OSError: the block raised an exception; the message has the path.
    """
    with _errors_of_one_line(path), reading(path.parent) as parent:
        # The other processes wait for the first one when they save.
        _remove_partial(path)
        try:
            yield parent / path.name
        except BaseException:
            with contextlib.suppress(OSError):
                _remove_partial(path)
            raise


def _remove_partial(path: Path) -> None:
    """Delete the files of an incomplete save, if this is the first process."""
    if jax.process_index() == 0:
        for left in (path, *path.parent.glob(f"{path.name}.orbax*")):
            remove(left)


@contextlib.contextmanager
def _errors_of_one_line(path: Path) -> Iterator[None]:
    """Convert exceptions of an Orbax save to an OSError with a one-line message, without tracebacks.

    Raises:
      OSError: the block raised an exception; the message has the path.
    """
    logger, hook, reason = logging.getLogger("absl"), sys.unraisablehook, None
    level = logger.level

    def ignore_pending_writes(unraisable: Any) -> None:
        """Ignore errors of pending writes after the save has ended."""
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    try:
        logger.setLevel(logging.CRITICAL + 1)
        sys.unraisablehook = ignore_pending_writes
        try:
            yield
        except Exception as error:  # The class depends on the cause.
            reason = _reason(error)
        if reason is not None:
            gc.collect()  # Collects the coroutines of ended writes while the hook is installed.
            raise OSError(f"{path}: could not be written: {reason}")
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """Return the first line of an error message, at most 300 characters; for a full disk only this cause."""
    full = os.strerror(errno.ENOSPC)
    if full in str(error):
        return full
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0][:300] or type(error).__name__


def wait_for_all(what: str) -> None:
    """Wait until all processes have called this function, if there are several."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"sparse_xmc {what}")


def check_sizes(metadata: Any, expected: Any, path: Path) -> None:
    """Raise ValueError unless saved arrays have the shapes and dtypes of a state.

    The check precedes the reading of arrays, as Orbax would report a mismatch only after reading a part.

    Args:
      metadata: Orbax metadata of the saved arrays.
      expected: the state, of arrays or shapes.
      path: the saved directory, for the message.
    """
    found, wanted = (
        {name: dtype_and_shape(array) for name, array in _leaves(tree).items()}
        for tree in (metadata.tree, expected)
    )
    if different := sorted(name for name in found | wanted if found.get(name) != wanted.get(name)):
        name = different[0]
        raise ValueError(
            f"{path}: not the weights of such a model: {name} is {found.get(name, 'missing')}, "
            f"expected {wanted.get(name, 'none')}"
        )


def _leaves(tree: Any) -> dict[str, Any]:
    """Return the arrays or shapes of a pytree by their paths; random keys as saved, as integers."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        leaves[path_name(name for name in key_path_names(path) if name != "value")] = leaf
    return leaves


def dtype_and_shape(array: Any) -> str:
    """Return the dtype and the shape of an array as text, for messages."""
    return f"{array.dtype} {list(array.shape)}"


def shapes_of(state: Any) -> Any:
    """Return the shapes of the arrays of a pytree with their shardings, for restoring.

    Arrays without a sharding are restored on the first device of this process.
    """
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape_of(array: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(array, "sharding", None) or local
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(shape_of, state)
