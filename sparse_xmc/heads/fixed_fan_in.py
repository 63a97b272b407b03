"""The fixed fan-in head of the paper: every label reads exactly F units of a wide penultimate layer."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

import xla_ops
from sparse_xmc.connectivity import draw_connections
from sparse_xmc.data.dataset import Dataset
from sparse_xmc.heads.feature_selection import select_direct_inputs
from sparse_xmc.heads.head import OUTPUT_BIAS, Features, Head, HeadConfig, label_blocks, split_features
from sparse_xmc.heads.layered import LayeredHead
from sparse_xmc.heads.part import BY_LABEL, LabelPart
from sparse_xmc.heads.rewiring import rewire, rewire_active
from sparse_xmc.heads.sharded import ShardedHead
from sparse_xmc.layers import OUTPUT_BOUND, FixedFanInLinear, start_of_kernel
from sparse_xmc.settings import setting
from xla_ops import SparseInputs

# Initial Euclidean norm of the weights of a label's direct inputs.
_START = 0.3


@dataclasses.dataclass(frozen=True)
class FixedFanInConfig(HeadConfig):
    """Configuration of a fixed fan-in head.

    Attributes:
      penultimate: I, the width of the penultimate layer; 0 for none.
      fan_in: F, the number of inputs of each label.
      direct_inputs: maximum number of these inputs that are, at the start, direct inputs instead of hidden
        units: words of a bag of words, or features. `select_direct_inputs` chooses them for each label, and
          hidden
        units fill the remaining inputs. 0 for hidden units only, as in the paper.
      direct_scale: factor by which direct inputs are multiplied.
      output_bias: initial bias of all labels. -1 puts every label on the negative side of the squared hinge's
        margin, so that easy negatives have no gradient from the first step. For the loss "bce", -log(L) is
        suitable, the logit of the probability 1 / L. The paper uses 0.
      output_bound: the kernel is initialized uniformly in +-output_bound; None for the much smaller bound of
        the paper's code.
      distinct: whether the initial inputs of a label are distinct; the paper's code allows repeats.
      output_dtype: dtype of the output layer's parameters, "float32" or "bfloat16".
    """

    penultimate: int = setting(8192, at_least=0)
    fan_in: int = setting(32, at_least=1)
    direct_inputs: int = setting(0, at_least=0)
    direct_scale: float = setting(5.0, above=0)
    output_bias: float = OUTPUT_BIAS
    output_bound: float | None = setting(OUTPUT_BOUND, above=0, or_else=(None,))
    distinct: bool = True
    output_dtype: str = setting("float32", choices=("float32", "bfloat16"))

    def make(
        self,
        in_features: int,
        num_labels: int,
        *,
        num_words: int = 0,
        train: Dataset | None = None,
        rngs: nnx.Rngs,
    ) -> Head:
        head = self.make_part(in_features, num_labels, None, num_words=num_words, rngs=rngs)
        if self.direct_inputs and train is not None:
            head.choose(self.direct_inputs, train, rngs.params())
        return head

    def make_sharded(self, in_features, num_labels, mesh, *, num_words=0, train=None, rngs):
        return ShardedHead.make(
            self, in_features, num_labels, mesh, num_words=num_words, train=train, rngs=rngs
        )

    def make_part(
        self, in_features: int, num_labels: int, part: LabelPart | None, *, num_words: int, rngs: nnx.Rngs
    ) -> "FixedFanInHead":
        """Make a head with random connections for all labels, or for the labels of one device.

        Args:
          in_features: E, the number of features.
          num_labels: number of labels of the head: L, or the shard size if `part` is given.
          part: the sharding of the labels, within `jax.shard_map`; None for a head with all labels.
          num_words: V, the size of the vocabulary of `Features.words`; 0 if there are none.
          rngs: random keys; the stream `params` is used.

        Raises:
          ValueError: `direct_inputs` exceeds `fan_in`; `direct_inputs` is set and `fan_in` exceeds the number
            of units; or features are to be direct inputs and there is no penultimate layer.
        """
        if self.direct_inputs > self.fan_in:
            raise ValueError(f"direct_inputs must be at most fan_in, {self.fan_in}, got {self.direct_inputs}")
        units = self.penultimate or in_features
        # A label without training points has no direct inputs, and reads F distinct units.
        if self.direct_inputs and self.fan_in > units:
            raise ValueError(f"fan_in must be at most the number of units, {units}, got {self.fan_in}")
        num_words = num_words if self.direct_inputs else 0
        reads_features = self.direct_inputs > 0 and not num_words
        if reads_features and not self.penultimate:
            raise ValueError(
                "without a penultimate layer labels read the features anyway; use direct_inputs=0"
            )

        whole, first = (num_labels, 0) if part is None else (part.num_labels, part.first(num_labels))

        def output(width):
            return FixedFanInLinear(
                width + num_words + (in_features if reads_features else 0),
                num_labels,
                self.fan_in,
                distinct=self.distinct,
                param_dtype=jnp.dtype(self.output_dtype),
                kernel_init=start_of_kernel(self.output_bound, whole, first),
                bias_init=nnx.initializers.constant(self.output_bias),
                first_output=first,
                rngs=rngs,
            )

        head = FixedFanInHead(
            in_features,
            self.penultimate,
            output,
            num_words=num_words,
            reads_features=reads_features,
            direct_scale=self.direct_scale,
            rngs=rngs,
        )
        head.part = part
        return head

    @property
    def reads_words(self) -> bool:
        return self.direct_inputs > 0


class FixedFanInHead(LayeredHead):
    """A head with a `FixedFanInLinear` output layer, optionally behind a wide penultimate layer.

    Training and ranking never hold the logits of all labels.

    Args:
      in_features: E, the number of features.
      penultimate: I, the width of the penultimate layer; 0 for none.
      make_output: function from the number of inputs, I or E, to the output layer.
      num_words: V, the number of words that labels may read directly; 0 for none.
      reads_features: whether labels may read the features directly, beside the hidden units.
      direct_scale: factor by which direct inputs are multiplied.
      rngs: random keys; the stream `params` is used.

    Reference: Schultheis & Babbar, ECML-PKDD 2023.
    """

    by_label = BY_LABEL
    output: FixedFanInLinear

    def __init__(
        self,
        in_features,
        penultimate,
        make_output,
        *,
        num_words: int = 0,
        reads_features: bool = False,
        direct_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, penultimate, make_output, rngs=rngs)
        self.num_words = num_words
        self.reads_features = reads_features
        self.direct_scale = direct_scale

    def choose(self, count: int, train: Dataset, key: Array) -> None:
        """Connect each label to its best direct inputs, and to random hidden units for the rest.

        Args:
          count: maximum number of direct inputs of a label; fewer if `select_direct_inputs` finds fewer
            columns.
          train: the training points, from which `select_direct_inputs` chooses.
          key: random key for the connections to hidden units.
        """
        layer = self.output
        kernel, indices = self.chosen(count, train, key, slice(0, self.num_labels), layer.kernel[...])
        layer.indices.set_value(jnp.asarray(indices))
        layer.kernel.set_value(jnp.asarray(kernel))

    def chosen(
        self, count: int, train: Dataset, key: Array, labels: slice, kernel: Array
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the kernel and indices that `choose` gives to a range of labels.

        Args:
          count, train, key: as for `choose`.
          labels: the range of labels.
          kernel: [n, F], the initial kernel of these labels; kept for connections to hidden units.

        Returns:
          The kernel [n, F] and the indices [n, F].
        """
        layer = self.output
        units = layer.in_features - (self.num_words or self.in_features)
        rows = labels.stop - labels.start
        drawn = draw_connections(key, rows, layer.fan_in, units, first=labels.start)
        indices, weights = np.array(drawn, np.int32), np.array(kernel.astype(jnp.float32))
        for block, columns, excess in select_direct_inputs(train.features, train.labels[:, labels], count):
            length = np.sqrt(np.square(excess).sum(axis=1, keepdims=True))
            start = _START * excess / np.maximum(length, np.finfo(np.float32).tiny)
            chosen = columns >= 0
            indices[block, :count][chosen] = units + columns[chosen]
            weights[block, :count][chosen] = start[chosen]
        return weights.astype(kernel.dtype), indices.astype(layer.indices.dtype)

    def output_input(self, hidden: Array, x: Array) -> Array:
        if self.reads_features:
            return jnp.concatenate([hidden, self.direct_scale * x], axis=1)
        return hidden

    def _words(self, words: SparseInputs | None) -> SparseInputs | None:
        """Return the words scaled by `direct_scale` in the kernel's dtype; None if the layer reads none."""
        if not self.num_words:
            return None
        if words is None or words.num_columns != self.num_words:
            given = "none" if words is None else f"{words.num_columns}"
            raise ValueError(f"features must come with words, {self.num_words} of them, got {given}")
        values = (self.direct_scale * jnp.asarray(words.values)).astype(self.output.kernel.dtype)
        return dataclasses.replace(words, values=values)

    def __call__(self, x: Array | Features) -> Array:
        return self.output(*self.output_inputs(x))

    def loss(self, x: Array | Features, positives: Array, loss: str = "squared_hinge") -> Array:
        x, words = self.output_inputs(x)
        own = self.own_positives(positives)
        options: dict[str, Any] = {"loss": loss, "num_labels": self.labels_of_all, "sparse": words}
        value = xla_ops.fan_in_loss(*self.output.cast(x), own, **options)
        return value if self.part is None else self.part.sum(value)

    def top_k(self, x: Array | Features, k: int) -> tuple[Array, Array]:
        x, words = self.output_inputs(x)
        return xla_ops.fan_in_top_k(*self.output.cast(x), k, sparse=words)

    def logits_in_blocks(self, x: Array | Features) -> Iterator[tuple[Array, Array]]:
        inputs = self.output_inputs(x)
        for block in label_blocks(self.num_labels):
            labels = jnp.arange(block.start, block.stop, dtype=jnp.int32)
            yield self.logits_of(inputs, block.start, block.stop - block.start), labels

    def output_inputs(self, x: Array | Features) -> tuple[Array, SparseInputs | None]:
        """Return the dense inputs of the output layer, and the words that follow them or None."""
        return self.hidden(x), self._words(split_features(x)[1])

    def logits_of(self, inputs: tuple[Array, SparseInputs | None], start: ArrayLike, count: int) -> Array:
        """Return the logits [B, count] of the labels from `start` on, for `output_inputs`."""
        x, kernel, indices, bias = self.output.cast(inputs[0])
        kernel, indices = (jax.lax.dynamic_slice_in_dim(a, start, count) for a in (kernel, indices))
        bias = bias if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, count)
        return xla_ops.fan_in_matmul(x, kernel, indices, bias, sparse=inputs[1])

    def init_moments(self, training):
        dtype = self.output.dtype
        if dtype is not None and jnp.dtype(dtype) != self.output.kernel.dtype:
            raise ValueError(
                f"a FixedFanInLinear is trained in the dtype of its parameters, {self.output.kernel.dtype}; "
                f"leave out dtype={jnp.dtype(dtype).name}"
            )
        return super().init_moments(training)

    def step_output(self, inputs, moments, training):
        layer, names = self.output, ("output.kernel", "output.bias")
        kernel, bias = layer.kernel[...], None if layer.bias is None else layer.bias[...]
        words = self._words(inputs.words)
        own = self.own_positives(inputs.positives)
        arguments = (inputs.x.astype(kernel.dtype), kernel, layer.indices[...], bias, own)
        options: dict[str, Any] = {"loss": training.loss, "num_labels": self.labels_of_all, "sparse": words}
        options["wants_d_x"] = inputs.wants_d_x
        rate = training.output_lr_multiplier * inputs.learning_rate
        mu, nu = {}, {}
        if training.output_optimizer == "adam":
            of_kernel, of_bias = ((moments.mu.get(name), moments.nu.get(name)) for name in names)
            adam = xla_ops.AdamState(moments.count, *of_kernel, *of_bias)
            loss, d_x, kernel, bias, adam = xla_ops.fan_in_adam_step(
                *arguments, adam, rate, epsilon=training.epsilon_for(self.labels_of_all), **options
            )
            mu, nu = {names[0]: adam.mu_kernel}, {names[0]: adam.nu_kernel}
            if bias is not None:
                mu[names[1]], nu[names[1]] = adam.mu_bias, adam.nu_bias
        else:
            # SGD follows the sum of the losses; the loss is a mean over batch and labels.
            rate = rate * float(inputs.x.shape[0] * self.labels_of_all)
            key = {"seed": inputs.seed, "step": inputs.step, "first_label": self.first_label()}
            loss, d_x, kernel, bias = xla_ops.fan_in_sgd_step(*arguments, rate, **key, **options)
        layer.kernel.set_value(kernel)
        if layer.bias is not None:
            layer.bias.set_value(bias)
        return loss, jnp.zeros(0, jnp.float32) if d_x is None else d_x.astype(inputs.x.dtype), (mu, nu)

    def check_rewiring(self, config):
        if (self.num_words or self.reads_features) and config.growth != "active":
            raise ValueError(
                "direct inputs were chosen, and do not move to others at random: set rewire's growth to "
                f"'active' or its fraction to 0, got growth={config.growth!r}"
            )

    def rewire(self, x, positives, moments, key, config):
        layer, name = self.output, "output.kernel"
        kernel, indices = layer.kernel[...], layer.indices[...]
        remembered = (moments.mu[name], moments.nu[name]) if name in moments.mu else ()
        if config.growth == "active":
            hidden, words = self.output_inputs(x)
            kernel, indices, _, remembered = rewire_active(
                kernel, indices, hidden, self.own_positives(positives), config, remembered, words
            )
        else:
            kernel, indices, _, remembered = rewire(
                key, kernel, indices, layer.in_features, config, remembered, self.part
            )
        layer.kernel.set_value(kernel)
        layer.indices.set_value(indices)
        if not remembered:
            return moments
        mu, nu = (of | {name: new} for of, new in zip((moments.mu, moments.nu), remembered, strict=True))
        return moments._replace(mu=mu, nu=nu)
