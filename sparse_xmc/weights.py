"""Arrays of a module or a training state on disk, by Orbax, in directories of any name."""

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
from sparse_xmc.heads import Head
from sparse_xmc.heads.unstructured import UnstructuredLinear
from sparse_xmc.layers import FixedFanInLinear
from sparse_xmc.model import Classifier
from sparse_xmc.modules import key_path_names, path_name

# Orbax numbers the saves of a process, and two threads that save at once mix these numbers up.
_ORBAX = threading.Lock()
_LIKE_A_PATTERN = re.compile(r"[][*?\\]")


def save_weights(path: str | os.PathLike, model: nnx.Module) -> None:
    """Saves all arrays of a module in a new directory, in place of one that is there.

    Raises:
      OSError: they could not be written; a directory that was there is still there.
    """
    path = Path(path).absolute()
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # a name for Orbax, whatever this one is
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
    """Saves all arrays of a module in a new directory, and checks that they can be read.

    Args:
      path: its name is like no pattern of `glob`.
      model: the module.

    Raises:
      OSError: they could not be written.
    """
    state = nnx.split(model)[1]
    with writing(path) as target, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(target, args=ocp.args.StandardSave(state))
        check_sizes(checkpointer.metadata(target).item_metadata, state, path)


def load_weights(path: str | os.PathLike, model: nnx.Module, *, label_rows: int | None = None) -> Any:
    """What `save_weights` saved of a module like `model`, of which only the shapes matter.

    `label_rows` are those of the head that was saved, if it was on a mesh.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: what is there is of another model.
    """
    graphdef, state = nnx.split(model)
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    with reading(path) as readable, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        head = model.head if isinstance(model, Classifier) else None
        check_sizes(checkpointer.metadata(readable).item_metadata, state, path, head, label_rows)
        args = ocp.args.StandardRestore(shapes_of(state), strict=False)
        loaded = nnx.merge(graphdef, checkpointer.restore(readable, args=args))
    _check_connections(loaded, path)
    if isinstance(loaded, Classifier):
        loaded.head.fill_up()
    return loaded


def _check_connections(model: nnx.Module, path: Path) -> None:
    """Raises ValueError if a layer has connections to inputs that it lacks, which no array's size tells."""
    for where, layer in nnx.iter_modules(model):
        if isinstance(layer, FixedFanInLinear | UnstructuredLinear):
            indices = layer.indices[...]
            last = int(jnp.max(indices if isinstance(layer, FixedFanInLinear) else indices[:, 1], initial=0))
            if last >= layer.in_features:
                raise ValueError(
                    f"{path}: not the weights of such a model: {path_name((*where, 'indices'))} has input "
                    f"{last}, expected 0..{layer.in_features - 1}"
                )


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[Path]:
    """Yields a path of a directory for Orbax, to one thread at a time.

    Orbax looks for files by `glob`, with the directory as a part of the pattern. A directory whose path has a
    character with a meaning in patterns is therefore reached through a symbolic link.

    Raises:
      ValueError: the directory of temporary files, where the link would be, has such a path too.
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
    """Yields the path of a new directory for Orbax, as `reading` does, in place of one that is there.

    Args:
      path: its name has no character with a meaning in patterns.

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
    """Deletes what a save that did not end has left, if this is the first process."""
    if jax.process_index() == 0:
        for left in (path, *path.parent.glob(f"{path.name}.orbax*")):
            remove(left)


@contextlib.contextmanager
def _errors_of_one_line(path: Path) -> Iterator[None]:
    """Turns all that a save by Orbax raises into an OSError of one line; tracebacks it prints are left out.

    Raises:
      OSError: the block raised an exception; the message has the path.
    """
    logger, hook, reason = logging.getLogger("absl"), sys.unraisablehook, None
    level = logger.level

    def ignore_writes_under_way(unraisable):
        """Leaves out that writes which were under way meanwhile found the save ended."""
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    try:
        logger.setLevel(logging.CRITICAL + 1)
        sys.unraisablehook = ignore_writes_under_way
        try:
            yield
        except Exception as error:  # of many types, by what failed
            reason = _reason(error)
        if reason is not None:
            gc.collect()  # the coroutines of writes that have ended, while the hook is there
            raise OSError(f"{path}: could not be written: {reason}")
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of an error, of 300 characters at most; for a full disk no more than that."""
    full = os.strerror(errno.ENOSPC)
    if full in str(error):
        return full
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0][:300] or type(error).__name__


def wait_for_all(what: str) -> None:
    """Waits until all processes are here, if there are several."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"sparse_xmc {what}")


def check_sizes(
    metadata: Any, expected: Any, path: Path, head: Head | None = None, label_rows: int | None = None
) -> None:
    """Raises ValueError unless what was saved fits a state, but for the rows that fill up a mesh's labels.

    Compared before anything is read: Orbax' own complaint comes half way.

    Args:
      metadata: Orbax's, of what was saved.
      expected: the state, of arrays or their shapes.
      path: where it was saved, for the message.
      head: that of the state, if it has one.
      label_rows: how many rows what is `by_label` had when it was saved.
    """
    there, here = _leaves(metadata.tree), _leaves(expected)
    by_label = "|".join(map(re.escape, head.by_label)) if head is not None else ""
    has_rows = re.compile(rf"(((params|other)\.)?head|moments\.\w+)\.({by_label})" if by_label else "(?!)")

    def as_saved(name: str) -> str:
        """The size that an array must have had."""
        array = here[name]
        if label_rows is None or not has_rows.fullmatch(name):
            return dtype_and_shape(array)
        return dtype_and_shape(jax.ShapeDtypeStruct((label_rows, *array.shape[1:]), array.dtype))

    wanted = {name: as_saved(name) for name in here}
    found = {name: dtype_and_shape(array) for name, array in there.items()}
    if different := sorted(name for name in found | wanted if found.get(name) != wanted.get(name)):
        name = different[0]
        raise ValueError(
            f"{path}: not the weights of such a model: {name} is {found.get(name, 'missing')}, "
            f"expected {wanted.get(name, 'none')}"
        )


def _leaves(tree: Any) -> dict[str, Any]:
    """Each array, or its shape, by its path; random keys as they are saved."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        leaves[path_name(name for name in key_path_names(path) if name != "value")] = leaf
    return leaves


def dtype_and_shape(array: Any) -> str:
    """The dtype and the shape of an array, for messages."""
    return f"{array.dtype} {list(array.shape)}"


def shapes_of(state: Any) -> Any:
    """The shapes of a tree's arrays, to be restored where these are, or on this process' first device."""
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape_of(array):
        sharding = getattr(array, "sharding", None) or local
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(shape_of, state)
