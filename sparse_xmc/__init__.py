"""Extreme multi-label classification with sparse output layers, in JAX and Flax."""

from sparse_xmc.layers import BagOfWords, Connectivity, EmbeddingBag, FixedFanInLinear
from sparse_xmc.models import Classifier, ClassifierConfig
from sparse_xmc.rewire import RewireConfig, reset_moments, rewire
from sparse_xmc.training import Trainer, TrainingConfig

__all__ = [
    "BagOfWords",
    "Classifier",
    "ClassifierConfig",
    "Connectivity",
    "EmbeddingBag",
    "FixedFanInLinear",
    "RewireConfig",
    "Trainer",
    "TrainingConfig",
    "reset_moments",
    "rewire",
]
