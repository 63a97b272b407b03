"""The interface of all heads, used by training, evaluation and export.

A head maps the features [B, E] of the encoder to labels. It implements logits, loss, ranking, the training
step and rewiring. Code outside of this package does not depend on the class of a head.

To add a head, write a module with its class and its configuration. The class must implement the abstract
methods of `Head`. `LayeredHead` implements all of them for any output layer, and its subclasses override them
to save time and memory. A head with connections overrides `rewire` too. The configuration is a frozen
dataclass derived from `HeadConfig`, with a method `_make`. Heads of this package are listed in `HEADS`
(`heads/__init__.py`); others call `register_head` before `sparse_xmc.cli.run_flags` is imported.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from jax import Array

from sparse_xmc.data.dataset import Dataset
from sparse_xmc.encoders.output import EncoderOutput
from sparse_xmc.heads.rewiring import RewireConfig
from sparse_xmc.losses import LOSSES
from sparse_xmc.settings import check, setting
from xla_ops import SparseInputs

# The initial bias of all labels, on the negative side of the squared hinge's margin.
OUTPUT_BIAS = -1.0

# Adam's epsilon times the number of labels. Gradients of a mean over L labels are of order 1 / L, and epsilon
# must be far below; Optax's default of 1e-8 is not far below 1e-5, their order for 10^5 labels.
_EPSILON_TIMES_LABELS = 1.6e-6

_LABELS_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True)
class HeadTraining:
    """Training configuration of a head.

    Attributes:
      loss: the loss, "squared_hinge" or "bce" (binary cross-entropy).
      output_optimizer: optimizer of the output layer: "adam", or "sgd" without momentum, which has no moments
        and rounds bfloat16 weights stochastically. SGD follows the sum of the losses over batch and labels,
        not the mean, so that its learning rate is independent of the batch size and the number of labels.
      output_lr_multiplier: learning-rate multiplier of the output layer.
      penultimate_lr_multiplier: learning-rate multiplier of the penultimate layer, whose weights are small.
      moment_dtype: dtype of Adam's moments of the penultimate layer, "float32" or "bfloat16", with the second
        moment rounded stochastically; also the dtype of the first moments of the encoder.
      epsilon: Adam's epsilon, for gradients of the mean over batch and labels; None for 1.6e-6 / L, as these
        gradients are of order 1 / L. The paper uses 1e-7.
    """

    loss: str = setting("squared_hinge", choices=tuple(LOSSES))
    output_optimizer: str = setting("adam", choices=("adam", "sgd"))
    output_lr_multiplier: float = setting(1.0, at_least=0)
    penultimate_lr_multiplier: float = setting(1.0, at_least=0)
    moment_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    epsilon: float | None = setting(None, above=0, or_else=(None,))

    def __post_init__(self):
        check(self)

    def epsilon_for(self, num_labels: int) -> float:
        """Return Adam's epsilon for a loss that is a mean over `num_labels` labels."""
        return _EPSILON_TIMES_LABELS / num_labels if self.epsilon is None else self.epsilon


class StepInputs(NamedTuple):
    """The inputs of a training step of a head, apart from the state of the head.

    Attributes:
      x: float32 [B, E], the features.
      positives: int32 [B, P], the labels of each point, distinct, padded with -1.
      learning_rate: float32 scalar, the learning rate of this step, before the multipliers of the layers.
      seed: integer scalar, the seed of stochastic rounding.
      step: int32 scalar, the number of the step; every step must have a different number.
      wants_d_x: whether the gradient with respect to x is used; if false, the head need not compute it.
      direct: the direct inputs [B, V], as in `EncoderOutput`, or None.
    """

    x: Array
    positives: Array
    learning_rate: Array
    seed: Any
    step: Array
    wants_d_x: bool = True
    direct: SparseInputs | None = None


# The loss before the step, its gradient with respect to x [B, E], and the new moments.
StepResult = tuple[Array, Array, Any]


class Head(nnx.Module):
    """Base class of heads, which map features [B, E] to labels.

    Arguments named x are the output of an encoder, an array [B, E] or `EncoderOutput`. Heads without direct
    inputs ignore those of `EncoderOutput`.

    Attributes:
      in_features: E, the number of features.
      num_labels: L, the number of labels.
      mesh: mesh over whose devices the labels are sharded, or None.
    """

    in_features: int
    num_labels: int
    mesh: jax.sharding.Mesh | None = None

    @abc.abstractmethod
    def __call__(self, x: Array | EncoderOutput) -> Array:
        """Return the logits [B, L] for features [B, E]."""

    @abc.abstractmethod
    def loss(self, x: Array | EncoderOutput, positives: Array, loss: str = "squared_hinge") -> Array:
        """Return the mean of a loss over batch and labels, differentiable in x and the parameters.

        Args:
          x: [B, E], the features.
          positives: int32 [B, P], the labels of each point; values outside [0, L) are ignored.
          loss: name of the loss, a key of `LOSSES`.
        """

    @abc.abstractmethod
    def top_k(self, x: Array | EncoderOutput, k: int) -> tuple[Array, Array]:
        """Return the k best labels of each point.

        Args:
          x: [B, E], the features.
          k: number of labels to return, at most L.

        Returns:
          Scores float32 [B, k] and labels int32 [B, k], best first. Of labels with equal scores, the lower
          one comes first. For NaN logits the results are not defined, but the scores are not finite.
        """

    @abc.abstractmethod
    def logits_in_blocks(self, x: Array | EncoderOutput) -> Iterator[tuple[Array, Array]]:
        """Yield the logits of all labels in blocks: logits [B, n], and their labels int32 [n], ascending."""

    @abc.abstractmethod
    def init_moments(self, training: HeadTraining) -> Any:
        """Return the moments before the first step, a pytree: the optimizer state of the head.

        The moments are the same for `step_fused` and `step_by_optax`.

        Raises:
          ValueError: the head does not support this training configuration.
        """

    @abc.abstractmethod
    def step_fused(self, inputs: StepInputs, moments: Any, training: HeadTraining) -> StepResult:
        """Take one training step with fused ops, which update the parameters in place.

        The head is a copy made for this step, whose variables the method sets to their new values. "In place"
        means that an op overwrites the donated array. The gradient of a kernel that an op can update in place
        is never held in memory, nor, for a fixed fan-in layer, are the logits of all labels.

        Returns:
          The loss before the step, its gradient with respect to x [B, E] (undefined unless `wants_d_x`), and
          the new moments.
        """

    @abc.abstractmethod
    def step_by_optax(self, inputs: StepInputs, moments: Any, training: HeadTraining) -> StepResult:
        """Take the same step with `jax.grad` of `loss` and Optax, as a reference for `step_fused`."""

    def check_rewiring(self, config: RewireConfig) -> None:
        """Raise ValueError if the connections of the head cannot be rewired with this configuration."""

    def rewire(
        self, x: Array | EncoderOutput, positives: Array, moments: Any, key: Array, config: RewireConfig
    ) -> Any:
        """Rewire this head, if it has connections.

        Args:
          x: [B, E], the features of a batch, without dropout.
          positives: int32 [B, P], the labels of the batch, as for `loss`. x and positives are used only if
            growth is "active".
          moments: from `init_moments` or the last step.
          key: random key.
          config: which connections move, and how.

        Returns:
          The moments, with the entries of moved connections set to 0.
        """
        return moments


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """The sizes of a new head, and the data that it is made for.

    Attributes:
      in_features: E, the number of features.
      num_labels: L, the number of labels.
      num_direct: V, the number of direct inputs in `EncoderOutput`; 0 if the encoder returns none.
      train: the training points, for heads that are initialized from them, by label frequencies or by
        selected inputs; None if only the shapes are needed.
      mesh: mesh over whose devices the labels are sharded; None for one device.
    """

    in_features: int
    num_labels: int
    num_direct: int = 0
    train: Dataset | None = None
    mesh: jax.sharding.Mesh | None = None


@dataclasses.dataclass(frozen=True)
class HeadConfig(abc.ABC):
    """Base class of head configurations, which are frozen dataclasses; `HEADS` has all of them.

    Attributes:
      supports_mesh: whether `make` accepts a mesh; false unless a class sets it.
    """

    supports_mesh: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def reads_direct_inputs(self) -> bool:
        """Whether labels read direct inputs, so that the encoder must return `EncoderOutput`."""
        return False

    def make(self, spec: HeadSpec, rngs: nnx.Rngs) -> Head:
        """Make a new head.

        Args:
          spec: the sizes and the data.
          rngs: random keys; the stream `params` is used.

        Raises:
          ValueError: the sizes do not fit, or `spec` has a mesh and this head cannot be sharded.
        """
        if spec.mesh is not None and not self.supports_mesh:
            raise ValueError(f"a mesh needs a fixed fan-in head, got {type(self).__name__}")
        return self._make(spec, rngs)

    @abc.abstractmethod
    def _make(self, spec: HeadSpec, rngs: nnx.Rngs) -> Head:
        """Make a new head, for `make`; `spec` has a mesh only if `supports_mesh` is set."""

    def in_bfloat16(self) -> "HeadConfig | None":
        """Return this configuration with output weights in bfloat16, or None for heads without this dtype."""
        return None

    def smaller(self) -> Iterator["HeadConfig"]:
        """Yield configurations of decreasing memory, in the order of increasing loss of accuracy."""
        yield from ()


def label_blocks(num_labels: int) -> Iterator[slice]:
    """Yield consecutive ranges of labels, for loops that must not hold the logits of all labels."""
    for start in range(0, num_labels, _LABELS_AT_ONCE):
        yield slice(start, min(start + _LABELS_AT_ONCE, num_labels))
