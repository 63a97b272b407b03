"""The classifier: an encoder of the inputs, and a head over the labels."""

import dataclasses
from typing import Any

from flax import nnx
from jax import Array

from sparse_xmc.data.formats import Dataset
from sparse_xmc.encoders import BagOfWordsEncoder, DenseFeatures
from sparse_xmc.heads import HEADS, FixedFanInConfig, Head, HeadConfig
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
    """

    embedding: int = setting(512, at_least=1)
    dropout: float = setting(0.1, at_least=0, below=1)

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What a `Classifier` of a data set is made of; a JSON object through `to_json` and `from_json`.

    Attributes:
      num_features: D of dense features, or V, the number of words.
      num_labels: L.
      bag_of_words: whether the features are bags of words; they are embedded first.
      encoder: the encoder's sizes.
      head: the head's: one of the configurations in `sparse_xmc.heads.HEADS`.
    """

    num_features: int
    num_labels: int
    bag_of_words: bool = False
    encoder: EncoderConfig = EncoderConfig()
    head: HeadConfig = FixedFanInConfig()

    def make(self, *, train: Dataset | None = None, input_scale: float = 1.0, rngs: nnx.Rngs) -> Classifier:
        """A new classifier.

        Args:
          train: the training points, that heads may start from; see `HeadConfig.make`.
          input_scale: what the features are multiplied by.
          rngs: random keys; streams `params` and `dropout`.
        """
        width = self.encoder.embedding if self.bag_of_words else self.num_features
        options: dict[str, Any] = {"dropout": self.encoder.dropout, "scale": input_scale, "rngs": rngs}
        encoder: nnx.Module
        if self.bag_of_words:
            encoder = BagOfWordsEncoder(self.num_features, width, direct=self.head.reads_words, **options)
        else:
            encoder = DenseFeatures(width, **options)
        num_words = self.num_features if self.bag_of_words else 0
        head = self.head.make(width, self.num_labels, num_words=num_words, train=train, rngs=rngs)
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
            return cls(**fields | {"encoder": EncoderConfig(**fields["encoder"]), "head": config})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the configuration of a classifier: {error!r}") from error
