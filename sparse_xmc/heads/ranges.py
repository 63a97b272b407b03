"""Several heads on disjoint sets of labels: a dense head for frequent labels, a sparse tail for the rest."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sparse_xmc.data.dataset import Dataset
from sparse_xmc.encoders.output import EncoderOutput
from sparse_xmc.heads.dense import DenseConfig
from sparse_xmc.heads.fixed_fan_in_config import FixedFanInConfig
from sparse_xmc.heads.head import Head, HeadSpec, HeadTraining, StepInputs, StepResult
from sparse_xmc.heads.label_shard import merge_top_k, shift_positives
from sparse_xmc.heads.rewiring import RewireConfig
from sparse_xmc.settings import setting


class LabelOrder(nnx.Variable):
    """A permutation of the labels. It is no `nnx.Param`, so gradients and optimizers ignore it."""


class LabelRanges(Head):
    """Several heads on the same features, each for its own set of labels.

    The labels are permuted: each head has a contiguous range of *positions*. The loss is the mean over all L
    labels, so the loss of a head with L_i labels, and its gradient, have the weight L_i / L.

    Args:
      heads: the heads in the order of their positions, with equal `in_features`.
      labels: int [L], the label at each position, ascending within the range of a head, so that labels with
        equal scores keep their order.
      lr_multipliers: learning-rate multiplier of the output layer of each head, multiplied by
        `output_lr_multiplier`.

    Raises:
      ValueError: the heads differ in `in_features`, there is not one multiplier for each head, or `labels` is
        not a permutation that ascends within each range.
    """

    def __init__(self, heads: Sequence[Head], labels: np.ndarray, lr_multipliers: Sequence[float]):
        if len({head.in_features for head in heads}) != 1 or len(lr_multipliers) != len(heads):
            raise ValueError("heads must have the same in_features, and a learning-rate multiplier each")
        self.in_features = heads[0].in_features
        self.num_labels = sum(head.num_labels for head in heads)
        if not np.array_equal(np.sort(labels), np.arange(self.num_labels)):
            raise ValueError(f"labels must be an order of 0..{self.num_labels - 1}")
        for of_head in np.split(labels, np.cumsum([head.num_labels for head in heads])[:-1]):
            if np.any(np.diff(of_head) < 0):
                raise ValueError("labels must ascend within the range of a head")
        self.heads = nnx.List(heads)
        self.lr_multipliers = tuple(lr_multipliers)
        self.labels = LabelOrder(jnp.asarray(labels, jnp.int32))
        self.positions = LabelOrder(jnp.argsort(self.labels[...]).astype(jnp.int32))

    def _ranges(self) -> Iterator[tuple[Head, int]]:
        """Yield each head with its first position."""
        start = 0
        for head in self.heads:
            yield head, start
            start += head.num_labels

    def _share(self, head: Head) -> float:
        return head.num_labels / self.num_labels

    def _positions(self, positives: Array) -> Array:
        inside = (positives >= 0) & (positives < self.num_labels)
        return jnp.where(inside, self.positions[...][jnp.where(inside, positives, 0)], -1)

    def __call__(self, x: Array | EncoderOutput) -> Array:
        logits = jnp.concatenate([head(x) for head in self.heads], axis=1)
        return logits[:, self.positions[...]]

    def loss(self, x: Array | EncoderOutput, positives: Array, loss: str = "squared_hinge") -> Array:
        at = self._positions(positives)
        shares = [
            self._share(head) * head.loss(x, shift_positives(at, start), loss)
            for head, start in self._ranges()
        ]
        return jnp.sum(jnp.stack(shares))

    def top_k(self, x: Array | EncoderOutput, k: int) -> tuple[Array, Array]:
        if k > self.num_labels:
            raise ValueError(f"k must be at most the number of labels, {self.num_labels}, got {k}")
        best = []
        for head, start in self._ranges():
            scores, at = head.top_k(x, min(k, head.num_labels))
            labels = self.labels[...][jnp.where(at < 0, 0, at + start)]
            best.append((scores, jnp.where(at < 0, -1, labels)))
        return merge_top_k(best, k)

    def logits_in_blocks(self, x: Array | EncoderOutput) -> Iterator[tuple[Array, Array]]:
        for head, start in self._ranges():
            for logits, at in head.logits_in_blocks(x):
                yield logits, self.labels[...][at + start]

    def init_moments(self, training: HeadTraining) -> tuple:
        return tuple(head.init_moments(training) for head in self.heads)

    def step_fused(self, inputs: StepInputs, moments: tuple, training: HeadTraining) -> StepResult:
        return self._step("step_fused", inputs, moments, training)

    def step_by_optax(self, inputs: StepInputs, moments: tuple, training: HeadTraining) -> StepResult:
        return self._step("step_by_optax", inputs, moments, training)

    def _step(self, method: str, inputs: StepInputs, moments: tuple, training: HeadTraining) -> StepResult:
        at = self._positions(inputs.positives)
        loss, d_x, new_moments = jnp.float32(0), jnp.float32(0), []
        for (head, start), head_moments, lr_multiplier in zip(
            self._ranges(), moments, self.lr_multipliers, strict=True
        ):
            share = self._share(head)
            # Adam's step is independent of the gradient's scale, except for epsilon. SGD follows the sum of
            # the losses, which has no such weight.
            scaled = dataclasses.replace(
                training,
                epsilon=training.epsilon_for(self.num_labels) / share,
                output_lr_multiplier=lr_multiplier * training.output_lr_multiplier,
            )
            head_inputs = inputs._replace(positives=shift_positives(at, start))
            head_loss, head_d_x, head_moments = getattr(head, method)(head_inputs, head_moments, scaled)
            loss += share * head_loss
            d_x = d_x + share * head_d_x if inputs.wants_d_x else d_x
            new_moments.append(head_moments)
        return loss, d_x, tuple(new_moments)

    def check_rewiring(self, config: RewireConfig) -> None:
        for head in self.heads:
            head.check_rewiring(config)

    def rewire(
        self,
        x: Array | EncoderOutput,
        positives: Array,
        moments: tuple,
        key: Array,
        config: RewireConfig,
    ) -> tuple:
        at = self._positions(positives)
        keys = jax.random.split(key, len(self.heads))
        return tuple(
            head.rewire(x, shift_positives(at, start), head_moments, head_key, config)
            for (head, start), head_moments, head_key in zip(self._ranges(), moments, keys, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class HeadAndTailConfig(FixedFanInConfig):
    """Configuration of a dense layer for the most frequent labels and a fixed fan-in head for all others.

    Attributes:
      head_fraction: fraction of the labels that are in the dense layer.
      head_lr_multiplier: learning-rate multiplier of the dense layer, multiplied by `output_lr_multiplier`.
        It is below 1 by default because all features of a label learn together.
    """

    supports_mesh: ClassVar[bool] = False

    head_fraction: float = setting(0.1, above=0, below=1)
    head_lr_multiplier: float = setting(0.25, at_least=0)

    def _make(self, spec: HeadSpec, rngs: nnx.Rngs) -> Head:
        """Make a new head. Without training points, lower labels are assumed to be more frequent."""
        num_labels, train = spec.num_labels, spec.train
        if num_labels < 2:
            raise ValueError(f"head_and_tail needs at least 2 labels, got {num_labels}")
        counts = -np.arange(num_labels) if train is None else train.label_counts()
        size = min(num_labels - 1, max(1, round(self.head_fraction * num_labels)))
        by_frequency = np.argsort(-counts, kind="stable")
        labels = np.concatenate([np.sort(by_frequency[:size]), np.sort(by_frequency[size:])])
        tail_train = None if train is None else Dataset(train.features, train.labels[:, labels[size:]])
        head_spec = HeadSpec(spec.in_features, size)
        tail_spec = dataclasses.replace(spec, num_labels=num_labels - size, train=tail_train)
        head = DenseConfig(output_bias=self.output_bias).make(head_spec, rngs)
        tail = super()._make(tail_spec, rngs)
        return LabelRanges([head, tail], labels, lr_multipliers=(self.head_lr_multiplier, 1.0))
