"""What is done to any Flax module: taking it apart, and views of it in training and in use."""

from typing import TypeVar

from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def split(module: nnx.Module, *filters: type[nnx.Variable]) -> tuple[nnx.GraphDef, list[nnx.State]]:
    """The structure of a module, and its variables of each of these types in turn, then all others."""
    graphdef, *states = nnx.split(module, *filters, ...)
    return graphdef, states


def in_training(module: Module) -> Module:
    """A view of a module, on the same arrays, as it is trained: with dropout."""
    return nnx.view(module, deterministic=False, use_running_average=False, raise_if_not_found=False)


def in_evaluation(module: Module) -> Module:
    """A view of a module, on the same arrays, as it is used: without dropout."""
    return nnx.view(module, deterministic=True, use_running_average=True, raise_if_not_found=False)
