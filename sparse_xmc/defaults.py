"""Settings from the data: what `XMCClassifier` does where it is not told.

The rates are those that suit short texts with 10^4 to 10^5 labels (docs/tuning.md has what
others give); sizes and the number of steps follow from the numbers of points and labels.
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

# Texts of more words than this on average, and bags of more different words, are long.
_LONG_TEXT, _LONG_BAG = 250, 150


def ngrams_for(texts: Sequence[str]) -> int:
    """2, for pairs of neighbouring words as well; 1 for long texts, whose pairs say little more."""
    return 1 if sum(len(text.split()) for text in texts) > _LONG_TEXT * len(texts) else 2


def sizes_for(dataset: Dataset, **given: int) -> dict[str, int]:
    """The sizes "embedding", "penultimate", "fan_in" and "direct"; `given` are those decided already.

    The penultimate layer has 8,192 units, 4,096 where labels read words too, and fewer where there are fewer
    labels; the fan-in is 32, or all inputs where there are fewer. Of a label's inputs 7 in 8 are words where
    there are words. Where a pretrained encoder is behind the units as well, these say more: they are 8,192,
    and 5 in 8 are words.
    """
    words_alone = dataset.is_sparse and dataset.encoded is None
    penultimate = 4096 if words_alone else 8192
    while penultimate > max(256, dataset.num_labels):
        penultimate //= 2
    sizes = {"embedding": 256, "penultimate": penultimate} | given
    features = sizes["embedding"] if dataset.is_sparse else dataset.num_features
    sizes = {"fan_in": min(32, sizes["penultimate"] or features)} | sizes
    words_in_8 = 7 if words_alone else 5
    return sizes | {"direct": words_in_8 * sizes["fan_in"] // 8 if dataset.is_sparse else 0}


def dropout_for(dataset: Dataset, ngrams: int = 1) -> float:
    """The rate of dropout on features: of words, which labels read directly too, 0.5, 0.2 of long texts.

    Args:
      dataset: the training points.
      ngrams: how long the features of texts are; a text has about so many of them for each of its words.
    """
    if isinstance(dataset.features, np.ndarray):
        return 0.1
    return 0.2 if dataset.features.nnz > _LONG_BAG * ngrams * len(dataset) else 0.5


def input_scale_for(dataset: Dataset, penultimate: int, fan_in: int) -> float:
    """What features are multiplied by, so that the rates below suit features of any scale.

    Bags of words are brought to length 1, as TF-IDF has it; dense features to where the inputs of a label, as
    a penultimate layer starts, have squares that sum to about 1.
    """
    mean_square = _mean_square(dataset.features) * dataset.num_features  # of a point's length
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
    blocks = np.array_split(features, max(1, len(features) // 4096))  # which may be memory-mapped
    total = sum(float(np.sum(np.square(block, dtype=np.float64))) for block in blocks)
    return total / max(1, features.size)


def training_for(dataset: Dataset, **given: Any) -> TrainingConfig:
    """How to train on a data set; `given` are fields of `TrainingConfig` that are decided already.

    Batches have 256 points, fewer where that would be less than 100 steps an epoch; epochs are 10, or as many
    as it takes for 1,000 steps, but no more than 100. With words, which labels know at the start, 6 and 600.
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
        "embedding_rate": 50.0,
        "penultimate_rate": 0.2,
        # SGD does as well and takes less memory, but diverges where a label is in half of the points.
        "output_optimizer": "adam",
        "output_rate": 1.0,
        "moments": "bfloat16",
        "schedule": "linear",
        "rewire": RewireConfig(fraction=0.0),
    }
    if isinstance(
        dataset.encoded, TokenLists
    ):  # a pretrained encoder learns too: 1e-5, of the order of BERT's
        steps = epochs * steps_per_epoch
        settings |= {"encoder_rate": 2.5e-3, "encoder_warmup": steps // 10, "encoder_weight_decay": 0.01}
    return TrainingConfig(**settings | given)
