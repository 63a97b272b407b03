"""Rewiring of a layer that an Optax chain trains: the connections move, and their moments are reset."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from sparse_xmc.heads.rewiring import RewireConfig, rewire, rewire_active
from sparse_xmc.layers import FixedFanInLinear
from sparse_xmc.modules import check_features, key_path_names, path_name
from xla_ops import SparseInputs


def reset_moments(
    tx: optax.GradientTransformation,
    opt_state: Any,
    params: Any,
    is_kernel: Callable[[tuple[Any, ...]], bool],
    moved: Array,
) -> Any:
    """Set the optimizer state of moved connections to 0.

    The moments are found by the structure of the optimizer state, so any Optax chain works. Statistics whose
    shape differs from the kernel's, such as factored second moments, are not changed.

    Args:
      tx: the optimizer.
      opt_state: the state of the optimizer.
      params: the parameters with which the optimizer was initialized.
      is_kernel: function of the path of a parameter (as passed by `jax.tree_util.tree_map_with_path`), true
        for the rewired kernel.
      moved: bool, of the kernel's shape, true where a connection moved, as returned by `rewire`.

    Returns:
      The new state of the optimizer.
    """
    nothing = jnp.zeros((), bool)
    masks = jax.tree_util.tree_map_with_path(lambda path, _: moved if is_kernel(path) else nothing, params)

    # optax.masked and optax.partition put a MaskedNode in place of parameters that they leave out.
    def is_masked(moment: Any) -> bool:
        return isinstance(moment, optax.MaskedNode)

    def reset(moment: Any, mask: Array) -> Any:
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
      ValueError: the layer is not in the model; the optimizer was made for another model; x and positives are
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
    # `nnx.iter_graph` and `nnx.state` both have a layer that is shared once, under its first path.
    name = next((path_name((*path, "kernel")) for path, node in nnx.iter_graph(model) if node is layer), None)
    if name is None:
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
            optimizer.tx, state, params, lambda path: path_name(key_path_names(path)) == name, moved
        )
    except ValueError as error:  # raised by JAX for trees of different structure
        raise ValueError(
            "the optimizer was made for another model: its state does not match the parameters of the model, "
            f"a {type(model).__name__}"
        ) from error
    layer.kernel.set_value(kernel)
    layer.indices.set_value(indices)
    jax.tree.map(
        lambda variable, value: variable.set_value(value), optimizer.opt_state, moments, is_leaf=_is_variable
    )
    return moved


# `rewire` and `rewire_active` donate arguments only if they are the outermost `jit`. Within these functions
# they are not, so that the arrays of the caller stay valid.
_rewired = jax.jit(rewire, static_argnames=("in_features", "config"))
_rewired_active = jax.jit(rewire_active, static_argnames="config")


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _values(tree: Any) -> Any:
    """Replace the NNX variables of a pytree, of any type, by their arrays."""
    return jax.tree.map(lambda variable: variable.get_value(), tree, is_leaf=_is_variable)
