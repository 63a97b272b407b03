"""Assembly of a classifier: before training the trainer, and afterwards everything that is saved with it."""

import jax
from flax import nnx

from sparse_xmc.calibration import Calibration
from sparse_xmc.data.dataset import Dataset
from sparse_xmc.data.text import LabelEncoder
from sparse_xmc.encoders import PretrainedEncoder
from sparse_xmc.inputs import InputEncoder
from sparse_xmc.metrics import LabelStatistics
from sparse_xmc.model import ClassifierConfig
from sparse_xmc.saving import SavedModel
from sparse_xmc.train import Trainer, TrainingConfig
from sparse_xmc.warm_start import start_from


def build(
    config: ClassifierConfig,
    training: TrainingConfig,
    train: Dataset,
    *,
    inputs: InputEncoder | None = None,
    label_encoder: LabelEncoder | None = None,
    network: PretrainedEncoder | None = None,
    input_scale: float = 1.0,
    initial: SavedModel | None = None,
    mesh: jax.sharding.Mesh | None = None,
    seed: int = 0,
) -> tuple[SavedModel, Trainer]:
    """Make a new classifier and its trainer.

    Call `check_memory` before, which raises an error if the memory for training is not available.

    Args:
      config: configuration of the classifier.
      training: the training configuration.
      train: the training points, from which the head may be initialized.
      inputs: encoder of texts, or None if the classifier takes features.
      label_encoder: names of the labels, or None if labels are numbers.
      network: pretrained encoder that is fine-tuned; None if there is none.
      input_scale: factor by which the features are multiplied.
      initial: trained model whose weights the classifier starts from; it cannot be used afterwards. None for
        new weights.
      mesh: mesh over whose devices the labels are sharded; None for one device.
      seed: seed of all random choices.

    Returns:
      The model to be saved after training, and the trainer of its classifier. Call `finish` after training.
    """
    model = config.make(
        train=train if initial is None else None,
        network=network,
        input_scale=input_scale,
        mesh=mesh,
        rngs=nnx.Rngs(seed),
    )
    saved = SavedModel(config, model, inputs, label_encoder)
    if initial is not None:
        start_from(saved, initial)
    return saved, Trainer(model, training, seed=seed)


def finish(
    saved: SavedModel,
    trainer: Trainer,
    *,
    statistics: LabelStatistics | None = None,
    validation: Dataset | None = None,
) -> None:
    """Complete a model after training: set its trained weights, label statistics and calibration.

    Args:
      saved: the model, from `build`.
      trainer: its trainer, after training.
      statistics: statistics of the training labels, for evaluation; or None.
      validation: points that the classifier was not trained on, for the calibration; None for a model
        without probabilities.
    """
    saved.model = trainer.model
    saved.label_statistics = statistics
    if validation is not None:
        batch_size = trainer.config.batch_size
        saved.calibration = Calibration.fit(saved.model, validation, batch_size=batch_size)
