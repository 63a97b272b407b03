"""What every head has in common: the interface that the rest of the library trains and asks, and no more.

A head maps the encoder's features [B, E] to labels, and knows everything about that: logits, loss, the best
labels, a training step, rewiring, memory. Outside of this folder nobody asks which kind it is.

To add one: a file here with its configuration (a frozen dataclass with `make`) and its class, and a line in
`HEADS` in this folder's `__init__.py`.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array

from sparse_xmc.data.formats import Dataset
from sparse_xmc.heads.rewiring import RewireConfig
from sparse_xmc.losses import LOSSES
from sparse_xmc.settings import check, setting
from xla_ops import SparseInputs

# Where the bias of all labels starts: on the negative side of the squared hinge's margin.
OUTPUT_BIAS = -1.0

# Adam's epsilon times the number of labels: gradients of a mean over L labels are of order 1 / L, and epsilon
# is to be far below. Optax's 1e-8 is not with 10^5 labels.
_EPSILON_TIMES_LABELS = 1.6e-6

_LABELS_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True)
class HeadTraining:
    """How a head is trained.

    Attributes:
      loss: "squared_hinge" or "bce".
      output_optimizer: that of the output layer: "adam", or "sgd" without momentum, which keeps no moments,
        and rounds bfloat16 weights stochastically. SGD follows the sum of the losses over batch and labels,
        not the mean, so that its rate depends on neither's number.
      output_rate: the output layer learns at this times the learning rate.
      penultimate_rate: the penultimate layer learns at this times the learning rate; its weights are small.
      moments: what Adam keeps of the penultimate layer: both moments in "float32", or in "bfloat16", the
        second rounded stochastically. Of an encoder the first moments are kept so.
      epsilon: Adam's, for gradients of the mean over batch and labels; None for 1.6e-6 / L, as these
        gradients are of order 1 / L. The paper's is 1e-7.
    """

    loss: str = setting("squared_hinge", choices=tuple(LOSSES))
    output_optimizer: str = setting("adam", choices=("adam", "sgd"))
    output_rate: float = setting(1.0, at_least=0)
    penultimate_rate: float = setting(1.0, at_least=0)
    moments: str = setting("float32", choices=("float32", "bfloat16"))
    epsilon: float | None = setting(None, above=0, or_else=(None,))

    def __post_init__(self):
        check(self)

    def epsilon_for(self, num_labels: int) -> float:
        """Adam's epsilon, where the loss is a mean over so many labels."""
        return _EPSILON_TIMES_LABELS / num_labels if self.epsilon is None else self.epsilon


class Features(NamedTuple):
    """What an encoder returns that passes its input on, for heads whose labels read that directly.

    Attributes:
      x: float32 [B, E], the features.
      words: the words of the batch, [B, V], if it passes any on.
    """

    x: Array
    words: SparseInputs | None


def split_features(features: Array | Features) -> Features:
    """The features [B, E], and the words beside them if there are any."""
    return features if isinstance(features, Features) else Features(features, None)


class StepInputs(NamedTuple):
    """What a head's training step takes besides its own state.

    Attributes:
      x: float32 [B, E], the features.
      positives: int32 [B, P], the labels of each point, distinct, padded with -1.
      learning_rate: float32 scalar.
      seed: integer scalar, of stochastic rounding.
      step: int32 scalar, the number of the step; each must have its own.
      wants_d_x: whether the gradient of x is used; where it is not, it may be left out.
      words: those beside x, as in `Features`, or None.
    """

    x: Array
    positives: Array
    learning_rate: Array
    seed: Any
    step: Array
    wants_d_x: bool = True
    words: SparseInputs | None = None


class Head(nnx.Module):
    """From features [B, E] to labels. See the module's docstring.

    What is called x is an array [B, E] or `Features`; heads without direct inputs have no use for words.

    Attributes:
      in_features: E.
      num_labels: L.
      mesh: the devices that its labels are split over, or None.
      by_label: the names of variables with a row for each label, which a mesh may fill up with more.
    """

    in_features: int
    num_labels: int
    mesh: jax.sharding.Mesh | None = None
    by_label: tuple[str, ...] = ()

    @abc.abstractmethod
    def __call__(self, x: Array | Features) -> Array:
        """The logits [B, L] for features [B, E]."""

    @abc.abstractmethod
    def loss(self, x: Array | Features, positives: Array, loss: str = "squared_hinge") -> Array:
        """The mean of a loss, a name in `LOSSES`, over batch and labels: differentiable in x and parameters.

        Positives outside [0, L) do not count.
        """

    @abc.abstractmethod
    def top_k(self, x: Array | Features, k: int) -> tuple[Array, Array]:
        """Scores float32 and label ids int32, each [B, k], best first; of equal scores the lower id wins.

        k is at most L. What is returned for logits of NaN is not defined, but is not finite.
        """

    @abc.abstractmethod
    def logits_in_blocks(self, x: Array | Features) -> Iterator[tuple[Array, Array]]:
        """Yields (logits [B, n], their label ids int32 [n], ascending), until every label has come once."""

    @abc.abstractmethod
    def init_moments(self, training: HeadTraining) -> Any:
        """What the optimizer keeps before the first step: a pytree, the same for both kinds of step.

        Raises:
          ValueError: the head cannot be trained so.
        """

    @abc.abstractmethod
    def step_fused(
        self, inputs: StepInputs, moments: Any, training: HeadTraining
    ) -> tuple[Array, Array, Any]:
        """One training step, which updates this head's parameters where they are.

        Never holds the gradient of a kernel that an op can step in place, nor, for a fixed fan-in layer, the
        logits of all labels.

        Returns:
          The loss before the step, its gradient in x [B, E] (anything unless `wants_d_x`), the new moments.
        """

    @abc.abstractmethod
    def step_by_optax(
        self, inputs: StepInputs, moments: Any, training: HeadTraining
    ) -> tuple[Array, Array, Any]:
        """The same step by `jax.grad` of `loss` and Optax: a reference."""

    @property
    def label_rows(self) -> int:
        """How many rows the variables `by_label` have: L, or on a mesh more."""
        return self.num_labels

    def fill_up(self) -> None:
        """Makes right what is beyond the last label, after arrays of another mesh have been read."""

    def check_rewiring(self, config: RewireConfig) -> None:
        """Raises ValueError if the head has connections that cannot be rewired so."""

    def rewire(
        self, x: Array | Features, positives: Array, moments: Any, key: Array, config: RewireConfig
    ) -> Any:
        """Moves connections of this head, if it has any.

        Args:
          x: [B, E], the features of a batch, without dropout.
          positives: its labels, as for `loss`. Both show where connections move, if growth is "active".
          moments: from `init_moments` or the last step.
          key: a random key.
          config: what moves.

        Returns:
          The moments, without what they remember of the connections that moved.
        """
        return moments


@dataclasses.dataclass(frozen=True)
class HeadConfig(abc.ABC):
    """What makes a head: its sizes. One subclass, a frozen dataclass too, for each kind in `HEADS`."""

    def __post_init__(self):
        check(self)

    @property
    def reads_words(self) -> bool:
        """Whether the head needs `Features`, with the words of bags."""
        return False

    @abc.abstractmethod
    def make(
        self,
        in_features: int,
        num_labels: int,
        *,
        num_words: int = 0,
        train: Dataset | None = None,
        rngs: nnx.Rngs,
    ) -> Head:
        """A new head.

        Args:
          in_features: E.
          num_labels: L.
          num_words: V, how many words `Features` have; 0 where the encoder gives none.
          train: the training points, for heads that start from them: label frequencies, chosen connections.
            None where only the shapes matter.
          rngs: random keys; the stream `params` is used.
        """

    def make_sharded(
        self,
        in_features: int,
        num_labels: int,
        mesh: jax.sharding.Mesh,
        *,
        num_words: int = 0,
        train: Dataset | None = None,
        rngs: nnx.Rngs,
    ) -> Head:
        """The same, with its labels split over the devices of a mesh.

        Raises:
          ValueError: heads of this kind cannot be.
        """
        raise ValueError(f"a mesh needs a fixed fan-in head, got {type(self).__name__}")


def label_blocks(num_labels: int) -> Iterator[slice]:
    """Yields ranges of labels, for what is not to hold the logits of all of them."""
    for start in range(0, num_labels, _LABELS_AT_ONCE):
        yield slice(start, min(start + _LABELS_AT_ONCE, num_labels))
