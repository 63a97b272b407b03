"""Settings from the data: what `XMCClassifier` does where it is not told.

The rates are those that suit short texts with 10^4 to 10^5 labels (experiments/results/README.md has what
others give); sizes and the number of steps follow from the numbers of points and labels.
"""

from typing import Any

from sparse_xmc.data.formats import Dataset
from sparse_xmc.heads import RewireConfig
from sparse_xmc.train import TrainingConfig

_FEWEST_STEPS, _MOST_EPOCHS, _EPOCHS = 2000, 100, 10


def sizes_for(dataset: Dataset) -> dict[str, int]:
    """The sizes "embedding", "penultimate" and "fan_in" of a fixed fan-in classifier of a data set.

    The penultimate layer has 8,192 units, fewer where there are fewer labels than twice that.
    """
    penultimate = 8192
    while penultimate > max(256, dataset.num_labels):
        penultimate //= 2
    return {"embedding": 256, "penultimate": penultimate, "fan_in": 32}


def training_for(dataset: Dataset, **given: Any) -> TrainingConfig:
    """How to train on a data set; `given` are fields of `TrainingConfig` that are decided already.

    Batches have 256 points, fewer where that would be less than 100 steps an epoch; epochs are 10, or as many
    as it takes for 2,000 steps, but no more than 100.
    """
    batch_size = given.get("batch_size") or 256
    if "batch_size" not in given:
        while batch_size > 16 and len(dataset) < 100 * batch_size:
            batch_size //= 2
    steps_per_epoch = max(1, len(dataset) // batch_size)
    epochs = min(_MOST_EPOCHS, max(_EPOCHS, -(-_FEWEST_STEPS // steps_per_epoch)))
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": 4e-3,
        "embedding_rate": 50.0,
        "penultimate_rate": 0.2,
        "output_optimizer": "sgd",  # needs no moments, and does better here than Adam
        "output_rate": 3.0,
        "moments": "bfloat16",
        # Gradients of a mean over labels are of order 1 / L, and epsilon is to be far below.
        "epsilon": 1.6e-6 / dataset.num_labels,
        "schedule": "linear",
        "rewire": RewireConfig(),
        "rewire_interval": 300,
    }
    return TrainingConfig(**settings | given)
