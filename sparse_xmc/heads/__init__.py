"""Heads, which map the features of an encoder to labels. `HEADS` maps names to configurations."""

from sparse_xmc.heads.dense import BottleneckConfig, DenseConfig, DenseHead
from sparse_xmc.heads.fixed_fan_in import FixedFanInConfig, FixedFanInHead
from sparse_xmc.heads.head import (
    Features,
    Head,
    HeadConfig,
    HeadTraining,
    StepInputs,
    split_features,
)
from sparse_xmc.heads.layered import LayeredHead
from sparse_xmc.heads.ranges import HeadAndTailConfig, LabelRanges
from sparse_xmc.heads.rewiring import RewireConfig
from sparse_xmc.heads.unstructured import UnstructuredConfig, UnstructuredHead

HEADS: dict[str, type[HeadConfig]] = {
    "fixed_fan_in": FixedFanInConfig,
    "dense": DenseConfig,
    "bottleneck": BottleneckConfig,
    "unstructured": UnstructuredConfig,
    "head_and_tail": HeadAndTailConfig,
}

__all__ = [
    "HEADS",
    "BottleneckConfig",
    "DenseConfig",
    "DenseHead",
    "Features",
    "FixedFanInConfig",
    "FixedFanInHead",
    "Head",
    "HeadAndTailConfig",
    "HeadConfig",
    "HeadTraining",
    "LabelRanges",
    "LayeredHead",
    "RewireConfig",
    "StepInputs",
    "UnstructuredConfig",
    "UnstructuredHead",
    "split_features",
]
