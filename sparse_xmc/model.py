"""The classifier, which consists of an encoder of the inputs and a head over the labels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sparse_xmc.data.dataset import Dataset
from sparse_xmc.encoders import BagOfWordsEncoder, DenseFeatures, JointEncoder, PretrainedEncoder
from sparse_xmc.encoders.pretrained_files import POOLINGS, PretrainedConfig
from sparse_xmc.heads import HEADS, FixedFanInConfig, Head, HeadConfig, HeadSpec
from sparse_xmc.mesh import place
from sparse_xmc.settings import check, rename_settings, setting


class Classifier(nnx.Module):
    """An extreme multi-label classifier, which consists of an encoder and a head.

    Args:
      encoder: an `nnx.Module` that maps inputs (an array, a `BagOfWords`, or any pytree with a batch axis) to
        float32 features [B, E].
      head: a `sparse_xmc.heads.Head` that maps the features to L labels.
    """

    def __init__(self, encoder: nnx.Module, head: Head):
        self.encoder = encoder
        self.head = head

    def __call__(self, inputs: Any) -> Array:
        """Return the logits [B, L]."""
        return self.head(self.encoder(inputs))

    def loss(self, inputs: Any, positives: Array, loss: str = "squared_hinge") -> Array:
        """Return the mean loss of a batch.

        Args:
          inputs: the inputs of B points.
          positives: int32 [B, P], the labels of each point, padded with -1.
          loss: name of the loss, a key of `LOSSES`.
        """
        return self.head.loss(self.encoder(inputs), positives, loss)

    def top_k(self, inputs: Any, k: int) -> tuple[Array, Array]:
        """Return the k best labels of each point.

        Returns:
          Scores float32 [B, k] and labels int32 [B, k], best first. Of labels with equal scores, the lower
          one comes first.
        """
        return self.head.top_k(self.encoder(inputs), k)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Configuration of the encoder.

    Attributes:
      embedding: E, the size of the embeddings of bags of words; not used for dense features.
      dropout: dropout rate of the features (after the embedding).
      text_dropout: dropout rate of the embeddings of a pretrained encoder.
      text_scale: factor by which the embeddings of a pretrained encoder are multiplied.
    """

    embedding: int = setting(512, at_least=1)
    dropout: float = setting(0.1, at_least=0, below=1)
    text_dropout: float = setting(0.1, at_least=0, below=1)
    text_scale: float = setting(8.0, above=0)

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class PretrainedSettings:
    """Configuration of a `PretrainedEncoder`, without its weights.

    Attributes:
      network: the architecture.
      pooling: how the features of a text are computed, as in `PretrainedEncoder`.
      normalize: whether features are scaled to unit length.
      dtype: dtype of the computation, "float32" or "bfloat16".
      remat: whether a backward pass recomputes the activations within each layer.
    """

    network: PretrainedConfig
    pooling: str = setting("mean", choices=POOLINGS)
    normalize: bool = False
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    remat: bool = False

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of(cls, encoder: PretrainedEncoder) -> "PretrainedSettings":
        """Return the configuration of an encoder."""
        dtype = jnp.dtype(encoder.dtype).name
        return cls(encoder.config, encoder.pooling, encoder.normalize, dtype, encoder.remat)

    def make(self, rngs: nnx.Rngs) -> PretrainedEncoder:
        """Make an encoder with random weights."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PretrainedEncoder(
            fields.pop("network"), **fields | {"dtype": jnp.dtype(self.dtype)}, rngs=rngs
        )


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Configuration of a `Classifier`; `to_json` and `from_json` convert it to and from a JSON object.

    Attributes:
      num_features: D, the number of dense features, or V, the number of words.
      num_labels: L, the number of labels.
      bag_of_words: whether the inputs are bags of words, which are embedded.
      encoder: configuration of the encoder.
      head: configuration of the head, one of the classes in `sparse_xmc.heads.HEADS`.
      text_features: size of the embeddings of a pretrained encoder, in addition to bags of words; 0 for none.
      pretrained: configuration of this encoder if it is fine-tuned; else None.
    """

    num_features: int = setting(dataclasses.MISSING, at_least=1)
    num_labels: int = setting(dataclasses.MISSING, at_least=1)
    bag_of_words: bool = False
    encoder: EncoderConfig = EncoderConfig()
    head: HeadConfig = FixedFanInConfig()
    text_features: int = setting(0, at_least=0)
    pretrained: PretrainedSettings | None = None

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def for_data(
        cls,
        train: Dataset,
        encoder: EncoderConfig,
        head: HeadConfig,
        network: PretrainedEncoder | None = None,
    ) -> "ClassifierConfig":
        """Return the configuration of a classifier for a data set.

        Args:
          train: the training points, or points with the same features and labels.
          encoder: configuration of the encoder.
          head: configuration of the head.
          network: pretrained encoder that is fine-tuned, whose tokens the points have; or None.
        """
        text_features = train.encoded.shape[1] if isinstance(train.encoded, np.ndarray) else 0
        return cls(
            num_features=train.num_features,
            num_labels=train.num_labels,
            bag_of_words=train.is_sparse,
            encoder=encoder,
            head=head,
            text_features=text_features if network is None else network.features,
            pretrained=None if network is None else PretrainedSettings.of(network),
        )

    def make(
        self,
        *,
        train: Dataset | None = None,
        network: PretrainedEncoder | None = None,
        input_scale: float = 1.0,
        mesh: jax.sharding.Mesh | None = None,
        rngs: nnx.Rngs,
    ) -> Classifier:
        """Make a new classifier.

        Args:
          train: the training points, from which heads may be initialized; see `HeadConfig.make`.
          network: the pretrained encoder that is fine-tuned; None for one with random weights, if
            `pretrained` is set.
          input_scale: factor by which the features are multiplied.
          mesh: mesh over whose devices the labels are sharded, from `sparse_xmc.mesh.make_mesh`; the initial
            weights do not depend on it. None for one device.
          rngs: random keys; the streams `params` and `dropout` are used.
        """
        width, num_direct = self.num_features, 0
        options: dict[str, Any] = {"dropout": self.encoder.dropout, "scale": input_scale, "rngs": rngs}
        encoder: nnx.Module
        if not self.bag_of_words:
            encoder = DenseFeatures(width, **options)
        else:
            width, num_direct = self.encoder.embedding, self.num_features
            encoder = BagOfWordsEncoder(
                num_direct, width, return_direct_inputs=self.head.reads_direct_inputs, **options
            )
            if self.text_features:
                options = {"dropout": self.encoder.text_dropout, "scale": self.encoder.text_scale}
                embeddings = DenseFeatures(self.text_features, **options, rngs=rngs)
                if self.pretrained is not None and network is None:
                    network = self.pretrained.make(rngs)
                encoder = JointEncoder(encoder, embeddings, network)
                width += self.text_features
        head = self.head.make(HeadSpec(width, self.num_labels, num_direct, train, mesh), rngs)
        if mesh is not None:
            nnx.update(encoder, place(nnx.state(encoder), mesh))
        return Classifier(encoder, head)

    @property
    def head_kind(self) -> str:
        """The name of the head in `HEADS`."""
        (kind,) = (name for name, config in HEADS.items() if type(self.head) is config)
        return kind

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; the object of the head has `head_kind` as "kind"."""
        fields = dataclasses.asdict(self)
        return fields | {"head": {"kind": self.head_kind, **fields["head"]}}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ClassifierConfig":
        """Make the configuration from a result of `to_json`.

        Raises:
          ValueError: the object was not made by `to_json`.
        """
        try:
            head = rename_settings(fields["head"])
            if (kind := head.pop("kind")) not in HEADS:
                raise ValueError(
                    f"not the configuration of a classifier: head {kind!r} is not registered; import the "
                    "module that defines it first, which is experiments.unstructured for 'unstructured'"
                )
            config = HEADS[kind](**head)
            pretrained = fields.get("pretrained")
            if pretrained is not None:
                network = PretrainedConfig(**pretrained["network"])
                pretrained = PretrainedSettings(**pretrained | {"network": network})
            parts = {"encoder": EncoderConfig(**fields["encoder"]), "head": config, "pretrained": pretrained}
            return cls(**fields | parts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the configuration of a classifier: {error!r}") from error
