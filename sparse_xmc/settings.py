"""Configurations: frozen dataclasses that check the values of their fields when they are made."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import numpy as np


def setting(
    default: Any,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    or_else: tuple[Any, ...] = (),
) -> Any:
    """Declare a field of a configuration and its allowed values.

    Args:
      default: default value; `dataclasses.MISSING` for none.
      choices: the allowed values; None for no restriction.
      at_least, above, at_most, below: bounds of a number, which must also be finite.
      or_else: further allowed values, such as None.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(
        default=default, metadata={"choices": choices, "bounds": bounds, "or_else": or_else}
    )


_HOLDS = {
    "at_least": lambda value, bound: value >= bound,
    "above": lambda value, bound: value > bound,
    "at_most": lambda value, bound: value <= bound,
    "below": lambda value, bound: value < bound,
}


def check(settings: Any) -> None:
    """Raise ValueError, naming the field, if a value is not allowed by the type or the `setting` of a field.

    NumPy scalars are converted to Python scalars, and integers to float if the field is a float. Call it in
    `__post_init__`.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, np.generic):  # JSON cannot represent NumPy scalars.
            value = value.item()
            object.__setattr__(settings, field.name, value)
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        allowed = field.metadata.get("or_else", ())
        if any(value is other or (type(value) is type(other) and value == other) for other in allowed):
            continue
        choices, bounds = field.metadata.get("choices"), field.metadata.get("bounds") or {}
        if choices and value not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        if bool in kinds and not isinstance(value, bool):
            raise ValueError(f"{field.name} must be True or False, got {value!r}")
        if int not in kinds and float not in kinds:
            if not isinstance(value, kinds):
                names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
                raise ValueError(f"{field.name} must be of type {names}, got {value!r}")
            continue
        number = numbers.Integral if float not in kinds else numbers.Real
        fits = isinstance(value, number) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not all(_HOLDS[name](value, bound) for name, bound in bounds.items()):
            what = "a whole number" if float not in kinds else "a finite number"
            if bounds:
                what = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
            besides = "".join(f", or {other}" for other in allowed)
            if fits or float in kinds:
                raise ValueError(f"{field.name} must be {what}{besides}, got {value!r}")
            raise ValueError(f"{field.name} must be a whole number, {what}{besides}, got {value!r}")
        object.__setattr__(settings, field.name, int(value) if float not in kinds else float(value))


# Settings of version 0.1 that were renamed, with their names now. Saved models with the old names load; flags
# with the old names work in this version, with a warning.
RENAMED = {
    "direct": "direct_inputs",
    "embedding_rate": "embedding_lr_multiplier",
    "encoder_rate": "encoder_lr_multiplier",
    "head_rate": "head_lr_multiplier",
    "moments": "moment_dtype",
    "output_rate": "output_lr_multiplier",
    "penultimate_rate": "penultimate_lr_multiplier",
}


def rename_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name, with the current names of renamed settings."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


LARGEST_SEED = 2**32 - 1  # limit of NumPy, and of stochastic rounding in the ops


def check_seed(seed: Any) -> int:
    """Return a seed as an int.

    Raises:
      ValueError: the seed is not an integer in 0..2^32-1.
    """
    is_whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not is_whole or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must be a whole number between 0 and {LARGEST_SEED}, got {seed!r}")
    return int(seed)
