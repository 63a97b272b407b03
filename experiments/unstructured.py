"""The unstructured sparse head of the paper, with connections at any position: a baseline for fixed fan-in.

Importing this module registers the head, so that `--head=unstructured` and saved models with it work.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from sparse_xmc.encoders import EncoderOutput
from sparse_xmc.heads import HeadConfig, HeadSpec, LayeredHead, RewireConfig, make_penultimate, register_head
from sparse_xmc.heads.head import OUTPUT_BIAS
from sparse_xmc.layers import (
    OUTPUT_BOUND,
    Connectivity,
    Initializer,
    SparseLinear,
    rare_label_bias,
    sparse_kernel_init,
)
from sparse_xmc.modules import check_features
from sparse_xmc.settings import setting
from xla_ops import kth_smallest_magnitude

_BLOCK_SIZE = 4096


class UnstructuredLinear(SparseLinear):
    """A sparse linear layer with connections at any position: a matrix in coordinate (COO) format.

    `y[b, l] = bias[l] + sum of kernel[n] * x[b, i]` over the connections n with `indices[n] = (l, i)`. The
    connections are drawn uniformly from all pairs (l, i); the weights of repeated pairs add up.
    `rewire_unstructured` moves them during training.

    Args:
      in_features: D, the size of the last axis of the input.
      out_features: L, the number of outputs (labels).
      connections: N, the total number of connections.
      kernel_init: initializer of the kernel [N]; by default uniform in +-0.05.
      bias_init: initializer of the bias [L]; by default -log(L).
      rngs: random keys; the stream `params` is used.

    Attributes:
      kernel: `nnx.Param` float32 [N].
      indices: `Connectivity` int32 [N, 2], the label and the input of each connection.
      bias: `nnx.Param` float32 [L].

    Raises:
      ValueError: connections is not in 1..L*D.

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        connections: int,
        *,
        kernel_init: Initializer = sparse_kernel_init(OUTPUT_BOUND),
        bias_init: Initializer = rare_label_bias,
        rngs: nnx.Rngs,
    ):
        if not 1 <= connections <= in_features * out_features:
            raise ValueError(
                f"connections must be between 1 and in_features * out_features = "
                f"{in_features * out_features}, got {connections}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel = nnx.Param(kernel_init(rngs.params(), (connections,), jnp.float32))
        self.indices = Connectivity(draw_coordinates(rngs.params(), connections, out_features, in_features))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), jnp.float32))

    def connected_inputs(self) -> Array:
        """Return the input of each connection, int32 [N]."""
        return self.indices[...][:, 1]

    def __call__(self, x: Array) -> Array:
        """Map x float32 [B, D] to [B, L]."""
        check_features(self, x, self.in_features, ndim=2)
        features, kernel, indices = jnp.asarray(x).T, self.kernel[...], self.indices[...]
        bias = self.bias[...]

        # Connections are processed in blocks. `jax.experimental.sparse.BCOO` holds all products at once,
        # which takes B times the memory of the kernel and five times as long.
        @jax.checkpoint
        def add(y: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
            weights, (labels, inputs) = block[0], block[1].T
            return y.at[labels].add(features[inputs] * weights[:, None]), None

        padding = -kernel.size % _BLOCK_SIZE  # padded with connections of weight 0
        blocks = (
            jnp.pad(kernel, (0, padding)).reshape(-1, _BLOCK_SIZE),
            jnp.pad(indices, ((0, padding), (0, 0))).reshape(-1, _BLOCK_SIZE, 2),
        )
        start = jnp.broadcast_to(bias[:, None], (bias.size, x.shape[0]))
        return jax.lax.scan(add, start, blocks)[0].T


@dataclasses.dataclass(frozen=True)
class UnstructuredConfig(HeadConfig):
    """Configuration of an unstructured head, as in the paper: L * fan_in connections at any position.

    Attributes:
      penultimate: I, the width of the penultimate layer; 0 for none.
      fan_in: F, the mean number of inputs of a label.
      output_bias: initial bias of all labels, as in `DenseConfig`.
      output_bound: the kernel is initialized uniformly in +-output_bound; None for the much smaller bound of
        the paper's code.
    """

    penultimate: int = setting(8192, at_least=0)
    fan_in: int = setting(32, at_least=1)
    output_bias: float = OUTPUT_BIAS
    output_bound: float | None = setting(OUTPUT_BOUND, above=0, or_else=(None,))

    def _make(self, spec: HeadSpec, rngs: nnx.Rngs) -> "UnstructuredHead":
        penultimate = make_penultimate(spec.in_features, self.penultimate, rngs)
        output = UnstructuredLinear(
            self.penultimate or spec.in_features,
            spec.num_labels,
            spec.num_labels * self.fan_in,
            kernel_init=sparse_kernel_init(self.output_bound),
            bias_init=nnx.initializers.constant(self.output_bias),
            rngs=rngs,
        )
        return UnstructuredHead(output, penultimate)


class UnstructuredHead(LayeredHead):
    """A head with an `UnstructuredLinear` output layer, optionally behind a penultimate layer."""

    output: UnstructuredLinear

    def check_rewiring(self, config: RewireConfig) -> None:
        """Raise ValueError unless connections move to random inputs."""
        if config.growth != "random":
            raise ValueError(f"unstructured layers grow at random, got growth={config.growth!r}")

    def rewire(
        self,
        x: Array | EncoderOutput,
        positives: Array,
        moments: optax.ScaleByAdamState,
        key: Array,
        config: RewireConfig,
    ) -> optax.ScaleByAdamState:
        """Rewire the output layer; arguments as for `Head.rewire`, of which x and positives are not used."""
        layer, name = self.output, "output.kernel"
        kernel, indices, moved = rewire_unstructured(
            key, layer.kernel[...], layer.indices[...], layer.in_features, layer.out_features, config
        )
        layer.kernel.set_value(kernel)
        layer.indices.set_value(indices)
        if name not in moments.mu:
            return moments
        mu, nu = (moment | {name: jnp.where(moved, 0, moment[name])} for moment in (moments.mu, moments.nu))
        return moments._replace(mu=mu, nu=nu)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw_coordinates(key: Array, connections: int, labels: int, in_features: int) -> Array:
    """Draw connections uniformly from all pairs of a label and an input; pairs may repeat.

    Args:
      key: random key.
      connections: N, the number of connections.
      labels: L, the number of labels.
      in_features: D, the number of inputs.

    Returns:
      int32 [N, 2]: the label and the input of each connection.
    """
    label_key, input_key = jax.random.split(key)
    label = jax.random.randint(label_key, (connections,), 0, labels, jnp.int32)
    return jnp.stack(
        [label, jax.random.randint(input_key, (connections,), 0, in_features, jnp.int32)], axis=1
    )


@functools.partial(jax.jit, static_argnames=("in_features", "labels", "config"), donate_argnums=(1, 2))
def rewire_unstructured(
    key: Array,
    kernel: Array,
    indices: Array,
    in_features: int,
    labels: int,
    config: RewireConfig = RewireConfig(),
) -> tuple[Array, Array, Array]:
    """Move the weakest connections of an `UnstructuredLinear` to random pairs of a label and an input.

    The moving connections are chosen as in `rewire`. New pairs are drawn uniformly and may repeat existing
    ones; `config.distinct` is ignored. `kernel` and `indices` are donated.

    Args:
      key: random key.
      kernel: [N], float.
      indices: int32 [N, 2], the label and the input of each connection.
      in_features: D, the number of inputs.
      labels: L, the number of labels.
      config: which connections move, and their initial weights.

    Returns:
      The new kernel [N], the new indices [N, 2], and bool [N], true where a connection moved.

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 4.
    """
    k = round(config.fraction * kernel.size)
    if k == 0:
        return kernel, indices, jnp.zeros(kernel.shape, bool)
    moved = jnp.abs(kernel.astype(jnp.float32)) < kth_smallest_magnitude(kernel, k)
    indices = jnp.where(moved[:, None], draw_coordinates(key, kernel.size, labels, in_features), indices)
    if config.zero_weights:
        kernel = jnp.where(moved, 0, kernel).astype(kernel.dtype)
    return kernel, indices, moved


register_head("unstructured", UnstructuredConfig)
