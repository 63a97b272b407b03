"""Rewiring of sparse layers: the weakest connections move to random inputs or to active ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from sparse_xmc.connectivity import draw_coordinates, redraw, update_in_blocks
from sparse_xmc.heads.part import LabelPart
from sparse_xmc.layers import FixedFanInLinear
from sparse_xmc.modules import check_features, key_path_names, path_name
from sparse_xmc.settings import check, setting
from xla_ops import SparseInputs, kth_smallest_magnitude


@dataclasses.dataclass(frozen=True)
class RewireConfig:
    """Configuration of rewiring.

    The defaults are those of this library; `PAPER` has the published settings.

    Attributes:
      fraction: fraction of the connections that a rewiring moves: of the whole layer, or with `active` growth
        of each label in the batch; 0 for no rewiring.
      distinct: whether the inputs of a label stay distinct.
      zero_weights: whether a moved connection starts at weight 0; if false it keeps its weight.
      growth: where connections move: to "random" inputs (`rewire`, `rewire_unstructured`), or to inputs that
        are "active" in a point of the label (`rewire_active`).
    """

    fraction: float = setting(0.1, at_least=0, at_most=1)
    distinct: bool = True
    zero_weights: bool = True
    growth: str = setting("random", choices=("random", "active"))

    def __post_init__(self):
        check(self)
        if self.growth == "active" and not (self.distinct and self.zero_weights):
            raise ValueError("growth='active' has no other way than distinct inputs that start at weight 0")


PAPER = RewireConfig(fraction=0.1, distinct=False, zero_weights=False)


@functools.partial(jax.jit, static_argnames=("in_features", "config", "part"), donate_argnums=(1, 2, 5))
def rewire(
    key: Array,
    kernel: Array,
    indices: Array,
    in_features: int,
    config: RewireConfig = RewireConfig(),
    moments: tuple[Array, ...] = (),
    part: LabelPart | None = None,
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """Move the connections with the smallest weights to new inputs drawn uniformly at random.

    The threshold is the k-th smallest magnitude of the whole layer, k = round(fraction * L * F); the
    connections strictly below it move. So at most k - 1 move, and none if k weights are 0.

    `kernel`, `indices` and `moments` are donated. The only new array of the layer's size is the mask of moved
    connections, one byte each, as inputs are drawn for blocks of labels.

    Args:
      key: random key.
      kernel: [L, F], float.
      indices: [L, F], integer.
      in_features: D, the number of inputs.
      config: which connections move, and their initial weights.
      moments: arrays [L, F] of an optimizer, in which the entries of moved connections are set to 0. For the
        state of an Optax chain, see `reset_moments`.
      part: the sharding of the labels, if the arrays have the shard of one device; the whole layer is
        rewired.

    Returns:
      The new kernel [L, F], the new indices [L, F], bool [L, F], true where a connection moved, and the
      new moments.

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 4; Mocanu et al., Nature Communications 9, 2018.
    """
    num_labels, fan_in = (kernel.shape[0] if part is None else part.num_labels), kernel.shape[1]
    k = round(config.fraction * num_labels * fan_in)
    if k == 0:
        return kernel, indices, jnp.zeros(kernel.shape, bool), moments
    first: ArrayLike = 0
    if part is None:
        threshold = kth_smallest_magnitude(kernel, k)
    else:
        first, padding = part.first(kernel.shape[0]), part.padding(kernel.shape[0])
        # The weights of padding labels are 0, and therefore among the smallest.
        threshold = kth_smallest_magnitude(kernel, k + padding * fan_in, axes=part.axes)
    moved = jnp.abs(kernel.astype(jnp.float32)) < threshold
    if part is not None:
        moved &= (first + jnp.arange(kernel.shape[0], dtype=jnp.int32) < num_labels)[:, None]

    def move(moved, kernel, indices, moments):
        def block(row, fresh, blocks):
            mask = jax.lax.dynamic_slice_in_dim(moved, row, fresh.size) & fresh[:, None]

            def draw(indices):
                return redraw(key, indices, mask, in_features, distinct=config.distinct, first=first + row)

            return (jax.lax.cond(mask.any(), draw, _same, *blocks),)

        (indices,) = update_in_blocks(block, (indices,))
        if config.zero_weights:
            kernel = jnp.where(moved, 0, kernel).astype(kernel.dtype)
        return kernel, indices, tuple(jnp.where(moved, 0, m).astype(m.dtype) for m in moments)

    # The branches save work. They also make XLA finish reading the arrays before it writes to any of them;
    # otherwise it would copy them.
    kernel, indices, moments = jax.lax.cond(
        threshold > 0, move, lambda moved, *arrays: arrays, moved, kernel, indices, moments
    )
    return kernel, indices, moved, moments


def _same(array):
    return array


@functools.partial(jax.jit, static_argnames="config", donate_argnums=(0, 1, 5))
def rewire_active(
    kernel: Array,
    indices: Array,
    x: Array,
    positives: Array,
    config: RewireConfig,
    moments: tuple[Array, ...] = (),
    words: SparseInputs | None = None,
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """Move the weakest connections of the labels of a batch to inputs that are active in their points.

    For each label in `positives`, round(fraction * F) connections with the smallest weights move, but at
    least one. They move to the inputs that exceed their means over the batch by most in a point with that
    label (the first one in the batch) and that the label does not read yet. They start at weight 0. The
    gradient of the loss of a positive with respect to a weight is proportional to its input, and an input
    that all points have in common carries no information about the label. Other labels do not change.

    `kernel`, `indices` and `moments` are donated; only the rows of the labels in the batch are read and
    written.

    Args:
      kernel: [L, F], float.
      indices: [L, F], integer, in 0..D-1.
      x: [B, D], float, the input of the layer, without dropout.
      positives: int32 [B, P], the labels of each point, padded with -1.
      config: only `fraction` is used.
      moments: as for `rewire`.
      words: further inputs, numbered D to D + V - 1, each at most once for a point; or None.

    Returns:
      The new kernel [L, F], the new indices [L, F], bool [L, F], true where a connection moved, and the
      new moments.

    Reference: Evci et al., ICML 2020, for growth by the gradient; here only positives contribute to it.
    """
    num_labels, fan_in = kernel.shape
    k = min(fan_in, max(1, round(config.fraction * fan_in)))
    x = x.astype(jnp.float32)
    # A label already reads at most F of a point's best inputs, so F + k candidates suffice.
    excess, candidates = jax.lax.top_k(x - x.mean(axis=0, keepdims=True), min(x.shape[1], fan_in + k))
    if words is not None:
        of_words, columns = _best_words(words, x.shape[0], fan_in + k)
        excess = jnp.concatenate([excess, of_words], axis=1)
        candidates = jnp.concatenate([candidates, x.shape[1] + columns], axis=1)
        excess, order = jax.lax.top_k(excess, min(excess.shape[1], fan_in + k))
        candidates = jnp.take_along_axis(candidates, order, axis=1)
    pairs = jnp.where((positives >= 0) & (positives < num_labels), positives, num_labels).reshape(-1)
    labels, first = jnp.unique(pairs, return_index=True, size=pairs.size, fill_value=num_labels)
    point = first // positives.shape[1]

    def rows(array):
        return array.at[labels].get(mode="clip")

    candidates, connected = candidates[point].astype(indices.dtype), rows(indices)
    fresh = (excess[point] > 0) & ~(candidates[:, :, None] == connected[:, None, :]).any(axis=2)
    order = jnp.argsort(~fresh, axis=1, stable=True)[:, :k]
    _, weakest = jax.lax.top_k(-jnp.abs(rows(kernel).astype(jnp.float32)), order.shape[1])
    # Padding, and connections without a new input to move to, get an index out of range, which is dropped.
    moving = jnp.where(jnp.take_along_axis(fresh, order, axis=1), labels[:, None], num_labels)

    def put(array, values):
        return array.at[moving, weakest].set(values, mode="drop")

    moved = put(jnp.zeros(kernel.shape, bool), True)

    def clear(array):
        # On the CPU, XLA scatters into a bfloat16 array via a float32 copy of the whole array.
        return jnp.where(moved, 0, array).astype(array.dtype) if array.itemsize == 2 else put(array, 0)

    indices = put(indices, jnp.take_along_axis(candidates, order, axis=1))
    return clear(kernel), indices, moved, tuple(clear(m) for m in moments)


def _best_words(words: SparseInputs, batch: int, count: int) -> tuple[Array, Array]:
    """Find the words of each point that exceed their means over the batch by most.

    Args:
      words: the bags of words of the batch.
      batch: B, the number of points.
      count: number of words to find for each point.

    Returns:
      The differences from the means, float32 [B, count], -inf where a point has no more words; and the
      columns of the words, [B, count].
    """
    rows, columns = jnp.asarray(words.rows), jnp.asarray(words.columns)
    values = jnp.asarray(words.values).astype(jnp.float32)
    inside = (rows >= 0) & (rows < batch)
    means = jnp.zeros(words.num_columns, jnp.float32).at[columns].add(jnp.where(inside, values, 0)) / batch
    excess = values - means[columns]
    rows, negative, columns = jax.lax.sort((jnp.where(inside, rows, batch), -excess, columns), num_keys=2)
    points = jnp.arange(batch, dtype=jnp.int32)
    starts = jnp.searchsorted(rows, points)
    at = starts[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    own = rows.at[at].get(mode="fill", fill_value=batch) == points[:, None]
    return jnp.where(own, -negative.at[at].get(mode="clip"), -jnp.inf), columns.at[at].get(mode="clip")


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


def reset_moments(tx: optax.GradientTransformation, opt_state, params, is_kernel, moved: Array):
    """Set the optimizer state of moved connections to 0.

    The moments are found by the structure of the optimizer state, so any Optax chain works. Statistics whose
    shape differs from the kernel's, such as factored second moments, are not changed.

    Args:
      tx: the optimizer.
      opt_state: the state of the optimizer.
      params: the parameters with which the optimizer was initialized.
      is_kernel: function of the path of a parameter (as passed by `jax.tree_util.tree_map_with_path`), true
        for the rewired kernel.
      moved: bool, of the kernel's shape, true where a connection moved, as returned by the functions above.

    Returns:
      The new state of the optimizer.
    """
    nothing = jnp.zeros((), bool)
    masks = jax.tree_util.tree_map_with_path(lambda path, _: moved if is_kernel(path) else nothing, params)

    def is_masked(moment):  # optax.masked and optax.partition put this node in place of other parameters.
        return isinstance(moment, optax.MaskedNode)

    def reset(moment, mask):
        if is_masked(moment) or moment.shape != mask.shape:
            return moment
        return jnp.where(mask, 0, moment).astype(moment.dtype)

    return optax.tree_utils.tree_map_params(tx, reset, opt_state, masks, is_leaf=is_masked)


def rewire_layer(
    layer: FixedFanInLinear,
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    key: Array,
    config: RewireConfig = RewireConfig(),
    *,
    x: ArrayLike | None = None,
    positives: ArrayLike | None = None,
    sparse: SparseInputs | None = None,
) -> Array:
    """Rewire a layer of a model that an `nnx.Optimizer` trains with any Optax chain.

    Updates the kernel and the indices of the layer, and sets the optimizer state of the moved connections to
    0: moments, and gradients accumulated by `optax.MultiSteps`. No array is donated: references held
    elsewhere stay valid, and both old and new arrays exist for a moment. The function also works within
    `nnx.jit`.

    Args:
      layer: the layer to rewire.
      model: the model of the optimizer, which contains the layer at any depth, or is the layer.
      optimizer: the optimizer of the model.
      key: random key; use a new one in each call.
      config: which connections move: as in `rewire` for `growth="random"`, as in `rewire_active` for
        "active".
      x: [B, D], float, the input of the layer for a batch. `x`, `positives` and `sparse` are for
        growth="active" only.
      positives: int32 [B, P], the labels of each point of the batch, padded with -1.
      sparse: the sparse inputs of the layer for the batch, or None.

    Returns:
      bool [L, F], true where a connection moved.

    Raises:
      TypeError: the layer is not a `FixedFanInLinear`.
      ValueError: the layer is not in the model; the optimizer is for another model; x and positives are
        missing for growth="active" or given for growth="random"; or x and the layer differ in width.

    Examples:
      >>> import jax, optax
      >>> from flax import nnx
      >>> from sparse_xmc import FixedFanInLinear, rewire_layer
      >>> rngs = nnx.Rngs(0)
      >>> output = FixedFanInLinear(64, 200, fan_in=8, rngs=rngs)
      >>> model = nnx.Sequential(nnx.Linear(16, 64, rngs=rngs), nnx.relu, output)
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> for step in range(1, 1001):
      ...     # train_step(model, optimizer, ...)
      ...     if step % 1000 == 0:
      ...         moved = rewire_layer(output, model, optimizer, jax.random.key(step))
      >>> int(moved.sum())
      159
    """
    if not isinstance(layer, FixedFanInLinear):
        raise TypeError(f"layer must be a FixedFanInLinear, got {type(layer).__name__}")
    names = [path_name((*path, "kernel")) for path, node in nnx.iter_graph(model) if node is layer]
    if not names:
        raise ValueError(
            f"the layer, a {type(layer).__name__}, is not in the model, a {type(model).__name__}"
        )
    old = layer.kernel[...], layer.indices[...]
    if config.growth == "random":
        if not (x is None and positives is None and sparse is None):
            raise ValueError("x, positives and sparse are for growth='active', got them for growth='random'")
        kernel, indices, moved, _ = _rewired(key, *old, layer.in_features, config)
    else:
        if x is None or positives is None:
            raise ValueError("growth='active' needs x and positives")
        x, columns = jnp.asarray(x), 0 if sparse is None else sparse.num_columns
        check_features(layer, x, layer.in_features - columns, ndim=2)
        kernel, indices, moved, _ = _rewired_active(*old, x, jnp.asarray(positives), config, (), sparse)
    state, params = _values(optimizer.opt_state), _values(nnx.state(model, optimizer.wrt))
    try:
        moments = reset_moments(
            optimizer.tx, state, params, lambda path: path_name(key_path_names(path)) == names[0], moved
        )
    except ValueError as error:  # raised by JAX for trees of different structure
        raise ValueError(f"the optimizer is not that of the model, a {type(model).__name__}") from error
    layer.kernel.set_value(kernel)
    layer.indices.set_value(indices)
    jax.tree.map(
        lambda variable, value: variable.set_value(value), optimizer.opt_state, moments, is_leaf=_is_variable
    )
    return moved


# Compiled without donation: the outermost `jit` decides which arguments are donated.
_rewired = jax.jit(rewire, static_argnames=("in_features", "config"))
_rewired_active = jax.jit(rewire_active, static_argnames="config")


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _values(tree):
    """Replace the NNX variables of a pytree, of any type, by their arrays."""
    return jax.tree.map(lambda variable: variable.get_value(), tree, is_leaf=_is_variable)
