"""Saved models: directories with the weights, the configuration, and the encoders of texts and labels."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import scipy.sparse
from flax import nnx

from sparse_xmc.calibration import Calibration
from sparse_xmc.card import MARK, model_card
from sparse_xmc.data.files import write_text
from sparse_xmc.data.formats import Dataset
from sparse_xmc.data.text import LabelEncoder, TextEncoder
from sparse_xmc.data.tokens import Tokenizer
from sparse_xmc.encoders.frozen_encoder import FrozenEncoder
from sparse_xmc.heads import label_rows
from sparse_xmc.metrics import LabelStatistics
from sparse_xmc.model import Classifier, ClassifierConfig
from sparse_xmc.model_files import (
    CALIBRATION,
    CONFIG,
    FROZEN,
    LABEL_STATISTICS,
    LABELS,
    MODEL,
    PARAMETERS,
    TEXT_ENCODER,
    TOKENIZER,
    check_files,
    find_files,
    new_files,
)
from sparse_xmc.modules import path_name
from sparse_xmc.weights import dtype_and_shape, load_weights, save_weights, shapes_of, write_weights

__all__ = ["SavedModel", "load_weights", "save_weights"]

_LABEL_ROWS = "label_rows"  # number of rows by label in the weights, including padding labels of a mesh
CARD = "README.md"


@dataclasses.dataclass
class SavedModel:
    """A trained classifier with everything needed to use it.

    Attributes:
      config: configuration of the classifier.
      model: the classifier.
      text_encoder: encoder of texts as bags of words, or None if the classifier takes features.
      label_encoder: names of the labels, or None if labels are numbers.
      pretrained: pretrained encoder of texts in addition to bags of words: a frozen encoder, of which the
        directory is saved but not the weights; or the tokenizer of a fine-tuned encoder, which is part of the
        classifier; or None.
      calibration: mapping from scores to probabilities, or None.
      label_statistics: statistics of the training labels for evaluation, or None.
      parameters: parameters of the `XMCClassifier` that contains the model, as a JSON object, or None.
    """

    config: ClassifierConfig
    model: Classifier
    text_encoder: TextEncoder | None = None
    label_encoder: LabelEncoder | None = None
    pretrained: FrozenEncoder | Tokenizer | None = None
    calibration: Calibration | None = None
    label_statistics: LabelStatistics | None = None
    parameters: dict[str, Any] | None = None

    def points(self, texts: Sequence[str]) -> Dataset:
        """Encode texts as points without labels, for prediction.

        Raises:
          ValueError: the classifier does not take texts.
        """
        if self.text_encoder is None:
            raise ValueError("the classifier takes features, not texts")
        labels = scipy.sparse.csr_array((len(texts), self.config.num_labels), dtype=bool)
        encode = self.pretrained.embed if isinstance(self.pretrained, FrozenEncoder) else self.pretrained
        encoded = None if encode is None else encode(texts)
        return Dataset(self.text_encoder(texts), labels, encoded=encoded)

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
          ValueError: the directory contains a pretrained encoder, whose tokenizer would be overwritten.
          TypeError: `parameters` is not serializable as JSON; no file is written in this case.
          OSError: the model could not be written; an old model in the directory is kept.
        """
        directory = Path(directory)
        if (directory / "config.json").exists():
            raise ValueError(f"{directory} is the directory of a pretrained encoder; choose another")
        frozen = self.pretrained if isinstance(self.pretrained, FrozenEncoder) else None
        parts: dict[str, Any] = {
            TEXT_ENCODER: self.text_encoder,
            LABELS: self.label_encoder,
            FROZEN: frozen,
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
                if isinstance(self.pretrained, Tokenizer):
                    self.pretrained.save(scratch)
            write_weights(scratch / MODEL, self.model)
        card = directory / CARD
        if jax.process_index() == 0 and (
            not card.exists() or card.read_text(errors="replace").startswith(MARK)
        ):
            write_text(card, model_card(self, data=data, metrics=metrics))

    def start_from(self, trained: "SavedModel") -> None:
        """Replace the weights and connections of the classifier by those of a trained model.

        A pretrained encoder that is fine-tuned here, but was frozen in the trained model, keeps its own
        weights. Both models share arrays afterwards, so training this model invalidates the trained one.

        Raises:
          ValueError: the models differ in sizes, words or labels.
        """
        if self.config.num_labels != trained.config.num_labels:
            raise ValueError(
                f"the model to start from has {trained.config.num_labels} labels, "
                f"expected {self.config.num_labels}"
            )
        for what, names in (("words", _words), ("labels", _labels)):
            if names(self) != names(trained):
                raise ValueError(
                    f"the model to start from has other {what}; was it trained on the same data?"
                )
        own, given = _weights(self.model), _weights(trained.model)
        for name in sorted(own.keys() | given.keys()):
            if name.startswith("encoder.text.") and name not in given:
                continue
            mine, theirs = (
                dtype_and_shape(weights[name][...]) if name in weights else "none" for weights in (own, given)
            )
            if mine != theirs:
                raise ValueError(f"the model to start from is another: {name} is {theirs}, expected {mine}")
            own[name].set_value(given[name][...])

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
        texts = TextEncoder.load(files[TEXT_ENCODER]) if TEXT_ENCODER in files else None
        labels = LabelEncoder.load(files[LABELS]) if LABELS in files else None
        calibration = Calibration.load(files[CALIBRATION]) if CALIBRATION in files else None
        statistics = LabelStatistics.load(files[LABEL_STATISTICS]) if LABEL_STATISTICS in files else None
        parameters = _read_parameters(files[PARAMETERS]) if PARAMETERS in files else None
        pretrained: FrozenEncoder | Tokenizer | None = None
        if FROZEN in files:
            pretrained = FrozenEncoder.load(files[FROZEN], encoder)
        elif encoder is not None:
            raise ValueError(f"{directory}: the model has no frozen encoder, got encoder={encoder}")
        elif TOKENIZER in files:
            pretrained = Tokenizer.from_directory(files[TOKENIZER].parent)
        wanted = FROZEN if config.pretrained is None else TOKENIZER
        if config.text_features and wanted not in files:
            raise FileNotFoundError(
                f"{directory / wanted}: not there, but the model reads text by an encoder"
            )
        if not config.text_features and pretrained is not None:
            raise ValueError(f"{directory}: has what encodes text, but the model reads words alone")
        sizes = (
            (TEXT_ENCODER, "words", texts and texts.vocabulary_size, config.num_features),
            (LABELS, "labels", labels and len(labels.names), config.num_labels),
            (LABEL_STATISTICS, "labels", statistics and len(statistics.groups), config.num_labels),
        )
        for name, what, actual, expected in sizes:
            if actual is not None and actual != expected:
                raise ValueError(f"{files[name]}: has {actual} {what}, but the model {expected}")
        if mesh is None:
            model = nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)))
        else:
            # The model is made for the shardings of its arrays, which are freed before the saved ones are
            # read.
            graphdef, state = nnx.split(config.make(mesh=mesh, rngs=nnx.Rngs(0)))
            model = nnx.merge(graphdef, shapes_of(state))
        weights = load_weights(files[MODEL], model, label_rows=rows)
        return cls(config, weights, texts, labels, pretrained, calibration, statistics, parameters)


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


def _words(saved: SavedModel) -> list[str] | None:
    return None if saved.text_encoder is None else saved.text_encoder.words


def _labels(saved: SavedModel) -> list[str] | None:
    return None if saved.label_encoder is None else saved.label_encoder.names


def _weights(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return all variables except random states (parameters, connections and scales) by their paths."""
    return {
        path_name(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState)
    }
