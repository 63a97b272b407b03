"""Helpers for Flax NNX modules."""

from collections.abc import Iterable
from typing import Any, TypeVar

from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


class Scale(nnx.Variable):
    """A constant factor of the inputs. It is no `nnx.Param`, so it is saved but not trained."""


def split(module: nnx.Module, *filters: type[nnx.Variable]) -> tuple[nnx.GraphDef, list[nnx.State]]:
    """Split a module into its structure, its variables of each given type, and all other variables."""
    graphdef, *states = nnx.split(module, *filters, ...)
    return graphdef, states


def merge(graphdef: nnx.GraphDef, *states: nnx.State) -> Any:
    """Return the module of a structure and variables, as new variables that share the arrays of `states`.

    Changes of the module's variables leave `states` as they are.
    """
    return nnx.merge(graphdef, *states, copy=True)


def check_features(module: nnx.Module, x: Any, features: int, ndim: int | None = None) -> None:
    """Raise ValueError unless x is [..., features] and has `ndim` axes, if `ndim` is given."""
    if x.ndim < 1 or x.shape[-1] != features or ndim not in (None, x.ndim):
        lead = "..." if ndim is None else "B"
        raise ValueError(
            f"{type(module).__name__}: features must have shape [{lead}, {features}], got {list(x.shape)}"
        )


def parameters_of(module: nnx.Module) -> dict[str, nnx.Param]:
    """Return the parameters of a module by their paths."""
    return {path_name(path): node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Param)}


def count_parameters(module: nnx.Module) -> int:
    """Return the total number of elements of all parameters of a module."""
    return sum(parameter.size for parameter in parameters_of(module).values())


def path_name(path: Iterable[Any]) -> str:
    """Join a path in a module into one name, such as "output.kernel"."""
    return ".".join(map(str, path))


def key_path_names(path: Iterable[Any]) -> list[str]:
    """Return the names in a key path of `jax.tree_util`, for any type of nodes."""
    return [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]


def in_training(module: Module) -> Module:
    """Return a copy of a module in training mode, with dropout, that shares its arrays."""
    copy = _of_same_arrays(module)
    copy.train()
    return copy


def in_evaluation(module: Module) -> Module:
    """Return a copy of a module in evaluation mode, without dropout, that shares its arrays."""
    copy = _of_same_arrays(module)
    copy.eval()
    return copy


def _of_same_arrays(module: Module) -> Module:
    return merge(*nnx.split(module))
