"""`XMCClassifier`, a classifier of texts or features with the interface of scikit-learn."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.sparse
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from sparse_xmc.assembly import build, finish
from sparse_xmc.data.dataset import Dataset, Points
from sparse_xmc.data.label_checks import warn_of_unusual_labels
from sparse_xmc.data.text import LabelEncoder
from sparse_xmc.data.validation import (
    LabelMatrix,
    Labels,
    TextsOrFeatures,
    read_labels,
    read_points,
    to_binary,
)
from sparse_xmc.defaults import dropout_for, input_scale_for, ngrams_for, sizes_for, training_for
from sparse_xmc.encoders import PretrainedEncoder
from sparse_xmc.encoders.frozen_encoder import PretrainedInput, open_pretrained
from sparse_xmc.evaluation import evaluate, predict
from sparse_xmc.heads import FixedFanInConfig
from sparse_xmc.inputs import InputEncoder
from sparse_xmc.metrics import LabelStatistics
from sparse_xmc.model import ClassifierConfig, EncoderConfig
from sparse_xmc.model_files import PARAMETERS
from sparse_xmc.planning import check_memory
from sparse_xmc.saving import SavedModel
from sparse_xmc.settings import LARGEST_SEED, check, check_seed, setting
from sparse_xmc.train import Progress, TrainingConfig, fit

_DEFAULT_K = 5


class Predictions(NamedTuple):
    """The predicted labels of N points.

    Attributes:
      labels: [N, k], best first: names (str) if the classifier was trained with names, else numbers (int).
      scores: float32 [N, k], the logits, descending. With the squared hinge loss, a score near 1 or above
        means that the label is probably correct, and a score near -1 or below that it is probably wrong.
    """

    labels: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Parameters:
    """The parameters of an `XMCClassifier` without its mesh, validated and serializable as JSON."""

    fan_in: int | None = setting(None, at_least=1, or_else=(None,))
    penultimate: int | None = setting(None, at_least=0, or_else=(None,))
    embedding: int | None = setting(None, at_least=1, or_else=(None,))
    dropout: float | None = setting(None, at_least=0, below=1, or_else=(None,))
    epochs: int | None = setting(None, at_least=1, or_else=(None,))
    batch_size: int | None = setting(None, at_least=1, or_else=(None,))
    learning_rate: float | None = setting(None, above=0, or_else=(None,))
    ngrams: int | None = setting(None, at_least=1, or_else=(None,))
    min_df: int = setting(2, at_least=1)
    encoder: str | None = None
    encoder_trainable: bool = False
    max_length: int = setting(64, at_least=1)
    cache_dir: str | None = None
    seed: int | None = setting(0, at_least=0, at_most=LARGEST_SEED, or_else=(None,))
    verbose: bool = False

    def __post_init__(self):
        check(self)


class XMCClassifier(BaseEstimator):
    """A multi-label classifier for many labels, with a fixed fan-in output layer.

    Parameters that are None are chosen from the data in `fit`; see `sparse_xmc.defaults`.

    Args:
      fan_in: F, the number of inputs of each label.
      penultimate: number of hidden units, which labels read; 0 for no penultimate layer.
      embedding: size of word embeddings, for texts and sparse features.
      dropout: dropout rate of the features.
      epochs: number of passes over the training points.
      batch_size: number of points in a batch.
      learning_rate: learning rate of the first step; it decreases linearly to 0.
      ngrams: for texts, 1 for words only, 2 for words and pairs of neighbouring words.
      min_df: minimum number of texts that contain a word.
      encoder: directory of a pretrained encoder of texts, in the format of Hugging Face, whose embeddings are
        used as features in addition to bags of words; None for bags of words only.
      encoder_trainable: whether to fine-tune the encoder, which needs a GPU; if false, each text is embedded
        once.
      max_length: maximum number of tokens of a text that the encoder reads; longer texts are truncated. A
        value above the `max_seq_length` of the encoder gives a warning.
      cache_dir: directory in which embeddings of a frozen encoder are cached for later calls of `fit` on the
        same texts; None for no cache.
      mesh: mesh over whose devices the labels are sharded, from `sparse_xmc.mesh.make_mesh`; None for one
        device. The mesh is not saved: give `load` a mesh again. A classifier with a mesh cannot be pickled.
      seed: seed of all random choices, in 0..2^32-1; the same seed on the same machine gives the same
        classifier. None for a seed from the operating system.
      verbose: whether to show progress.

    Attributes:
      n_labels_: L, the number of labels.
      classes_: [L], the names of the labels, or their numbers if they have no names.
      n_features_in_: number of features; for texts, the number of words.
      saved_: the `SavedModel`, which contains the Flax module, its configuration and the encoder of texts.
      history_: a record for each epoch, as returned by `sparse_xmc.train.fit`.
      seed_: the seed used by `fit`: `seed`, or the one drawn from the operating system.

    Examples:
      >>> from sparse_xmc import XMCClassifier
      >>> texts = ["a small cat", "a big cat", "a small dog", "a big dog"] * 5
      >>> labels = [["cat", "small"], ["cat"], ["dog", "small"], ["dog"]] * 5
      >>> classifier = XMCClassifier().fit(texts, labels)
      >>> classifier.predict(["the small cat"], k=2).labels.tolist()
      [['cat', 'small']]
    """

    def __init__(
        self,
        *,
        fan_in: int | None = None,
        penultimate: int | None = None,
        embedding: int | None = None,
        dropout: float | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        ngrams: int | None = None,
        min_df: int = 2,
        encoder: str | os.PathLike | None = None,
        encoder_trainable: bool = False,
        max_length: int = 64,
        cache_dir: str | os.PathLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
        seed: int | None = 0,
        verbose: bool = False,
    ):
        self.fan_in = fan_in
        self.penultimate = penultimate
        self.embedding = embedding
        self.dropout = dropout
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.ngrams = ngrams
        self.min_df = min_df
        self.encoder = encoder
        self.encoder_trainable = encoder_trainable
        self.max_length = max_length
        self.cache_dir = cache_dir
        self.mesh = mesh
        self.seed = seed
        self.verbose = verbose

    def fit(self, X: TextsOrFeatures, y: Labels) -> "XMCClassifier":
        """Train the classifier from scratch.

        X and y are not modified.

        Args:
          X: N texts: an iterable of str, such as a list or a column of a data frame; or features [N, D]: an
            array, a sparse matrix, such as TF-IDF, or a data frame of numbers.
          y: for each point an iterable of the names of its labels; or a matrix [N, L], sparse or dense, whose
            nonzero elements are the labels of the points; or a data frame of numbers [N, L], whose column
            names are the label names or the numbers 0..L-1.

        Returns:
          The classifier itself.

        Raises:
          ValueError: X or y has a wrong shape or values that are not finite, X and y differ in the number of
            points, or a parameter is out of range.
          TypeError: X or y is of another type.
          MemoryError: training needs more memory than is available; see `plan_memory`.

        Warns:
          UserWarning: nearly every point has a label of its own, or names look like several names in one.
        """
        parameters = self._checked_parameters()
        seed = _draw_seed() if parameters.seed is None else parameters.seed
        if parameters.encoder_trainable and parameters.encoder is None:
            raise ValueError("encoder_trainable=True needs an encoder")
        values = read_points(X)
        labels, label_encoder = _fit_labels(y)
        num_points = len(values) if isinstance(values, list) else values.shape[0]
        if num_points != labels.shape[0]:
            raise ValueError(
                f"X and y must be of the same points, got {num_points} in X and {labels.shape[0]} in y"
            )
        if not num_points or not labels.nnz:
            raise ValueError(f"expected points with labels, got {num_points} points and {labels.nnz} labels")
        inputs, network, ngrams = None, None, 1
        if isinstance(values, list):
            ngrams = ngrams_for(values) if parameters.ngrams is None else parameters.ngrams
            pretrained, network = _open_encoder(parameters)
            inputs = InputEncoder.fit(values, ngrams=ngrams, min_df=parameters.min_df, pretrained=pretrained)
            points = inputs(values, cache_dir=parameters.cache_dir)
        elif parameters.encoder is not None:
            raise ValueError("encoder is for texts, but X is a matrix")
        else:
            points = Points(values)
        warn_of_unusual_labels(labels, None if label_encoder is None else label_encoder.names)
        train = points.with_labels(labels)
        config, training, input_scale = _configure(train, parameters, ngrams, inputs, network)
        check_memory(config, training, train, mesh=self.mesh)
        saved, trainer = build(
            config,
            training,
            train,
            inputs=inputs,
            label_encoder=label_encoder,
            network=network,
            input_scale=input_scale,
            mesh=self.mesh,
            seed=seed,
        )
        history = fit(trainer, train, callbacks=[Progress()] if parameters.verbose else [])
        finish(saved, trainer, statistics=LabelStatistics.of(labels) if len(train) > 2 else None)
        self._set_fitted(saved)
        self.history_, self.seed_ = history, seed
        return self

    def _checked_parameters(self) -> _Parameters:
        """Return the parameters; raise ValueError if one of them has an invalid value."""
        values = {name: value for name, value in self.get_params(deep=False).items() if name != "mesh"}
        paths = {name: os.fspath(v) for name, v in values.items() if isinstance(v, os.PathLike)}
        # As in scikit-learn, `verbose` may be an int.
        return _Parameters(**values | paths | {"verbose": bool(self.verbose)})

    def predict(self, X: TextsOrFeatures, k: int | None = None) -> Predictions:
        """Return the k best labels of each point and their scores.

        Args:
          X: as for `fit`. Without points, the results have the shape [0, k].
          k: number of labels to return, at most `n_labels_`; None for 5, or all labels if there are fewer.

        Raises:
          NotFittedError: `fit` has not been called.
          ValueError, TypeError: X is not of the kind that the classifier was trained on, or k is out of
            range.
          FloatingPointError: a score is not finite.
        """
        points = self._points(X)
        k = resolve_k(k, self.n_labels_)
        labels, scores = np.zeros((len(points), k), np.int64), np.zeros((len(points), k), np.float32)
        for rows, batch_scores, batch_labels in predict(self.saved_.model, points, k):
            labels[rows], scores[rows] = batch_labels, batch_scores
        return Predictions(self.classes_[labels], scores)

    def score(self, X: TextsOrFeatures, y: Labels) -> float:
        """Return P@1, the fraction of points whose best label is correct.

        Labels that were not seen in `fit` are never predicted.

        Args:
          X: as for `fit`, at least one point.
          y: as for `fit`.

        Raises:
          NotFittedError: `fit` has not been called.
          ValueError, TypeError: X or y is not of the kind that the classifier was trained on, or X has no
            points.
        """
        points = self._points(X)
        labels = _encode_labels(y, self._fitted.label_encoder, self.n_labels_)
        if len(points) != labels.shape[0]:
            raise ValueError(
                f"X and y must be of the same points, got {len(points)} in X and {labels.shape[0]} in y"
            )
        if not len(points):
            raise ValueError("X must have at least one point to score, got none")
        return evaluate(self._fitted.model, points.with_labels(labels), ks=(1,))["p@1"]

    def save(self, directory: str | os.PathLike) -> None:
        """Save the trained classifier to a directory, for `load` and `sparse-xmc predict`.

        Args:
          directory: the directory; created if missing.

        Raises:
          NotFittedError: `fit` has not been called.
          ValueError: a parameter has been set to an invalid value. No file is written in this case.
        """
        parameters = dataclasses.asdict(self._checked_parameters())
        if hasattr(self, "seed_"):
            parameters["seed_"] = self.seed_
        dataclasses.replace(self._fitted, parameters=parameters).save(directory)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        *,
        encoder: str | os.PathLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "XMCClassifier":
        """Load a classifier saved by `save`, or by `sparse-xmc run` in its working directory.

        Args:
          directory: the directory of the saved classifier.
          encoder: current directory of its frozen encoder; None for the saved one.
          mesh: mesh over whose devices the labels are sharded; it need not be the mesh used in training.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: files are damaged or inconsistent.
        """
        saved = SavedModel.load(directory, encoder, mesh)
        parameters = dict(saved.parameters or {})
        seed = parameters.pop("seed_", None)
        try:
            classifier = cls(**parameters)
            classifier._checked_parameters()
            if seed is not None:
                classifier.seed_ = check_seed(seed)
        except (TypeError, ValueError) as error:
            path = Path(directory) / PARAMETERS
            raise ValueError(f"{path}: not the parameters of a classifier: {error}") from error
        classifier.mesh = mesh
        if encoder is not None:
            classifier.encoder = encoder
        classifier._set_fitted(saved)
        return classifier

    def _set_fitted(self, saved: SavedModel) -> None:
        self.saved_ = saved
        self.n_labels_ = saved.config.num_labels
        self.n_features_in_ = saved.config.num_features
        names = saved.label_encoder
        self.classes_ = np.arange(self.n_labels_) if names is None else np.array(names.names, object)

    def __getstate__(self) -> dict[str, Any]:
        model_mesh = self.saved_.model.head.mesh if hasattr(self, "saved_") else None
        if self.mesh is not None or model_mesh is not None:
            raise TypeError(
                "an XMCClassifier with a mesh cannot be pickled or copied, as devices belong to a process; "
                "use save and load, or mesh=None"
            )
        return super().__getstate__()

    @property
    def _fitted(self) -> SavedModel:
        if not hasattr(self, "saved_"):
            raise NotFittedError("this XMCClassifier is not trained yet: call fit, or load one")
        return self.saved_

    def _points(self, X: TextsOrFeatures) -> Points:
        """Return the points, after checking that they are of the kind that the classifier takes."""
        saved = self._fitted
        config, values = saved.config, read_points(X)
        if isinstance(values, list) and not values and saved.inputs is None:
            empty = np.zeros((0, config.num_features), np.float32)
            values = scipy.sparse.csr_array(empty) if config.bag_of_words else empty
        if isinstance(values, list):
            if saved.inputs is None:
                raise TypeError("X must be features, as the classifier was trained on, got texts")
            return saved.inputs(values)
        if saved.inputs is not None:
            raise TypeError("X must be texts, as the classifier was trained on, got features")
        if values.shape[1] != self.n_features_in_:
            raise ValueError(f"X must have {self.n_features_in_} features, got {values.shape[1]}")
        if scipy.sparse.issparse(values) != config.bag_of_words:
            expected = "sparse" if config.bag_of_words else "dense"
            raise TypeError(f"X must be {expected}, as the classifier was trained on, got {type(X).__name__}")
        return Points(values)


def _open_encoder(
    parameters: _Parameters,
) -> tuple[PretrainedInput | None, PretrainedEncoder | None]:
    """Return the pretrained part of the encoder of texts, and the network to be fine-tuned; or None."""
    if parameters.encoder is None:
        return None, None
    trainable = parameters.encoder_trainable
    pretrained = open_pretrained(parameters.encoder, trainable=trainable, max_length=parameters.max_length)
    return pretrained, PretrainedEncoder.from_directory(parameters.encoder, remat=True) if trainable else None


def _configure(
    train: Dataset,
    parameters: _Parameters,
    ngrams: int,
    inputs: InputEncoder | None,
    network: PretrainedEncoder | None,
) -> tuple[ClassifierConfig, TrainingConfig, float]:
    """Return the configurations of the classifier and of training, and the scale of the inputs."""
    given = {name: value for name, value in vars(parameters).items() if value is not None}
    training = training_for(train, **_only(given, "epochs", "batch_size", "learning_rate"))
    if parameters.embedding is not None and not train.is_sparse:
        raise ValueError(f"embedding={parameters.embedding} is for texts and sparse features, but X is dense")
    sizes = sizes_for(train, **_only(given, "embedding", "penultimate", "fan_in"))
    dropout = dropout_for(train, ngrams) if parameters.dropout is None else parameters.dropout
    encoder = EncoderConfig(embedding=sizes["embedding"], dropout=dropout)
    head = FixedFanInConfig(
        penultimate=sizes["penultimate"],
        fan_in=sizes["fan_in"],
        direct_inputs=sizes["direct_inputs"],
    )
    input_scale = 1.0
    if inputs is None:  # The TF-IDF of texts is scaled already.
        input_scale = input_scale_for(train, head.penultimate, head.fan_in)
    return ClassifierConfig.for_data(train, encoder, head, network), training, input_scale


def resolve_k(k: int | None, num_labels: int) -> int:
    """Return the number of labels to rank: k, or if it is None 5, or all labels if there are fewer.

    Raises:
      ValueError: k is not a whole number between 1 and the number of labels.
    """
    if k is None:
        return min(_DEFAULT_K, num_labels)
    if not isinstance(k, int | np.integer) or not 1 <= k <= num_labels:
        raise ValueError(f"k must be between 1 and the number of labels, {num_labels}, got {k!r}")
    return int(k)


def _draw_seed() -> int:
    """Return a seed drawn from the entropy of the operating system."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def _only(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _fit_labels(y: Labels) -> tuple[scipy.sparse.csr_array, LabelEncoder | None]:
    """Return the label matrix bool [N, L] of training points, and the encoder of the label names or None."""
    labels = read_labels(y)
    if isinstance(labels, LabelMatrix):
        return labels.values, None if labels.names is None else LabelEncoder(labels.names)
    encoder = LabelEncoder.fit(labels)
    return encoder(labels), encoder


def _encode_labels(y: Labels, encoder: LabelEncoder | None, num_labels: int) -> scipy.sparse.csr_array:
    """Return the label matrix bool [N, L] of points for a trained classifier.

    Args:
      y: as for `XMCClassifier.fit`.
      encoder: label encoder of the classifier; None if its labels have no names.
      num_labels: L, the number of labels of the classifier.
    """
    labels = read_labels(y)
    if isinstance(labels, LabelMatrix):
        if encoder is not None and labels.names is not None:
            return _reorder(labels.values, labels.names, encoder)
        if encoder is not None or labels.values.shape[1] != num_labels:
            expected = f"a matrix [N, {num_labels}]" if encoder is None else "names"
            raise ValueError(f"y must be {expected}, got a matrix {list(labels.values.shape)}")
        return labels.values
    if encoder is not None:
        return encoder(labels)
    if labels:
        raise ValueError("y must be a matrix, as the classifier was trained with, got names")
    return scipy.sparse.csr_array((0, num_labels), dtype=bool)  # An empty list has no names.


def _reorder(
    matrix: scipy.sparse.csr_array, columns: list[str], encoder: LabelEncoder
) -> scipy.sparse.csr_array:
    """Return the matrix with its columns in the order of the encoder; unknown columns are dropped."""
    ids = {name: label for label, name in enumerate(encoder.names)}
    known = [(column, ids[name]) for column, name in enumerate(columns) if name in ids]
    ones = np.ones(len(known), bool)
    rows, labels = np.array(known, np.int64).reshape(-1, 2).T
    selection = scipy.sparse.csr_array((ones, (rows, labels)), shape=(len(columns), len(encoder.names)))
    return to_binary(matrix @ selection)
