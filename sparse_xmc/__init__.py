"""Extreme multi-label classification with sparse output layers, in JAX and Flax."""

from sparse_xmc.layers import BagOfWords, Connectivity, EmbeddingBag, FixedFanInLinear
from sparse_xmc.models import Classifier, ClassifierConfig
from sparse_xmc.rewire import RewireConfig, reset_moments, rewire, rewire_active, rewire_unstructured
from sparse_xmc.training import Trainer, TrainingConfig
from sparse_xmc.unstructured import UnstructuredLinear

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
    "UnstructuredLinear",
    "reset_moments",
    "rewire",
    "rewire_active",
    "rewire_unstructured",
]
