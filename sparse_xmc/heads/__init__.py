"""Heads, which map the features of an encoder to labels. `HEADS` maps names to configurations."""

from sparse_xmc.heads.dense import BottleneckConfig, DenseConfig, DenseHead
from sparse_xmc.heads.fixed_fan_in import FixedFanInHead
from sparse_xmc.heads.fixed_fan_in_config import FixedFanInConfig
from sparse_xmc.heads.head import Head, HeadConfig, HeadSpec, HeadTraining, StepInputs
from sparse_xmc.heads.label_rows import label_rows, reset_padding_labels, with_label_rows
from sparse_xmc.heads.layered import LayeredHead, make_penultimate
from sparse_xmc.heads.ranges import HeadAndTailConfig, LabelRanges
from sparse_xmc.heads.rewiring import RewireConfig

HEADS: dict[str, type[HeadConfig]] = {
    "fixed_fan_in": FixedFanInConfig,
    "dense": DenseConfig,
    "bottleneck": BottleneckConfig,
    "head_and_tail": HeadAndTailConfig,
}


def register_head(name: str, config: type[HeadConfig]) -> None:
    """Add a head to `HEADS`, so that models with it can be saved and loaded, and programs have its flags.

    A program that loads such a model must call this function first, for example by importing the module that
    defines the head. `sparse_xmc.cli.run_flags` makes flags of the heads that are registered when it is
    imported.

    Args:
      name: name of the head in saved models and flags.
      config: class of its configuration, a frozen dataclass.

    Raises:
      ValueError: another class is registered with this name.

    Examples:
      >>> import dataclasses
      >>> from sparse_xmc.heads import DenseConfig, register_head
      >>> @dataclasses.dataclass(frozen=True)
      ... class ZeroBiasConfig(DenseConfig):
      ...     output_bias: float = 0.0
      >>> register_head("zero_bias", ZeroBiasConfig)
    """
    if HEADS.setdefault(name, config) is not config:
        raise ValueError(f"head {name!r} is registered already, with the class {HEADS[name].__name__}")


__all__ = [
    "HEADS",
    "BottleneckConfig",
    "DenseConfig",
    "DenseHead",
    "FixedFanInConfig",
    "FixedFanInHead",
    "Head",
    "HeadAndTailConfig",
    "HeadConfig",
    "HeadSpec",
    "HeadTraining",
    "LabelRanges",
    "LayeredHead",
    "RewireConfig",
    "StepInputs",
    "label_rows",
    "make_penultimate",
    "register_head",
    "reset_padding_labels",
    "with_label_rows",
]
