"""The unstructured sparse head, with connections at any position: a baseline for fixed fan-in."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_xmc.connectivity import draw_coordinates
from sparse_xmc.data.dataset import Dataset
from sparse_xmc.heads.head import OUTPUT_BIAS, Head, HeadConfig
from sparse_xmc.heads.layered import LayeredHead
from sparse_xmc.heads.rewiring import RewireConfig, rewire_unstructured
from sparse_xmc.layers import OUTPUT_BOUND, Connectivity, Initializer, rare_label_bias, start_of_kernel
from sparse_xmc.modules import check_features
from sparse_xmc.settings import setting

_CONNECTIONS_AT_ONCE = 4096


class UnstructuredLinear(nnx.Module):
    """A sparse linear layer with connections at any position: a matrix in coordinate (COO) format.

    `y[b, l] = bias[l] + sum of kernel[n] * x[b, i]` over the connections n with `indices[n] = (l, i)`. The
    connections are drawn uniformly from all pairs (l, i); the weights of repeated pairs add up.
    `sparse_xmc.rewire_unstructured` moves them during training.

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
        kernel_init: Initializer = start_of_kernel(OUTPUT_BOUND),
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

    def __call__(self, x: Array) -> Array:
        """Map x float32 [B, D] to [B, L]."""
        check_features(self, x, self.in_features, ndim=2)
        features, kernel, indices = jnp.asarray(x).T, self.kernel[...], self.indices[...]
        bias = self.bias[...]

        # Connections are processed in blocks. `jax.experimental.sparse.BCOO` holds all products at once,
        # which takes B times the memory of the kernel and five times as long.
        @jax.checkpoint
        def add(y, block):
            weights, (labels, inputs) = block[0], block[1].T
            return y.at[labels].add(features[inputs] * weights[:, None]), None

        padding = -kernel.size % _CONNECTIONS_AT_ONCE  # padded with connections of weight 0
        blocks = (
            jnp.pad(kernel, (0, padding)).reshape(-1, _CONNECTIONS_AT_ONCE),
            jnp.pad(indices, ((0, padding), (0, 0))).reshape(-1, _CONNECTIONS_AT_ONCE, 2),
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

    def make(
        self,
        in_features: int,
        num_labels: int,
        *,
        num_words: int = 0,
        train: Dataset | None = None,
        rngs: nnx.Rngs,
    ) -> Head:

        def output(width):
            return UnstructuredLinear(
                width,
                num_labels,
                num_labels * self.fan_in,
                kernel_init=start_of_kernel(self.output_bound),
                bias_init=nnx.initializers.constant(self.output_bias),
                rngs=rngs,
            )

        return UnstructuredHead(in_features, self.penultimate, output, rngs=rngs)


class UnstructuredHead(LayeredHead):
    """A head with an `UnstructuredLinear` output layer, optionally behind a penultimate layer."""

    output: UnstructuredLinear

    def check_rewiring(self, config: RewireConfig) -> None:
        if config.growth != "random":
            raise ValueError(f"unstructured layers grow at random, got growth={config.growth!r}")

    def rewire(self, x, positives, moments, key, config):
        layer, name = self.output, "output.kernel"
        kernel, indices, moved = rewire_unstructured(
            key, layer.kernel[...], layer.indices[...], layer.in_features, layer.out_features, config
        )
        layer.kernel.set_value(kernel)
        layer.indices.set_value(indices)
        if name not in moments.mu:
            return moments
        mu, nu = (of | {name: jnp.where(moved, 0, of[name])} for of in (moments.mu, moments.nu))
        return moments._replace(mu=mu, nu=nu)
