"""What is done to any Flax module: taking it apart, and having it in training or in use."""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


class Scale(nnx.Variable):
    """What inputs are multiplied by. Not an `nnx.Param`, so it stays as it is, and is saved."""


def split(module: nnx.Module, *filters: type[nnx.Variable]) -> tuple[nnx.GraphDef, list[nnx.State]]:
    """The structure of a module, and its variables of each of these types in turn, then all others."""
    graphdef, *states = nnx.split(module, *filters, ...)
    return graphdef, states


def check_features(module: nnx.Module, x: Any, features: int, ndim: int | None = None) -> None:
    """Raises ValueError unless x is [..., features], and if `ndim` is given, has so many dimensions."""
    if x.ndim < 1 or x.shape[-1] != features or ndim not in (None, x.ndim):
        lead = "..." if ndim is None else "B"
        raise ValueError(
            f"{type(module).__name__}: features must have shape [{lead}, {features}], got {list(x.shape)}"
        )


def parameters_of(module: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter by its path."""
    return {path_name(path): node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Param)}


def count_parameters(module: nnx.Module) -> int:
    """How many numbers its parameters have."""
    return sum(parameter.size for parameter in parameters_of(module).values())


def path_name(path: Iterable[Any]) -> str:
    """A path in a module as one name, such as "output.kernel"."""
    return ".".join(map(str, path))


def key_path_names(path: Iterable[Any]) -> list[str]:
    """The names in a path as `jax.tree_util` gives it, of whatever kinds of nodes."""
    return [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]


def in_training(module: Module) -> Module:
    """The module as it is trained, with dropout, on the same arrays; the module itself stays as it is."""
    copy = _of_same_arrays(module)
    copy.train()
    return copy


def in_evaluation(module: Module) -> Module:
    """The module as it is used, without dropout, on the same arrays; the module itself stays as it is."""
    copy = _of_same_arrays(module)
    copy.eval()
    return copy


def _of_same_arrays(module: Module) -> Module:
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda array: array, state))  # with Variables of its own
