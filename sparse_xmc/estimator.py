"""The classifier after scikit-learn's conventions: texts or features in, labels out."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import scipy.sparse
from flax import nnx
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from sparse_xmc.data.files import write_text
from sparse_xmc.data.formats import Dataset
from sparse_xmc.data.label_checks import warn_of_unusual_labels
from sparse_xmc.data.text import LabelEncoder, TextEncoder
from sparse_xmc.defaults import dropout_for, input_scale_for, ngrams_for, sizes_for, training_for
from sparse_xmc.encoders.frozen_encoder import open_pretrained
from sparse_xmc.evaluation import evaluate, predict
from sparse_xmc.heads import FixedFanInConfig
from sparse_xmc.metrics import LabelStatistics
from sparse_xmc.model import ClassifierConfig, EncoderConfig
from sparse_xmc.planning import check_memory
from sparse_xmc.saving import SavedModel
from sparse_xmc.train import Progress, Trainer, fit

_PARAMETERS = "estimator.json"

Matrix: TypeAlias = np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix
Features: TypeAlias = Sequence[str] | Matrix
Labels: TypeAlias = Sequence[Iterable[str]] | Matrix


class Predictions(NamedTuple):
    """The best labels of N points.

    Attributes:
      labels: [N, k], names (str) if the classifier was trained with names, else numbers (int), best first.
      scores: float32 [N, k], the logits, descending. A label that the classifier holds for right has a score
        near 1 or above, one that it holds for wrong near -1 or below (with the squared hinge).
    """

    labels: np.ndarray
    scores: np.ndarray


class XMCClassifier(BaseEstimator):
    """A multi-label classifier for many labels, with a fixed fan-in output layer.

    What is None is chosen from the data when `fit` is called, as `sparse_xmc.defaults` says.

    Args:
      fan_in: F, how many inputs each label reads.
      penultimate: the width of the layer that labels read from; 0 for none.
      embedding: the size of a word's embedding, for texts and sparse features.
      dropout: the rate of dropout on the features.
      epochs: how often each point is seen.
      batch_size: how many points a step takes.
      learning_rate: that of the first step; it falls to 0.
      ngrams: of texts, 1 for words alone, 2 for pairs of neighbouring words as well.
      min_df: a word must occur in this many of the texts.
      encoder: the directory of a pretrained encoder of texts, as Hugging Face saves it, whose embeddings are
        features beside the words; None for words alone.
      encoder_trainable: whether it is trained too, which takes a GPU; otherwise each text is embedded once.
      max_length: how many tokens of a text it reads.
      cache_dir: where a frozen encoder's embeddings are kept for the next `fit` on the same texts, if
        anywhere.
      mesh: the devices to split the labels over, as of `sparse_xmc.mesh.make_mesh`; None for one device.
        It is not saved: `load` takes another.
      seed: of everything random; the same seed on the same machine gives the same classifier.
      verbose: whether to show progress.

    Attributes:
      n_labels_: L.
      classes_: the labels by their numbers: names, or the numbers themselves.
      n_features_in_: the number of features, of words for texts.
      saved_: the `SavedModel`: the Flax module with its configuration and what encodes text.
      history_: a record for each epoch.

    Example:
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
        seed: int = 0,
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

    def fit(self, X: Features, y: Labels) -> "XMCClassifier":
        """Trains the classifier, anew if it was trained before.

        Args:
          X: N texts (a sequence of str), or features [N, D]: an array, or a sparse matrix, such as TF-IDF.
          y: the labels: for each point the names of its labels, or a matrix [N, L], sparse or not, whose
            nonzero elements are a point's labels.

        Returns:
          Itself.

        Raises:
          ValueError, TypeError: X or y is none of these, X is not finite, or they do not fit each other.
          MemoryError: training would take more memory than there is; see `plan_memory`.

        Warns:
          UserWarning: nearly every point has a label of its own, or labels look like unseparated names.
        """
        texts = _texts(X)
        if self.encoder_trainable and self.encoder is None:
            raise ValueError("encoder_trainable=True needs an encoder")
        text_encoder, pretrained, trained, encoded, ngrams = None, None, None, None, 1
        if texts is None:
            if self.encoder is not None:
                raise ValueError("encoder is for texts, but X is a matrix")
            features = _features(X)
        else:
            ngrams = ngrams_for(texts) if self.ngrams is None else self.ngrams
            text_encoder = TextEncoder.fit(texts, ngrams=ngrams, min_df=self.min_df)
            features = text_encoder(texts)
        labels, label_encoder = _encode_labels(y)
        if texts is not None and self.encoder is not None:
            pretrained, trained = open_pretrained(
                self.encoder,
                trainable=self.encoder_trainable,
                max_length=self.max_length,
                cache_dir=self.cache_dir,
                remat=True,
            )
            encoded = pretrained(texts)
        train = Dataset(features, labels, encoded=encoded)
        if not len(train) or not labels.nnz:
            raise ValueError(f"expected points with labels, got {len(train)} points and {labels.nnz} labels")
        warn_of_unusual_labels(labels, None if label_encoder is None else label_encoder.names)
        training = training_for(train, **self._given("epochs", "batch_size", "learning_rate"))
        if self.embedding is not None and not train.is_sparse:
            raise ValueError(f"embedding={self.embedding} is for texts and sparse features, but X is dense")
        sizes = sizes_for(train, **self._given("embedding", "penultimate", "fan_in"))
        dropout = dropout_for(train, ngrams) if self.dropout is None else self.dropout
        config = ClassifierConfig(
            num_features=train.num_features,
            num_labels=train.num_labels,
            bag_of_words=train.is_sparse,
            encoder=EncoderConfig(embedding=sizes["embedding"], dropout=dropout),
            head=FixedFanInConfig(
                penultimate=sizes["penultimate"],
                fan_in=sizes["fan_in"],
                direct=sizes["direct"],
                output_bias=-1.0,  # on the negative side of the margin, so that easy negatives cost nothing
                output_bound=0.05,
            ),
            **ClassifierConfig.beside_words(pretrained, trained),
        )
        scale = 1.0
        if texts is None:  # of texts it is right as it is
            scale = input_scale_for(train, sizes["penultimate"], sizes["fan_in"])
        check_memory(config, training, train, mesh=self.mesh)
        model = config.make(
            train=train, text=trained, input_scale=scale, mesh=self.mesh, rngs=nnx.Rngs(self.seed)
        )
        trainer = Trainer(model, training, seed=self.seed)
        history = fit(trainer, train, callbacks=[Progress()] if self.verbose else [])
        saved = SavedModel(config, trainer.model, text_encoder, label_encoder, pretrained)
        if len(train) > 2:
            saved.label_statistics = LabelStatistics.of(labels)
        self._set_fitted(saved)
        self.history_ = history
        return self

    def _given(self, *names: str) -> dict[str, Any]:
        """Those of the parameters that are not left to be chosen."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def predict(self, X: Features, k: int = 5) -> Predictions:
        """The k best labels of each point with their scores.

        Args:
          X: as for `fit`.
          k: how many labels, at most `n_labels_`.

        Raises:
          NotFittedError: `fit` has not been called.
          ValueError, TypeError: X is not what the classifier was trained on, or k is out of range.
          FloatingPointError: a score is not finite.
        """
        points = self._points(X)
        if not 1 <= k <= self.n_labels_:
            raise ValueError(f"k must be between 1 and the number of labels, {self.n_labels_}, got {k}")
        labels, scores = np.zeros((len(points), k), np.int64), np.zeros((len(points), k), np.float32)
        for rows, its_scores, its_labels in predict(self.saved_.model, points, k):
            labels[rows], scores[rows] = its_labels, its_scores
        return Predictions(self.classes_[labels], scores)

    def score(self, X: Features, y: Labels) -> float:
        """P@1: the part of the points whose best label is right; labels that `fit` has not seen never are."""
        labels, _ = _encode_labels(y, self._fitted.label_encoder, self.n_labels_)
        points = dataclasses.replace(self._points(X), labels=labels)
        return evaluate(self._fitted.model, points, ks=(1,))["p@1"]

    def save(self, directory: str | os.PathLike) -> None:
        """Saves the trained classifier in a directory, which `load` and `experiments.predict` read."""
        self._fitted.save(directory)
        own = {name: value for name, value in self.get_params(deep=False).items() if name != "mesh"}
        parameters = json.dumps(own, indent=2, default=os.fspath)
        if jax.process_index() == 0:
            write_text(Path(directory) / _PARAMETERS, parameters + "\n")

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        *,
        encoder: str | os.PathLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "XMCClassifier":
        """Loads a classifier that was saved, by `save` or by `experiments.run` in its working directory.

        Args:
          directory: where it was saved.
          encoder: the directory of its frozen encoder, if that moved.
          mesh: the devices to split its labels over, whatever they were split over before.

        Raises:
          FileNotFoundError: the directory lacks a part of it.
          ValueError: the parts do not fit each other.
        """
        saved, path = SavedModel.load(directory, encoder, mesh), Path(directory) / _PARAMETERS
        try:
            classifier = cls(**json.loads(path.read_text())) if path.exists() else cls()
        except (TypeError, ValueError) as error:
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

    @property
    def _fitted(self) -> SavedModel:
        if not hasattr(self, "saved_"):
            raise NotFittedError("this XMCClassifier is not trained yet: call fit, or load one")
        return self.saved_

    def _points(self, X: Features) -> Dataset:
        """Points whose labels do not matter."""
        saved, texts = self._fitted, _texts(X)
        if (texts is None) != (saved.text_encoder is None):
            expected, got = ("features", "texts") if saved.text_encoder is None else ("texts", "features")
            raise TypeError(f"X must be {expected}, as the classifier was trained on, got {got}")
        if texts is not None:
            return saved.points(texts)
        features = _features(X)
        if features.shape[1] != self.n_features_in_:
            raise ValueError(f"X must have {self.n_features_in_} features, got {features.shape[1]}")
        if scipy.sparse.issparse(features) != saved.config.bag_of_words:
            expected = "sparse" if saved.config.bag_of_words else "dense"
            raise TypeError(f"X must be {expected}, as the classifier was trained on, got {type(X).__name__}")
        return Dataset(features, scipy.sparse.csr_array((features.shape[0], self.n_labels_), dtype=bool))


def _texts(X: Any) -> list[str] | None:
    """X as texts, or None if it is a matrix."""
    if scipy.sparse.issparse(X) or (isinstance(X, np.ndarray) and X.dtype.kind not in "OUS"):
        return None
    if isinstance(X, str):
        raise TypeError("X must be a sequence of texts, got a single str")
    if hasattr(X, "columns"):
        raise TypeError("X must be texts or a matrix, got a data frame: give one column, or to_numpy()")
    texts = list(X)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"X must be texts or a matrix; point {i} is {text!r}, a {type(text).__name__}")
    return texts


def _features(X: Any) -> np.ndarray | scipy.sparse.csr_array:
    """A matrix as float32, dense or CSR."""
    if X.ndim != 2:
        raise ValueError(f"X must have shape [N, D], got {list(X.shape)}")
    if not scipy.sparse.issparse(X):
        features = np.asarray(X, np.float32)
        _check_finite("X", features)
        return features
    features = scipy.sparse.csr_array(X, dtype=np.float32)
    features.sum_duplicates()
    _check_finite("X", features.data)
    return features


def _check_finite(name: str, values: np.ndarray) -> None:
    for block in np.array_split(values, max(1, len(values) // 4096)):  # which may be memory-mapped
        if not np.isfinite(block).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")


def _encode_labels(
    y: Any, encoder: LabelEncoder | None = None, num_labels: int | None = None
) -> tuple[scipy.sparse.csr_array, LabelEncoder | None]:
    """The label matrix bool [N, L], and what names its labels; `num_labels` are those of a classifier."""
    if scipy.sparse.issparse(y) or (isinstance(y, np.ndarray) and y.dtype.kind in "biuf"):
        if y.ndim != 2:
            raise ValueError(f"y must have shape [N, L], or be names for each point, got {list(y.shape)}")
        if num_labels is not None and (encoder is not None or y.shape[1] != num_labels):
            expected = "names" if encoder is not None else f"a matrix [N, {num_labels}]"
            raise ValueError(f"y must be {expected}, got a matrix {list(y.shape)}")
        _check_finite("y", y.data if scipy.sparse.issparse(y) else y)
        labels = scipy.sparse.csr_array(y != 0)
        labels.sum_duplicates()
        labels.eliminate_zeros()
        return labels, None
    y = list(y)
    for i, names in enumerate(y):
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"y must have a sequence of names (str) for each point, got {names!r} for point {i}"
            )
        for name in names:
            if not name or "\n" in name or "\r" in name:
                raise ValueError(f"labels must not be empty or have line breaks, got {name!r} for point {i}")
    if num_labels is not None and encoder is None:
        raise ValueError("y must be a matrix, as the classifier was trained with, got names")
    encoder = encoder or LabelEncoder.fit(y)
    return encoder(y), encoder
