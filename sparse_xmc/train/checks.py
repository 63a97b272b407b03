"""Checks of the arguments of a training step, and of parameters that would silently stay untrained."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from sparse_xmc.encoders.table import TableParam, tables_of
from sparse_xmc.model import Classifier
from sparse_xmc.modules import parameters_of, path_name


def as_learning_rate(value: Any) -> np.float32:
    """Return a learning rate as float32.

    Raises:
      TypeError: it is not a real number or a scalar array of one.
      ValueError: it is not finite in float32.
    """
    is_number = isinstance(value, numbers.Real | np.ndarray | np.generic | jax.Array)
    rate = np.asarray(value if is_number else None)
    is_real = jnp.issubdtype(rate.dtype, jnp.floating) or jnp.issubdtype(rate.dtype, jnp.integer)
    if rate.shape != () or not is_real:
        raise TypeError(f"learning_rate must be a number, got {value!r}")
    with np.errstate(over="ignore"):
        rate = rate.astype(np.float32)
    if not np.isfinite(rate):
        raise ValueError(f"learning_rate must be finite in float32, got {value}")
    return np.float32(rate)


def check_positives(positives: np.ndarray, num_labels: int) -> None:
    """Raise an error unless positives [B, P] are labels or -1, and no point has a label twice.

    Raises:
      TypeError: positives are not an integer array of two axes.
      ValueError: a value is not a label, or a point has a label twice.
    """
    if positives.ndim != 2 or positives.dtype.kind not in "iu":
        got = f"dtype {positives.dtype.name} and shape {list(positives.shape)}"
        raise TypeError(f"positives must be an array of integers [B, P], got {got}")
    wrong = (positives < -1) | (positives >= num_labels)
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        raise ValueError(
            f"positives must be labels in 0..{num_labels - 1}, or -1; point {row} of the batch has "
            f"{positives[row][wrong[row]][0]}"
        )
    ordered = np.sort(positives, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        label = ordered[row, 1:][twice[row]][0]
        raise ValueError(f"positives must be distinct; point {row} of the batch has {label} twice")


def check_parameters(model: Classifier) -> None:
    """Raise ValueError if a parameter of a classifier cannot be trained."""
    parts = {"encoder": parameters_of(model.encoder), "head": parameters_of(model.head)}
    for name, parameter in parameters_of(model).items():
        owners = [part for part, owned in parts.items() if any(p is parameter for p in owned.values())]
        if len(owners) != 1:
            where = "in the encoder and the head both" if owners else "neither in the encoder nor in the head"
            raise ValueError(f"parameter {name} is {where}; Trainer cannot train it")
    tables = dict(tables_of(model.encoder))
    for name, parameter in parts["encoder"].items():
        if not isinstance(parameter, TableParam):
            continue
        owners = [path for path, table in tables.items() if table.embedding is parameter]
        if len(owners) != 1:
            raise ValueError(f"{name} must be the table of one EmbeddingTable, but is that of {len(owners)}")
        if parameter.dtype != jnp.float32:
            raise ValueError(f"table {name} must be float32 to be trained by rows, got {parameter.dtype}")


def check_head_updated(old: dict[str, jax.Array], head: nnx.Module) -> None:
    """Raise ValueError if a head's step has left a parameter unchanged.

    Args:
      old: the arrays of the parameters before the step, by path.
      head: the head after the step.
    """
    for name, parameter in parameters_of(head).items():
        if parameter[...] is old[name]:
            raise ValueError(f"the head's step leaves its parameter {name} as it is")


def check_encoder_used(pullback: Callable, features: jax.Array, *params: nnx.State) -> None:
    """Raise ValueError if the features do not depend on a parameter of the encoder.

    The gradient of such a parameter is a constant 0: in the traced pullback, no operation leads from the
    gradient of the features to it.

    Args:
      pullback: from `jax.vjp` of the encoder as a function of `params`.
      features: the features, float32 [B, E].
      params: parameters of the encoder.
    """
    jaxpr = jax.make_jaxpr(pullback)(jnp.zeros_like(features)).jaxpr
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(isinstance(var, core.Var) and var in reached for var in equation.invars):
            reached.update(equation.outvars)
    paths = [path for state in params for path, _ in nnx.to_flat_state(state)]
    for path, gradient in zip(paths, jaxpr.outvars, strict=True):
        if not isinstance(gradient, core.Var) or gradient not in reached:
            raise ValueError(
                f"the features do not depend on the encoder's parameter {path_name(path)}, so that "
                "nothing would train it; if it is a constant, make it an nnx.Variable of another type"
            )
