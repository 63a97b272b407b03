"""Default settings of `XMCClassifier`, which are chosen from the data.

The learning rates suit short texts with 10^4 to 10^5 labels (`experiments/results/tuning_diary.md` has
results of other rates); sizes and the number of steps follow from the numbers of points and
labels.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse

from sparse_xmc.data.formats import Dataset
from sparse_xmc.data.tokens import TokenLists
from sparse_xmc.heads import RewireConfig
from sparse_xmc.train import TrainingConfig

_MOST_EPOCHS = 100

# Texts with more words on average, and bags with more distinct words on average, count as long.
_LONG_TEXT, _LONG_BAG = 250, 150


def ngrams_for(texts: Sequence[str]) -> int:
    """Return the default of `ngrams`: 2, or 1 for long texts, for which pairs of words add little."""
    return 1 if sum(len(text.split()) for text in texts) > _LONG_TEXT * len(texts) else 2


def sizes_for(dataset: Dataset, **given: int) -> dict[str, int]:
    """Return the default sizes "embedding", "penultimate", "fan_in" and "direct_inputs".

    The penultimate layer has 8,192 hidden units, 4,096 if labels read words and there is no pretrained
    encoder, and fewer if there are fewer labels. The fan-in is 32, or the number of inputs if it is smaller.
    For bags of words, 7 in 8 inputs of a label are words; with a pretrained encoder 5 in 8, because its
    hidden units carry more information.

    Args:
      dataset: the training points.
      given: sizes that are already fixed.
    """
    words_alone = dataset.is_sparse and dataset.encoded is None
    penultimate = 4096 if words_alone else 8192
    while penultimate > max(256, dataset.num_labels):
        penultimate //= 2
    sizes = {"embedding": 256, "penultimate": penultimate} | given
    features = sizes["embedding"] if dataset.is_sparse else dataset.num_features
    sizes = {"fan_in": min(32, sizes["penultimate"] or features)} | sizes
    words_in_8 = 7 if words_alone else 5
    return sizes | {"direct_inputs": words_in_8 * sizes["fan_in"] // 8 if dataset.is_sparse else 0}


def dropout_for(dataset: Dataset, ngrams: int = 1) -> float:
    """Return the default dropout rate of features: 0.1 if dense, 0.5 for words, 0.2 for words of long texts.

    Args:
      dataset: the training points.
      ngrams: maximum number of words in a feature of a text; a text has about this many features per word.
    """
    if isinstance(dataset.features, np.ndarray):
        return 0.1
    return 0.2 if dataset.features.nnz > _LONG_BAG * ngrams * len(dataset) else 0.5


def input_scale_for(dataset: Dataset, penultimate: int, fan_in: int) -> float:
    """Return a scale for the features, so that the default learning rates suit features of any scale.

    Bags of words are scaled to a root mean square norm of 1, as in TF-IDF. Dense features are scaled so that
    the squares of a label's inputs sum to about 1 at the initialization of the penultimate layer.

    Args:
      dataset: the training points.
      penultimate: width of the penultimate layer; 0 for none.
      fan_in: number of inputs of a label.
    """
    mean_square = _mean_square(dataset.features) * dataset.num_features  # of the norm of a point
    if dataset.is_sparse:
        wanted = 1.0
    elif penultimate:
        wanted = (dataset.num_features + penultimate) / (2 * fan_in)
    else:
        wanted = dataset.num_features / fan_in
    return float((wanted / mean_square) ** 0.5) if mean_square else 1.0


def _mean_square(features: np.ndarray | scipy.sparse.csr_array) -> float:
    if not isinstance(features, np.ndarray):
        return float(np.sum(np.square(features.data, dtype=np.float64))) / max(1, math.prod(features.shape))
    blocks = np.array_split(features, max(1, len(features) // 4096))  # The features may be memory-mapped.
    total = sum(float(np.sum(np.square(block, dtype=np.float64))) for block in blocks)
    return total / max(1, features.size)


def training_for(dataset: Dataset, **given: Any) -> TrainingConfig:
    """Return the default training configuration for a data set.

    Batches have 256 points, but fewer if an epoch would have less than 100 steps. There are 10 epochs, or as
    many as 1,000 steps take, but at most 100. For bags of words there are 6 epochs or 600 steps, as labels
    start with chosen words.

    Args:
      dataset: the training points.
      given: fields of `TrainingConfig` that are already fixed.
    """
    batch_size = given.get("batch_size") or 256
    if "batch_size" not in given:
        while batch_size > 16 and len(dataset) < 100 * batch_size:
            batch_size //= 2
    steps_per_epoch = max(1, len(dataset) // batch_size)
    fewest = 6 if dataset.is_sparse else 10
    epochs = min(_MOST_EPOCHS, max(fewest, -(-100 * fewest // steps_per_epoch)))
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": 4e-3,
        "embedding_lr_multiplier": 50.0,
        "penultimate_lr_multiplier": 0.2,
        # SGD gives as good results with less memory, but diverges if a label is in half of the points.
        "output_optimizer": "adam",
        "output_lr_multiplier": 1.0,
        "moment_dtype": "bfloat16",
        "schedule": "linear",
        "rewire": RewireConfig(fraction=0.0),
    }
    if isinstance(
        dataset.encoded, TokenLists
    ):  # Fine-tuning of a pretrained encoder: a learning rate of 1e-5, of the order of BERT's.
        steps = epochs * steps_per_epoch
        settings |= {
            "encoder_lr_multiplier": 2.5e-3,
            "encoder_warmup": steps // 10,
            "encoder_weight_decay": 0.01,
        }
    return TrainingConfig(**settings | given)
