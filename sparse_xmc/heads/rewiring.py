"""Rewiring: moving the weakest connections of a sparse layer, at random or to where they can help."""

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
    """How a layer is rewired.

    The defaults are this project's; `PAPER` has the published choices.

    Attributes:
      fraction: the part of the connections that a rewiring moves: of the whole layer's, or with `active`
        growth of those of each label in the batch; 0 for never.
      distinct: never give a label the same input twice.
      zero_weights: a moved connection starts at weight 0; if false it keeps the old input's weight.
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
    """Moves the connections with the smallest weights to new inputs, drawn uniformly.

    The threshold is the k-th smallest magnitude of the whole layer, k = round(fraction * L * F); the
    connections strictly below it move. So at most k - 1 move, and none where k weights are 0.

    `kernel`, `indices` and `moments` are donated. Nothing of the layer's size is made but the mask of what
    moves, a byte per connection: inputs are drawn for blocks of labels.

    Args:
      key: a random key.
      kernel: [L, F], float.
      indices: [L, F], integer.
      in_features: D.
      config: what moves, and how it starts.
      moments: arrays [L, F] to be zeroed where a connection moves: what an optimizer remembers of it. For the
        state of an Optax chain, see `reset_moments`.
      part: where these are the labels of one device among others; the result is that of the whole layer.

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
        # The weights of labels that fill up the last part are 0, the smallest.
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

    # The branches save work, and make XLA finish reading arrays before it writes any: else it copies them.
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
    """Moves the weakest connections of a batch's labels to inputs that are active in the label's point.

    Of each label in `positives`, round(fraction * F) connections move, at least one: those with the smallest
    weights, to the inputs that exceed their means over the batch by most in a point with that label (the
    first in the batch), other than those that the label reads already. They start at weight 0. The gradient
    of a positive's loss in a weight is proportional to its input, and what all points have in common says
    nothing about the label. Other labels stay as they are.

    `kernel`, `indices` and `moments` are donated; only the rows of the batch's labels are read and written.

    Args:
      kernel: [L, F], float.
      indices: [L, F], integer, inputs of 0..D-1.
      x: [B, D], float, the layer's input, without dropout.
      positives: int32 [B, P], the labels of each point, padded with -1.
      config: its `fraction` counts.
      moments: as for `rewire`.
      words: further inputs, D to D + V - 1, of which a point has each once; or None.

    Returns:
      The new kernel [L, F], the new indices [L, F], bool [L, F], true where a connection moved, and the
      new moments.

    Reference: growth by the gradient is that of Evci et al., ICML 2020, here from positives alone.
    """
    num_labels, fan_in = kernel.shape
    k = min(fan_in, max(1, round(config.fraction * fan_in)))
    x = x.astype(jnp.float32)
    # A label reads F of a point's best inputs at most, so that k more of them are enough.
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
    # Padding, and what finds no fresh input, is sent beyond the last label, and dropped.
    moving = jnp.where(jnp.take_along_axis(fresh, order, axis=1), labels[:, None], num_labels)

    def put(array, values):
        return array.at[moving, weakest].set(values, mode="drop")

    moved = put(jnp.zeros(kernel.shape, bool), True)

    def clear(array):
        # On CPU, XLA scatters into a bfloat16 array by way of a float32 copy of all of it.
        return jnp.where(moved, 0, array).astype(array.dtype) if array.itemsize == 2 else put(array, 0)

    indices = put(indices, jnp.take_along_axis(candidates, order, axis=1))
    return clear(kernel), indices, moved, tuple(clear(m) for m in moments)


def _best_words(words: SparseInputs, batch: int, count: int) -> tuple[Array, Array]:
    """The words of each point that exceed their means over the batch by most: by how much, and their columns.

    Both are [batch, count]; where a point has no more words, it is by -inf.
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
    """Moves the weakest connections of an `UnstructuredLinear` anywhere: both their label and their input.

    Which ones move is decided as in `rewire`. They are drawn uniformly, and may repeat others, whatever
    `config.distinct` says. `kernel` and `indices` are donated.

    Args:
      key: a random key.
      kernel: [N], float.
      indices: int32 [N, 2], labels and inputs.
      in_features: D.
      labels: L.
      config: what moves, and how it starts.

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
    """Zeroes what an optimizer remembers of the connections that moved.

    Finds the moments by the structure of the optimizer's state, so any Optax chain will do. Statistics of
    another shape than the kernel's (as factored second moments have) are left as they are.

    Args:
      tx: the optimizer.
      opt_state: its state.
      params: the parameters that it was initialised with.
      is_kernel: function of a parameter's path (as `jax.tree_util.tree_map_with_path` gives it), true for
        the kernel that was rewired.
      moved: bool, of the kernel's shape, as the functions above return it.

    Returns:
      The new state.
    """
    nothing = jnp.zeros((), bool)
    masks = jax.tree_util.tree_map_with_path(lambda path, _: moved if is_kernel(path) else nothing, params)

    def is_masked(moment):  # what optax.masked and optax.partition keep for the parameters of others
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
    """Moves the weakest connections of a layer in a model that an `nnx.Optimizer` trains, by any Optax chain.

    The layer's kernel and indices are updated, and what the optimizer remembers of the connections that moved
    is set to 0: moments, and gradients that `optax.MultiSteps` has added up. No array is donated: those that
    are held elsewhere stay, and for a moment there are two of each. Within `nnx.jit` it works too.

    Args:
      layer: the layer.
      model: the model that it is in, wherever, or the layer itself: that of the optimizer.
      optimizer: the optimizer.
      key: a random key, another one each time.
      config: what moves: with `growth="random"` as of `rewire`, with "active" as of `rewire_active`.
      x, positives, sparse: for growth="active" alone: what the layer reads of a batch, as it is called, x
        being [B, D], and the labels of its points, int32 [B, P], padded with -1.

    Returns:
      bool [L, F], true where a connection moved.

    Raises:
      TypeError: the layer is of another class.
      ValueError: the layer is not in the model, or the optimizer not that of the model; x and positives are
        missing, or there without need; or x is not as wide as the layer.

    Example:
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
    except ValueError as error:  # of JAX: trees of other structures
        raise ValueError(f"the optimizer is not that of the model, a {type(model).__name__}") from error
    layer.kernel.set_value(kernel)
    layer.indices.set_value(indices)
    jax.tree.map(
        lambda variable, value: variable.set_value(value), optimizer.opt_state, moments, is_leaf=_is_variable
    )
    return moved


# Without donation, which is that of the outermost `jit`.
_rewired = jax.jit(rewire, static_argnames=("in_features", "config"))
_rewired_active = jax.jit(rewire_active, static_argnames="config")


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _values(tree):
    """A tree with arrays in place of variables, of whatever types these are."""
    return jax.tree.map(lambda variable: variable.get_value(), tree, is_leaf=_is_variable)
