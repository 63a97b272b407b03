"""Extreme multi-label classification with sparse output layers, in JAX and Flax."""

from sparse_xmc.data.batches import BagOfWords, Batch
from sparse_xmc.encoders import BagOfWordsEncoder, DenseFeatures, EmbeddingBag, EmbeddingTable
from sparse_xmc.estimator import XMCClassifier
from sparse_xmc.exporting import export_predict
from sparse_xmc.heads.rewiring import (
    RewireConfig,
    reset_moments,
    rewire,
    rewire_active,
    rewire_layer,
    rewire_unstructured,
)
from sparse_xmc.heads.unstructured import UnstructuredLinear
from sparse_xmc.layers import Connectivity, FixedFanInLinear
from sparse_xmc.mesh import make_mesh
from sparse_xmc.model import Classifier, ClassifierConfig, EncoderConfig
from sparse_xmc.planning import MemoryPlan, check_memory, plan_memory
from sparse_xmc.train import Trainer, TrainingConfig, fit

__all__ = [
    "BagOfWords",
    "BagOfWordsEncoder",
    "Batch",
    "Classifier",
    "ClassifierConfig",
    "Connectivity",
    "DenseFeatures",
    "EmbeddingBag",
    "EmbeddingTable",
    "EncoderConfig",
    "FixedFanInLinear",
    "MemoryPlan",
    "RewireConfig",
    "Trainer",
    "TrainingConfig",
    "UnstructuredLinear",
    "XMCClassifier",
    "check_memory",
    "export_predict",
    "fit",
    "make_mesh",
    "plan_memory",
    "reset_moments",
    "rewire",
    "rewire_active",
    "rewire_layer",
    "rewire_unstructured",
]
