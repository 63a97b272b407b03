from . import data as data
from . import encoders as encoders
from . import evaluation as evaluation
from . import heads as heads
from . import metrics as metrics
from . import saving as saving
from . import train as train
from .data.batches import BagOfWords, Batch
from .encoders import BagOfWordsEncoder, DenseFeatures, EmbeddingBag, EmbeddingTable
from .estimator import XMCClassifier
from .exporting import export_predict
from .heads.rewire_layer import reset_moments, rewire_layer
from .heads.rewiring import RewireConfig, rewire, rewire_active
from .layers import Connectivity, FixedFanInLinear
from .mesh import make_mesh
from .model import Classifier, ClassifierConfig, EncoderConfig
from .planning import MemoryPlan, check_memory, plan_memory
from .train import Trainer, TrainingConfig, fit

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
    "XMCClassifier",
    "check_memory",
    "data",
    "encoders",
    "evaluation",
    "export_predict",
    "fit",
    "heads",
    "make_mesh",
    "metrics",
    "plan_memory",
    "reset_moments",
    "rewire",
    "rewire_active",
    "rewire_layer",
    "saving",
    "train",
]
