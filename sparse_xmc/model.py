"""The classifier: an encoder of the inputs, and a head over the labels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.data.formats import Dataset
from sparse_xmc.data.tokens import Tokenizer
from sparse_xmc.encoders import BagOfWordsEncoder, DenseFeatures, JointEncoder, PretrainedEncoder
from sparse_xmc.encoders.frozen_encoder import FrozenEncoder
from sparse_xmc.encoders.pretrained_files import POOLINGS, PretrainedConfig
from sparse_xmc.heads import HEADS, FixedFanInConfig, Head, HeadConfig
from sparse_xmc.mesh import place
from sparse_xmc.settings import check, setting


class Classifier(nnx.Module):
    """An extreme multi-label classifier of any inputs.

    Args:
      encoder: an `nnx.Module` from inputs (an array, a `BagOfWords`, any pytree with a batch) to float32
        features [B, E].
      head: a `sparse_xmc.heads.Head` on E features.
    """

    def __init__(self, encoder: nnx.Module, head: Head):
        self.encoder = encoder
        self.head = head

    def __call__(self, inputs: Any) -> Array:
        """The logits [B, L]."""
        return self.head(self.encoder(inputs))

    def loss(self, inputs: Any, positives: Array, loss: str = "squared_hinge") -> Array:
        """The loss of a batch: `positives` [B, P] int32 padded with -1; `loss` names one of `LOSSES`."""
        return self.head.loss(self.encoder(inputs), positives, loss)

    def top_k(self, inputs: Any, k: int) -> tuple[Array, Array]:
        """Scores and label ids, each [B, k], of the k best labels; of equal scores the lower label wins."""
        return self.head.top_k(self.encoder(inputs), k)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The encoder of a data set's features.

    Attributes:
      embedding: E, the size of the embedding of bags of words; dense features stay as they are.
      dropout: the rate of dropout on the features (after the embedding).
      text_dropout: the rate of dropout on the embeddings of a pretrained encoder.
      text_scale: what these are multiplied by.
    """

    embedding: int = setting(512, at_least=1)
    dropout: float = setting(0.1, at_least=0, below=1)
    text_dropout: float = setting(0.1, at_least=0, below=1)
    text_scale: float = setting(8.0, above=0)

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True)
class PretrainedSettings:
    """What a `PretrainedEncoder` is made of, but for its weights.

    Attributes:
      network: its sizes.
      pooling, normalize: see there.
      dtype: "float32" or "bfloat16", that of its computation.
      remat: see there.
    """

    network: PretrainedConfig
    pooling: str = setting("mean", choices=POOLINGS)
    normalize: bool = False
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    remat: bool = False

    def __post_init__(self):
        check(self)

    @classmethod
    def of(cls, encoder: PretrainedEncoder) -> "PretrainedSettings":
        """Those of an encoder."""
        dtype = jnp.dtype(encoder.dtype).name
        return cls(encoder.config, encoder.pooling, encoder.normalize, dtype, encoder.remat)

    def make(self, rngs: nnx.Rngs) -> PretrainedEncoder:
        """An encoder with random weights."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PretrainedEncoder(
            fields.pop("network"), **fields | {"dtype": jnp.dtype(self.dtype)}, rngs=rngs
        )


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What a `Classifier` of a data set is made of; a JSON object through `to_json` and `from_json`.

    Attributes:
      num_features: D of dense features, or V, the number of words.
      num_labels: L.
      bag_of_words: whether the features are bags of words; they are embedded first.
      encoder: the encoder's sizes.
      head: the head's: one of the configurations in `sparse_xmc.heads.HEADS`.
      text_features: beside bags of words, the size of the embeddings of a pretrained encoder; 0 for none.
      pretrained: that encoder, where it is trained too.
    """

    num_features: int = setting(dataclasses.MISSING, at_least=1)
    num_labels: int = setting(dataclasses.MISSING, at_least=1)
    bag_of_words: bool = False
    encoder: EncoderConfig = EncoderConfig()
    head: HeadConfig = FixedFanInConfig()
    text_features: int = setting(0, at_least=0)
    pretrained: PretrainedSettings | None = None

    def __post_init__(self):
        check(self)

    @classmethod
    def beside_words(
        cls, frozen: FrozenEncoder | Tokenizer | None, trained: PretrainedEncoder | None
    ) -> dict[str, Any]:
        """The fields "text_features" and "pretrained" for what `open_pretrained` returned, or for None."""
        if trained is not None:
            return {"text_features": trained.features, "pretrained": PretrainedSettings.of(trained)}
        return {"text_features": frozen.features} if isinstance(frozen, FrozenEncoder) else {}

    def make(
        self,
        *,
        train: Dataset | None = None,
        text: PretrainedEncoder | None = None,
        input_scale: float = 1.0,
        mesh: jax.sharding.Mesh | None = None,
        rngs: nnx.Rngs,
    ) -> Classifier:
        """A new classifier.

        Args:
          train: the training points, that heads may start from; see `HeadConfig.make`.
          text: the pretrained encoder that is trained too; without it one like it has random weights.
          input_scale: what the features are multiplied by.
          mesh: the devices to split the labels over, as of `sparse_xmc.mesh.make_mesh`; the weights are those
            that they would be without one.
          rngs: random keys; streams `params` and `dropout`.
        """
        width, num_words = self.num_features, 0
        options: dict[str, Any] = {"dropout": self.encoder.dropout, "scale": input_scale, "rngs": rngs}
        encoder: nnx.Module
        if not self.bag_of_words:
            encoder = DenseFeatures(width, **options)
        else:
            width, num_words = self.encoder.embedding, self.num_features
            encoder = BagOfWordsEncoder(num_words, width, direct=self.head.reads_words, **options)
            if self.text_features:
                options = {"dropout": self.encoder.text_dropout, "scale": self.encoder.text_scale}
                embeddings = DenseFeatures(self.text_features, **options, rngs=rngs)
                if self.pretrained is not None and text is None:
                    text = self.pretrained.make(rngs)
                encoder = JointEncoder(encoder, embeddings, text)
                width += self.text_features
        sizes: dict[str, Any] = {"num_words": num_words, "train": train, "rngs": rngs}
        if mesh is None:
            return Classifier(encoder, self.head.make(width, self.num_labels, **sizes))
        head = self.head.make_sharded(width, self.num_labels, mesh, **sizes)
        nnx.update(encoder, place(nnx.state(encoder), mesh))
        return Classifier(encoder, head)

    def to_json(self) -> dict[str, Any]:
        """An object for JSON; the head has its kind beside its sizes."""
        (kind,) = (name for name, config in HEADS.items() if type(self.head) is config)
        fields = dataclasses.asdict(self)
        return fields | {"head": {"kind": kind, **fields["head"]}}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ClassifierConfig":
        """What `to_json` made.

        Raises:
          ValueError: it is not such an object.
        """
        try:
            head = dict(fields["head"])
            config = HEADS[head.pop("kind")](**head)
            pretrained = fields.get("pretrained")
            if pretrained is not None:
                network = PretrainedConfig(**pretrained["network"])
                pretrained = PretrainedSettings(**pretrained | {"network": network})
            parts = {"encoder": EncoderConfig(**fields["encoder"]), "head": config, "pretrained": pretrained}
            return cls(**fields | parts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the configuration of a classifier: {error!r}") from error
