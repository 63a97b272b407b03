"""Saved models: a directory with the weights, their sizes, and what encodes texts and names labels."""

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

_LABEL_ROWS = "label_rows"  # of the weights, where a mesh has filled them up
CARD = "README.md"


@dataclasses.dataclass
class SavedModel:
    """A trained classifier with all that it takes to use it.

    Attributes:
      config: what the classifier is made of.
      model: the classifier.
      text_encoder: turns text into its features, or None where it takes features.
      label_encoder: names its labels, or None where they are numbers.
      pretrained: what encodes text beside its words: a frozen encoder, of which the directory is saved, not
        the weights; or the tokenizer of one that is part of the classifier; or None.
      calibration: from scores to probabilities, or None.
      label_statistics: what evaluation needs to know of the training points' labels, or None.
      parameters: the parameters of the `XMCClassifier` that it is part of, as an object for JSON, or None.
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
        """Points without labels, for prediction.

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
        """Writes all of it into a directory, which is made if missing, in place of a model that is there.

        At any time the directory has the model that was there or the new one. A model card, README.md, is
        written too, unless there is another file of this name.

        Args:
          directory: where.
          data, metrics: for the card, as of `model_card`.

        Raises:
          ValueError: the directory is that of a pretrained encoder, whose tokenizer would be lost.
          TypeError: `parameters` is not an object for JSON; nothing is written then.
          OSError: the model could not be written; one that was there is still there.
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
            CONFIG: self.config.to_json() | {_LABEL_ROWS: self.model.head.label_rows},
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
        """Gives the classifier the weights and connections of a trained one, to be trained further.

        A pretrained encoder that this one trains, and of the other was frozen, keeps its own weights. The two
        share arrays then, so that training this one uses the other up.

        Raises:
          ValueError: the two have other sizes, words or labels.
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
        """Reads what `save` wrote.

        Args:
          directory: where it was saved.
          encoder: the directory of its frozen encoder, if that moved.
          mesh: the devices to split its labels over, whatever they were split over when it was saved.

        Raises:
          FileNotFoundError: a part is missing.
          ValueError: the parts do not fit each other, or are not as they were saved.
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
            # For the places of its arrays, which are given back before others are read.
            graphdef, state = nnx.split(config.make(mesh=mesh, rngs=nnx.Rngs(0)))
            model = nnx.merge(graphdef, shapes_of(state))
        weights = load_weights(files[MODEL], model, label_rows=rows)
        return cls(config, weights, texts, labels, pretrained, calibration, statistics, parameters)


def read_config(path: Path) -> tuple[ClassifierConfig, int | None]:
    """Reads `model.json`: the configuration, and how many rows arrays by label had on a mesh, or None.

    Raises:
      ValueError: the file is not such a configuration; the message names it.
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
    """Parameters, connections and scales by their paths: all but random states."""
    return {
        path_name(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState)
    }
