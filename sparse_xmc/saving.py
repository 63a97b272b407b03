"""Saved models: directories with the weights, the configuration, and the encoders of texts and labels."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sparse_xmc.calibration import Calibration
from sparse_xmc.card import MARK, model_card
from sparse_xmc.data.files import write_text
from sparse_xmc.data.text import LabelEncoder
from sparse_xmc.heads import label_rows
from sparse_xmc.inputs import FROZEN_FILE, WORDS_FILE, InputEncoder
from sparse_xmc.metrics import LabelStatistics
from sparse_xmc.model import Classifier, ClassifierConfig
from sparse_xmc.model_checks import check_input_files, check_sizes
from sparse_xmc.model_files import (
    CALIBRATION,
    CONFIG,
    LABEL_STATISTICS,
    LABELS,
    MODEL,
    PARAMETERS,
    check_files,
    find_files,
    new_files,
)
from sparse_xmc.weights import load_weights, save_weights, shapes_of, write_weights

__all__ = ["SavedModel", "load_weights", "save_weights"]

_LABEL_ROWS = "label_rows"  # number of rows by label in the weights, including padding labels of a mesh
CARD = "README.md"


@dataclasses.dataclass
class SavedModel:
    """A trained classifier with everything needed to use it.

    Attributes:
      config: configuration of the classifier.
      model: the classifier.
      inputs: encoder of texts, or None if the classifier takes features.
      label_encoder: names of the labels, or None if labels are numbers.
      calibration: mapping from scores to probabilities, or None.
      label_statistics: statistics of the training labels for evaluation, or None.
      parameters: parameters of the `XMCClassifier` that contains the model, as a JSON object, or None.
    """

    config: ClassifierConfig
    model: Classifier
    inputs: InputEncoder | None = None
    label_encoder: LabelEncoder | None = None
    calibration: Calibration | None = None
    label_statistics: LabelStatistics | None = None
    parameters: dict[str, Any] | None = None

    def save(
        self,
        directory: str | os.PathLike,
        *,
        data: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save the model to a directory, replacing any model there.

        The replacement is atomic: at any time the directory contains either the old model or the new one. A
        model card, README.md, is written too, unless there is another file with this name.

        Args:
          directory: the directory; created if missing.
          data, metrics: content of the model card, as for `model_card`.

        Raises:
          ValueError: the directory has a `config.json`, as the directory of a pretrained encoder does, whose
            tokenizer would be overwritten.
          TypeError: `parameters` is not serializable as JSON; no file is written in this case.
          OSError: the model could not be written; an old model in the directory is kept.
        """
        directory = Path(directory)
        if (directory / "config.json").exists():
            raise ValueError(
                f"{directory} is the directory of a pretrained encoder, with a config.json; choose another"
            )
        parts: dict[str, Any] = {
            LABELS: self.label_encoder,
            CALIBRATION: self.calibration,
            LABEL_STATISTICS: self.label_statistics,
        }
        objects = {
            CONFIG: self.config.to_json() | {_LABEL_ROWS: label_rows(self.model.head)},
            PARAMETERS: self.parameters,
        }
        texts = {name: json.dumps(fields, indent=2) for name, fields in objects.items() if fields is not None}
        with new_files(directory) as scratch:
            if jax.process_index() == 0:
                for name, part in parts.items():
                    if part is not None:
                        part.save(scratch / name)
                for name, text in texts.items():
                    write_text(scratch / name, text + "\n")
                if self.inputs is not None:
                    self.inputs.save(scratch)
            write_weights(scratch / MODEL, self.model)
        card = directory / CARD
        if jax.process_index() == 0 and (
            not card.exists() or card.read_text(errors="replace").startswith(MARK)
        ):
            description = model_card(
                self.config,
                self.model,
                inputs=self.inputs,
                is_calibrated=self.calibration is not None,
                data=data,
                metrics=metrics,
            )
            write_text(card, description)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        encoder: str | os.PathLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "SavedModel":
        """Load a model saved by `save`.

        Args:
          directory: the directory of the saved model.
          encoder: current directory of its frozen encoder; None for the saved one.
          mesh: mesh over whose devices the labels are sharded; it need not be the mesh used in training.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: files are damaged or inconsistent.
        """
        directory = Path(directory)
        files = find_files(directory)
        for name in (CONFIG, MODEL):
            if name not in files:
                raise FileNotFoundError(
                    f"{directory / name}: not there; is this the directory of a saved model?"
                )
        check_files(directory, files)
        config, rows = read_config(files[CONFIG])
        if encoder is not None and FROZEN_FILE not in files:
            raise ValueError(f"{directory}: the model has no frozen encoder, got encoder={encoder}")
        check_input_files(directory, files, config)
        inputs = InputEncoder.load(files, encoder) if WORDS_FILE in files else None
        labels = LabelEncoder.load(files[LABELS]) if LABELS in files else None
        calibration = Calibration.load(files[CALIBRATION]) if CALIBRATION in files else None
        statistics = LabelStatistics.load(files[LABEL_STATISTICS]) if LABEL_STATISTICS in files else None
        parameters = _read_parameters(files[PARAMETERS]) if PARAMETERS in files else None
        check_sizes(files, config, inputs, labels, statistics)
        if mesh is None:
            model = nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)))
        else:
            # The model is made for the shardings of its arrays, which are freed before the saved ones are
            # read.
            graphdef, state = nnx.split(config.make(mesh=mesh, rngs=nnx.Rngs(0)))
            model = nnx.merge(graphdef, shapes_of(state))
        weights = load_weights(files[MODEL], model, label_rows=rows)
        return cls(config, weights, inputs, labels, calibration, statistics, parameters)


def read_config(path: Path) -> tuple[ClassifierConfig, int | None]:
    """Read `model.json`.

    Returns:
      The configuration, and the number of rows by label in the weights, or None if it is not recorded.

    Raises:
      ValueError: the file is not a configuration; the message names it.
    """
    try:
        fields = json.loads(path.read_bytes())
        rows = fields.pop(_LABEL_ROWS, None)
        config = ClassifierConfig.from_json(fields)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: not the configuration of a classifier: {error}") from error
    if rows is not None and (type(rows) is not int or rows < config.num_labels):
        raise ValueError(
            f"{path}: label_rows must be at least the number of labels, {config.num_labels}, got {rows!r}"
        )
    return config, rows


def _read_parameters(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not the parameters of a classifier: {error}") from error
