"""Saved models: a directory with the weights, their sizes, and what encodes texts and names labels."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import scipy.sparse
from flax import nnx

from sparse_xmc.calibration import Calibration
from sparse_xmc.card import MARK, model_card
from sparse_xmc.data.files import checksums, differing_file, write_text
from sparse_xmc.data.formats import Dataset
from sparse_xmc.data.text import LabelEncoder, TextEncoder
from sparse_xmc.data.tokens import Tokenizer
from sparse_xmc.encoders.frozen_encoder import FrozenEncoder
from sparse_xmc.heads import Head
from sparse_xmc.heads.unstructured import UnstructuredLinear
from sparse_xmc.layers import FixedFanInLinear
from sparse_xmc.metrics import LabelStatistics
from sparse_xmc.model import Classifier, ClassifierConfig
from sparse_xmc.modules import key_path_names, path_name

CONFIG, MODEL, TEXT_ENCODER, LABELS = "model.json", "model", "text_encoder.json", "labels.txt"
CHECKSUMS = "checksums.json"
_FORMAT = 1  # of a saved model: a higher one is refused, and so is a lower one
_LABEL_ROWS = "label_rows"  # of the weights, where a mesh has filled them up
FROZEN, TOKENIZER = "frozen_encoder.json", "tokenizer.json"
CALIBRATION, LABEL_STATISTICS = "calibration.json", "label_statistics.npz"
CARD = "README.md"
PARAMETERS = "estimator.json"


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
        """Writes all of it into a directory, which is made if missing, over a model that is there.

        With it comes a model card, README.md, unless there is another file of this name.

        Args:
          directory: where.
          data, metrics: for the card, as of `model_card`.

        Raises:
          ValueError: the directory is that of a pretrained encoder, whose tokenizer would be lost.
          TypeError: `parameters` is not an object for JSON. Nothing is written then.
        """
        parameters = None if self.parameters is None else json.dumps(self.parameters, indent=2) + "\n"
        directory = Path(directory)
        if (directory / "config.json").exists():
            raise ValueError(f"{directory} is the directory of a pretrained encoder; choose another")
        directory.mkdir(parents=True, exist_ok=True)
        frozen = self.pretrained if isinstance(self.pretrained, FrozenEncoder) else None
        parts: dict[str, Any] = {
            TEXT_ENCODER: self.text_encoder,
            LABELS: self.label_encoder,
            FROZEN: frozen,
            CALIBRATION: self.calibration,
            LABEL_STATISTICS: self.label_statistics,
        }
        if jax.process_index() == 0:
            (directory / CHECKSUMS).unlink(missing_ok=True)  # it is half a model until they are there again
            for name, part in parts.items():
                if part is None:
                    (directory / name).unlink(missing_ok=True)
                else:
                    part.save(directory / name)
            (directory / TOKENIZER).unlink(missing_ok=True)
            if isinstance(self.pretrained, Tokenizer):
                self.pretrained.save(directory)
            if parameters is None:
                (directory / PARAMETERS).unlink(missing_ok=True)
            else:
                write_text(directory / PARAMETERS, parameters)
            config = self.config.to_json() | {_LABEL_ROWS: self.model.head.label_rows}
            write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")
        save_weights(directory / MODEL, self.model)
        if jax.process_index() == 0:
            record = {"format": _FORMAT, "files": checksums(directory, _PARTS)}
            write_text(directory / CHECKSUMS, json.dumps(record, indent=2) + "\n")
            card = directory / CARD
            if not card.exists() or card.read_text(errors="replace").startswith(MARK):
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
                _size(weights[name][...]) if name in weights else "none" for weights in (own, given)
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
        for name in (CONFIG, MODEL):
            if not (directory / name).exists():
                raise FileNotFoundError(
                    f"{directory / name}: not there; is this the directory of a saved model?"
                )
        _check_files(directory)
        try:
            fields = json.loads((directory / CONFIG).read_text())
            rows = fields.pop(_LABEL_ROWS, None)
            config = ClassifierConfig.from_json(fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{directory / CONFIG}: not the configuration of a classifier: {error}"
            ) from error
        texts = TextEncoder.load(directory / TEXT_ENCODER) if (directory / TEXT_ENCODER).exists() else None
        labels = LabelEncoder.load(directory / LABELS) if (directory / LABELS).exists() else None
        path = directory / CALIBRATION
        calibration = Calibration.load(path) if path.exists() else None
        path = directory / LABEL_STATISTICS
        statistics = LabelStatistics.load(path) if path.exists() else None
        path, parameters = directory / PARAMETERS, None
        if path.exists():
            try:
                parameters = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}: not the parameters of a classifier: {error}") from error
        pretrained: FrozenEncoder | Tokenizer | None = None
        if (directory / FROZEN).exists():
            pretrained = FrozenEncoder.load(directory / FROZEN, encoder)
        elif encoder is not None:
            raise ValueError(f"{directory}: the model has no frozen encoder, got encoder={encoder}")
        elif (directory / TOKENIZER).exists():
            pretrained = Tokenizer.from_directory(directory)
        wanted = FROZEN if config.pretrained is None else TOKENIZER
        if config.text_features and not (directory / wanted).exists():
            raise FileNotFoundError(
                f"{directory / wanted}: not there, but the model reads text by an encoder"
            )
        if not config.text_features and pretrained is not None:
            raise ValueError(f"{directory}: has what encodes text, but the model reads words alone")
        sizes = (
            (TEXT_ENCODER, "words", texts and texts.vocabulary_size, config.num_features),
            (LABELS, "labels", labels and len(labels.names), config.num_labels),
        )
        for name, what, actual, expected in sizes:
            if actual is not None and actual != expected:
                raise ValueError(f"{directory / name}: has {actual} {what}, but the model {expected}")
        if mesh is None:
            model = nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)))
        else:
            # For the places of its arrays, which are given back before others are read.
            graphdef, state = nnx.split(config.make(mesh=mesh, rngs=nnx.Rngs(0)))
            model = nnx.merge(graphdef, shapes_of(state))
        weights = load_weights(directory / MODEL, model, label_rows=rows)
        return cls(config, weights, texts, labels, pretrained, calibration, statistics, parameters)


def save_weights(path: str | os.PathLike, model: nnx.Module) -> None:
    """Saves all arrays of a module in a new directory, in place of one that is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), nnx.split(model)[1], force=True)


def load_weights(path: str | os.PathLike, model: nnx.Module, *, label_rows: int | None = None) -> Any:
    """What `save_weights` saved of a module like `model`, of which only the shapes matter.

    `label_rows` are those of the head that was saved, if it was on a mesh.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: what is there is of another model.
    """
    graphdef, state = nnx.split(model)
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        head = model.head if isinstance(model, Classifier) else None
        check_sizes(checkpointer.metadata(path).item_metadata, state, path, head, label_rows)
        args = ocp.args.StandardRestore(shapes_of(state), strict=False)
        loaded = nnx.merge(graphdef, checkpointer.restore(path, args=args))
    _check_connections(loaded, path)
    if isinstance(loaded, Classifier):
        loaded.head.fill_up()
    return loaded


def _check_connections(model: nnx.Module, path: Path) -> None:
    """Raises ValueError if a layer has connections to inputs that it lacks, which no array's size tells."""
    for where, layer in nnx.iter_modules(model):
        if isinstance(layer, FixedFanInLinear | UnstructuredLinear):
            indices = layer.indices[...]
            last = int(jnp.max(indices if isinstance(layer, FixedFanInLinear) else indices[:, 1], initial=0))
            if last >= layer.in_features:
                raise ValueError(
                    f"{path}: not the weights of such a model: {path_name((*where, 'indices'))} has input "
                    f"{last}, expected 0..{layer.in_features - 1}"
                )


_PARTS = (CONFIG, MODEL, TEXT_ENCODER, LABELS, FROZEN, TOKENIZER, CALIBRATION, LABEL_STATISTICS)


def _check_files(directory: Path) -> None:
    """Raises ValueError unless a saved model's files are those that were saved."""
    path = directory / CHECKSUMS
    if not path.exists():
        raise ValueError(f"{path}: not there: the model was saved only in part, or by another version")
    try:
        record = json.loads(path.read_text())
        version, files = record["format"], dict(record["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the checksums of a saved model: {error!r}") from error
    if version != _FORMAT:
        raise ValueError(f"{directory}: a saved model of format {version}; this version reads {_FORMAT}")
    if wrong := differing_file(directory, files, _PARTS):
        raise ValueError(f"{directory}: the saved model is damaged: {wrong} since it was saved")


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


def check_sizes(
    metadata: Any, expected: Any, path: Path, head: Head | None = None, label_rows: int | None = None
) -> None:
    """Raises ValueError unless what was saved fits a state, but for the rows that fill up a mesh's labels.

    Compared before anything is read: Orbax' own complaint comes half way.

    Args:
      metadata: Orbax's, of what was saved.
      expected: the state, of arrays or their shapes.
      path: where it was saved, for the message.
      head: that of the state, if it has one.
      label_rows: how many rows what is `by_label` had when it was saved.
    """
    there, here = _leaves(metadata.tree), _leaves(expected)
    by_label = "|".join(map(re.escape, head.by_label)) if head is not None else ""
    has_rows = re.compile(rf"(((params|other)\.)?head|moments\.\w+)\.({by_label})" if by_label else "(?!)")

    def as_saved(name: str) -> str:
        """The size that an array must have had."""
        array = here[name]
        if label_rows is None or not has_rows.fullmatch(name):
            return _size(array)
        return _size(jax.ShapeDtypeStruct((label_rows, *array.shape[1:]), array.dtype))

    wanted = {name: as_saved(name) for name in here}
    found = {name: _size(array) for name, array in there.items()}
    if different := sorted(name for name in found | wanted if found.get(name) != wanted.get(name)):
        name = different[0]
        raise ValueError(
            f"{path}: not the weights of such a model: {name} is {found.get(name, 'missing')}, "
            f"expected {wanted.get(name, 'none')}"
        )


def _leaves(tree: Any) -> dict[str, Any]:
    """Each array, or its shape, by its path; random keys as they are saved."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        leaves[path_name(name for name in key_path_names(path) if name != "value")] = leaf
    return leaves


def _size(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}"


def shapes_of(state: Any) -> Any:
    """The shapes of a tree's arrays, to be restored where these are, or on this process' first device."""
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape_of(array):
        sharding = getattr(array, "sharding", None) or local
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(shape_of, state)
