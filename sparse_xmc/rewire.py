"""Rewiring: moving the weakest connections of a sparse layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_xmc.connectivity import draw_coordinates, redraw

_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class RewireConfig:
    """How a layer is rewired.

    The defaults are this project's; `PAPER` has the published choices.

    Attributes:
      fraction: the part of all connections of the layer that a rewiring moves.
      distinct: never give a label the same input twice.
      zero_weights: a moved connection starts at weight 0; if false it keeps the old input's weight.
    """

    fraction: float = 0.1
    distinct: bool = True
    zero_weights: bool = True

    def __post_init__(self):
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be between 0 and 1, got {self.fraction}")


PAPER = RewireConfig(fraction=0.1, distinct=False, zero_weights=False)


def kth_smallest_magnitude(x: Array, k: Array) -> Array:
    """The k-th smallest |x| (k = 1 is the smallest), exactly, without sorting and without temporaries.

    Bisects on the bit pattern, whose order is that of the magnitudes: 31 counting passes over x.

    Args:
      x: float array of any shape, without NaN.
      k: integer scalar in 1..x.size.

    Returns:
      float32 scalar.
    """

    def bits(values):
        return jax.lax.bitcast_convert_type(jnp.abs(values.astype(jnp.float32)), jnp.uint32)

    def halve(_, bounds):  # the answer's bits are in low..high
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(bits(x) <= middle, dtype=jnp.int32) >= k
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = jnp.uint32(0), jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, bounds)[0], jnp.float32)


@functools.partial(jax.jit, static_argnames=("in_features", "config"), donate_argnums=(1, 2))
def rewire(
    key: Array, kernel: Array, indices: Array, in_features: int, config: RewireConfig = RewireConfig()
) -> tuple[Array, Array, Array]:
    """Moves the connections with the smallest weights to new inputs, drawn uniformly.

    The threshold is the k-th smallest magnitude of the whole layer, k = round(fraction * L * F); the
    connections strictly below it move. So at most k - 1 move, and none where k weights are 0.

    `kernel` and `indices` are donated. Zero the optimizer's moments with `reset_moments`.

    Args:
      key: a random key.
      kernel: [L, F], float.
      indices: [L, F], integer.
      in_features: D.
      config: what moves, and how it starts.

    Returns:
      The new kernel [L, F], the new indices [L, F], and bool [L, F], true where a connection moved.

    Reference: Schultheis & Babbar, ECML-PKDD 2023, section 4; Mocanu et al., Nature Communications 9, 2018.
    """
    k = round(config.fraction * kernel.size)
    if k == 0:
        return kernel, indices, jnp.zeros(kernel.shape, bool)
    moved = _weakest(kernel, k)
    labels = kernel.shape[0]
    rows = min(labels, _ROWS_AT_ONCE)

    def block(i, indices):
        # The last block is shifted back to fit; what the one before it moved must not move twice.
        start = jnp.minimum(i * rows, labels - rows)
        fresh = (start + jnp.arange(rows) >= i * rows)[:, None]
        old, mask = (jax.lax.dynamic_slice_in_dim(a, start, rows) for a in (indices, moved))
        new = redraw(jax.random.fold_in(key, i), old, mask & fresh, in_features, distinct=config.distinct)
        return jax.lax.dynamic_update_slice_in_dim(indices, new, start, axis=0)

    indices = jax.lax.fori_loop(0, -(-labels // rows), block, indices)
    if config.zero_weights:
        kernel = jnp.where(moved, 0, kernel).astype(kernel.dtype)
    return kernel, indices, moved


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
    moved = _weakest(kernel, k)
    indices = jnp.where(moved[:, None], draw_coordinates(key, kernel.size, labels, in_features), indices)
    if config.zero_weights:
        kernel = jnp.where(moved, 0, kernel).astype(kernel.dtype)
    return kernel, indices, moved


def _weakest(kernel: Array, k: int) -> Array:
    """Where the magnitude is strictly below the k-th smallest."""
    return jnp.abs(kernel.astype(jnp.float32)) < kth_smallest_magnitude(kernel, k)


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
      moved: bool, of the kernel's shape, from `rewire` or `rewire_unstructured`.

    Returns:
      The new state.
    """
    nothing = jnp.zeros((), bool)
    masks = jax.tree_util.tree_map_with_path(lambda path, _: moved if is_kernel(path) else nothing, params)

    def reset(moment, mask):
        return jnp.where(mask, 0, moment).astype(moment.dtype) if moment.shape == mask.shape else moment

    return optax.tree_utils.tree_map_params(tx, reset, opt_state, masks)
