"""The fixed fan-in output layer, and initializers of kernels and biases."""

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from sparse_xmc.connectivity import blank, draw_connections, row_keys, update_in_blocks
from sparse_xmc.modules import check_features
from xla_ops import SparseInputs, fan_in_matmul

Initializer = Callable[[Array, tuple[int, ...], DTypeLike], Array]

# Default bound of the uniform initializer of sparse output layers. A much smaller kernel would pass almost no
# gradient to the layers before.
OUTPUT_BOUND = 0.05


class Connectivity(nnx.Variable):
    """The inputs of each output. It is no `nnx.Param`, so gradients and optimizers ignore it."""


def is_by_label(node: Any) -> bool:
    """Return whether a node of a state is a variable with a row for each label, which a mesh shards."""
    return isinstance(node, nnx.Variable) and node.get_metadata().get("by_label", False)


def _uniform(
    key: Array, shape: tuple[int, ...], dtype: DTypeLike, bound: ArrayLike, first: ArrayLike = 0
) -> Array:
    """Draw an array uniformly in +-bound, in blocks of rows, as the generator needs many times their memory.

    A row depends only on the key and its number; `first` is the number of the first row.
    """
    return _uniform_of(tuple(shape), jnp.dtype(dtype))(key, bound, first)


@functools.lru_cache(maxsize=8)  # A jit of its own would keep the programs for all shapes.
def _uniform_of(shape: tuple[int, ...], dtype: jnp.dtype) -> Callable[..., Array]:
    """Return `_uniform` compiled for a shape, as a function of the key, the bound and `first`."""

    def uniform(key: Array, bound: Array, first: Array) -> Array:
        def draw(row: Array, fresh: Array, blocks: tuple[Array, ...]) -> tuple[Array, ...]:
            keys = row_keys(key, first + row, blocks[0].shape[0])
            values = jax.vmap(lambda key: jax.random.uniform(key, shape[1:], jnp.float32, -1, 1))(keys)
            return ((bound * values).astype(dtype),)

        return update_in_blocks(draw, (blank(shape, dtype, first),))[0]

    return jax.jit(uniform)


def flat_glorot_uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialize a kernel as the paper's code does: Glorot-uniform on the flat array of all N = L*F weights.

    The bound is sqrt(3 / N). The initial logits of a wide layer are then almost exactly its bias, and the
    layers before it have almost no gradient at first.
    """
    return _uniform(key, shape, dtype, _flat_bound(math.prod(shape)))


def _flat_bound(weights: int) -> float:
    return (3 / max(1, weights)) ** 0.5


def glorot_uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialize a kernel uniformly in +-sqrt(6 / (inputs + outputs)), like Flax, but with less memory."""
    return _uniform(key, shape, dtype, (6 / (shape[0] + shape[1])) ** 0.5)


def sparse_kernel_init(
    bound: float | None, num_labels: int | None = None, first: ArrayLike = 0
) -> Initializer:
    """Return the initializer of the kernel of a sparse output layer, uniform in +-bound.

    Args:
      bound: the bound; None for the bound of the paper's code.
      num_labels: number of labels of the whole layer, if the kernel is for a shard of it; None for a whole
        layer.
      first: number of the first label of the shard. The result is the shard of the kernel of the whole layer.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        rows = shape[0] if num_labels is None else num_labels
        return _uniform(
            key, shape, dtype, _flat_bound(rows * math.prod(shape[1:])) if bound is None else bound, first
        )

    return init


def rare_label_bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialize the bias of L labels to -log(L), about the logit of the probability 1 / L.

    It suits binary cross-entropy: with a bias of 0 all labels would start at the probability 1/2, and the
    first steps would mostly lower the bias.
    """
    return jnp.full(shape, -math.log(max(1, math.prod(shape))), dtype)


class SparseLinear(nnx.Module):
    """Base class of layers whose outputs read some of the inputs.

    Attributes:
      in_features: D, the number of inputs.
    """

    in_features: int

    @abc.abstractmethod
    def connected_inputs(self) -> Array:
        """Return the input of each connection, an integer array of any shape."""


class FixedFanInLinear(SparseLinear):
    """A sparse linear layer in which every output has exactly `fan_in` inputs.

    `y[..., l] = bias[l] + sum_f kernel[l, f] * x[..., indices[l, f]]`: L*F weights in place of L*D. The
    inputs are drawn at random; `sparse_xmc.rewire_layer` moves connections during training. The layer is
    differentiable once, by `jax.grad` or `jax.vjp`.

    Args:
      in_features: D, the size of the last axis of the input.
      out_features: L, the number of outputs (labels).
      fan_in: F, the number of inputs of each output, at most D.
      use_bias: whether to add a bias.
      dtype: dtype of the computation (float32 or bfloat16); None for the dtype of the parameters.
      param_dtype: the dtype of the parameters, float32 or bfloat16.
      kernel_init: initializer of the kernel [L, F]; by default uniform in +-0.05. The paper's code uses
        `flat_glorot_uniform`.
      bias_init: initializer of the bias [L]; by default -log(L), which suits binary cross-entropy. For the
        squared hinge loss use `nnx.initializers.constant(-1)`.
      distinct: whether the inputs of an output are distinct; in the paper's code they may repeat.
      first_output: number of the first output, if the layer is a shard of a larger one, so that each output
        gets the same inputs as in the whole layer.
      rngs: random keys; the stream `params` is used.

    Attributes:
      kernel: `nnx.Param` [L, F].
      indices: `Connectivity` [L, F], uint16 for D <= 65,536, else int32.
      bias: `nnx.Param` [L], or None.

    Raises:
      ValueError: fan_in is not in 1..in_features.
      TypeError: a dtype is neither float32 nor bfloat16.

    The indices belong to the layer like its weights, but are not an `nnx.Param`. Therefore save
    `nnx.state(model, (nnx.Param, Connectivity))`, or all variables: the parameters alone would be combined
    with the inputs of another layer. `sparse_xmc.saving.load_weights` rejects the weights of another model.

    Examples:
      >>> import tempfile
      >>> from flax import nnx
      >>> from sparse_xmc import FixedFanInLinear
      >>> from sparse_xmc.saving import load_weights, save_weights
      >>> trained, new = (FixedFanInLinear(64, 200, fan_in=8, rngs=nnx.Rngs(seed)) for seed in (0, 1))
      >>> path = tempfile.mkdtemp() + "/layer"
      >>> save_weights(path, trained)  # any module, with all of its variables
      >>> loaded = load_weights(path, new)
      >>> bool((loaded.indices[...] == trained.indices[...]).all())
      True

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = sparse_kernel_init(OUTPUT_BOUND),
        bias_init: Initializer = rare_label_bias,
        distinct: bool = True,
        first_output: ArrayLike = 0,
        rngs: nnx.Rngs,
    ):
        if not 1 <= fan_in <= in_features:
            raise ValueError(f"fan_in must be between 1 and in_features = {in_features}, got {fan_in}")
        for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
            if value is not None and jnp.dtype(value) not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
                raise TypeError(f"{name} must be float32 or bfloat16, got {jnp.dtype(value).name}")
        self.in_features = in_features
        self.out_features = out_features
        self.fan_in = fan_in
        self.dtype = dtype
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (out_features, fan_in), param_dtype), by_label=True
        )
        self.indices = Connectivity(
            draw_connections(
                rngs.params(), out_features, fan_in, in_features, distinct=distinct, first=first_output
            ),
            by_label=True,
        )
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), by_label=True)
            if use_bias
            else None
        )

    def connected_inputs(self) -> Array:
        """Return the input of each connection, integer [L, F]."""
        return self.indices[...]

    def cast(self, x: Array) -> tuple[Array, Array, Array, Array | None]:
        """Return x, kernel, indices and bias in the dtype of the computation, as arguments of `xla_ops`."""
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        dtype = kernel.dtype if self.dtype is None else self.dtype
        return (
            x.astype(dtype),
            kernel.astype(dtype),
            self.indices[...],
            bias if bias is None else bias.astype(dtype),
        )

    def __call__(self, x: Array, sparse: SparseInputs | None = None) -> Array:
        """Map x [..., D] to [..., L].

        Args:
          x: [..., D], or [..., D - C] if C sparse inputs follow the dense ones.
          sparse: the last C inputs, or None.
        """
        dense = self.in_features - (0 if sparse is None else sparse.num_columns)
        check_features(self, x, dense)
        return fan_in_matmul(*self.cast(x), sparse=sparse)
