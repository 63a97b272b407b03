"""The arrays of a head with a row for each label, which on a mesh have rows for padding labels too.

The functions work for all heads. Only a `ShardedHead` has padding labels.
"""

from typing import Any

import jax
from flax import nnx

from sparse_xmc.heads.head import Head
from sparse_xmc.heads.sharded import ShardedHead
from sparse_xmc.heads.specs import names_by_label
from sparse_xmc.modules import key_path_names, path_name

# Where the variables of a head and their moments are, in the state of a classifier and in a training state.
_PLACES = ("head", "params.head", "other.head", "moments.mu", "moments.nu")


def label_rows(head: Head) -> int:
    """Return the number of rows of the arrays by label: L, plus the number of padding labels on a mesh."""
    return head.output.kernel.shape[0] if isinstance(head, ShardedHead) else head.num_labels


def reset_padding_labels(head: Head) -> None:
    """Reset the padding labels of a head on a mesh, after arrays saved from another mesh were read."""
    if isinstance(head, ShardedHead):
        head.reset_padding_labels()


def with_label_rows(state: Any, head: Head, rows: int) -> Any:
    """Return `state` with the shapes of a checkpoint from another mesh.

    Args:
      state: the state of a classifier or a training state, of arrays or shapes.
      head: the head of the classifier.
      rows: number of rows of the saved arrays by label.

    Returns:
      `state`, in which arrays by label are replaced by shapes of `rows` rows. All others stay as they are.
    """
    if rows == label_rows(head):
        return state
    names = {f"{place}.{name}" for name in names_by_label(nnx.state(head)) for place in _PLACES}

    def resize(path: tuple[Any, ...], array: Any) -> Any:
        if path_name(name for name in key_path_names(path) if name != "value") not in names:
            return array
        return jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)

    return jax.tree_util.tree_map_with_path(resize, state)
