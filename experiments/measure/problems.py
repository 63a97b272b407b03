"""Ops of `xla_ops` and other JAX implementations of them, which `experiments.measure.ops` times.

To add an op, write a function like `fan_in_matmul` below and list it in OPS.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import sparse
from jax.typing import DTypeLike
from scipy import stats

import xla_ops
from sparse_xmc.losses import squared_hinge

_LABELS_AT_ONCE = 128


class Shape(NamedTuple):
    """The sizes of a problem."""

    labels: int
    inputs: int
    fan_in: int
    batch: int
    density: float = 1.0  # density of the gradient of the logits, for fan_in_loss


class Contender(NamedTuple):
    """An implementation of an op: `function(*values, *constants)`."""

    function: Callable
    constants: tuple


class Problem(NamedTuple):
    """A problem: differentiable arrays, a cotangent of the result, and the contenders, ours first.

    Without a cotangent, the result is a loss and the cotangent is 1, as in training.
    """

    values: tuple
    cotangent: Array | None
    contenders: dict[str, Contender]


# ---- fan_in_matmul: contenders take x [B, D], kernel [L, F], bias [L] and return [B, L] ----


def fan_in_matmul(shape: Shape, dtype: DTypeLike, rng: np.random.Generator) -> Problem:
    """Make the problem for `xla_ops.fan_in_matmul`, with connections drawn uniformly."""
    labels, inputs, fan_in, batch, _ = shape

    def normal(*size):
        return jnp.asarray(rng.standard_normal(size, np.float32)).astype(dtype)

    indices = rng.integers(0, inputs, (labels, fan_in), np.int32)
    narrow, wide = jnp.asarray(indices.astype(xla_ops.index_dtype(inputs))), jnp.asarray(indices)
    flat, rows, row_ends, order, column_ends = _compressed(indices, inputs)
    return Problem(
        values=(normal(batch, inputs), normal(labels, fan_in), normal(labels)),
        cotangent=normal(batch, labels),
        contenders={
            "xla_ops.fan_in_matmul": Contender(_ours, (narrow,)),
            "gather + einsum": Contender(_gather, (wide,)),
            "scan over connections": Contender(_scan, (wide,)),
            f"map over {_LABELS_AT_ONCE} labels": Contender(_map, (wide,)),
            "BCOO": Contender(_bcoo, (jnp.stack([rows, flat], axis=1),)),
            "BCSR": Contender(_bcsr, (flat, row_ends)),
            "BCSR + own gradients": Contender(
                _bcsr_both_ways, (wide, flat, row_ends, order, rows[order], column_ends)
            ),
        },
    )


def _compressed(indices: np.ndarray, inputs: int) -> tuple[Array, ...]:
    """Return the connections as a matrix [labels, inputs] in compressed form.

    Returns:
      The input of each connection, its label, and the ends of the rows; then for the transposed matrix, the
      positions of its values in the kernel, and the ends of its rows.
    """
    labels, fan_in = indices.shape
    flat = indices.reshape(-1)
    rows = np.repeat(np.arange(labels, dtype=np.int32), fan_in)
    row_ends = np.arange(labels + 1, dtype=np.int32) * fan_in
    order = np.argsort(flat, kind="stable").astype(np.int32)
    column_ends = np.cumsum(np.bincount(flat + 1, minlength=inputs + 1), dtype=np.int32)
    return tuple(map(jnp.asarray, (flat, rows, row_ends, order, column_ends)))


def _ours(x, kernel, bias, indices):
    return xla_ops.fan_in_matmul(x, kernel, indices, bias)


def _rows_at(table, indices):
    return table.at[indices].get(mode="promise_in_bounds")


def _gather(x, kernel, bias, indices):
    y = jnp.einsum("lfb,lf->bl", _rows_at(x.T, indices), kernel, preferred_element_type=jnp.float32)
    return (y + bias[None].astype(jnp.float32)).astype(x.dtype)


def _scan(x, kernel, bias, indices):
    features = x.T

    def step(y, connection):
        weights, inputs = connection
        product = weights[:, None].astype(jnp.float32) * _rows_at(features, inputs).astype(jnp.float32)
        return y + product, None

    start = jnp.broadcast_to(bias[:, None], (bias.size, x.shape[0])).astype(jnp.float32)
    y, _ = jax.lax.scan(step, start, (kernel.T, indices.T))
    return y.T.astype(x.dtype)


def _map_labels(function, *arrays):
    """Apply `function` to blocks of labels, including the last ones, so that they stay in the cache."""
    whole = arrays[0].shape[0] // _LABELS_AT_ONCE * _LABELS_AT_ONCE
    blocks = [a[:whole].reshape(-1, _LABELS_AT_ONCE, *a.shape[1:]) for a in arrays]
    results = jax.lax.map(lambda block: function(*block), blocks)
    results = results.reshape(whole, *results.shape[2:])
    return jnp.concatenate([results, function(*(a[whole:] for a in arrays))])


def _map(x, kernel, bias, indices):
    features = x.T

    @jax.checkpoint  # Else the backward pass keeps all gathered inputs: B times the kernel.
    def block(weights, inputs, bias):
        products = _rows_at(features, inputs).astype(jnp.float32) * weights[..., None].astype(jnp.float32)
        return products.sum(axis=1) + bias[:, None].astype(jnp.float32)

    return _map_labels(block, kernel, indices, bias).T.astype(x.dtype)


def _bcoo(x, kernel, bias, coordinates):
    matrix = sparse.BCOO((kernel.reshape(-1), coordinates), shape=(kernel.shape[0], x.shape[1]))
    return (matrix @ x.T).T + bias[None]


def _bcsr(x, kernel, bias, flat, row_ends):
    matrix = sparse.BCSR((kernel.reshape(-1), flat, row_ends), shape=(kernel.shape[0], x.shape[1]))
    return (matrix @ x.T).T + bias[None]


@jax.custom_vjp
def _bcsr_both_ways(x, kernel, bias, indices, flat, row_ends, order, sorted_rows, column_ends):
    return _bcsr(x, kernel, bias, flat, row_ends)


def _bcsr_both_ways_fwd(x, kernel, bias, indices, flat, row_ends, *transposed):
    return _bcsr(x, kernel, bias, flat, row_ends), (x, kernel, indices, transposed)


def _bcsr_both_ways_bwd(residuals, dy):
    # JAX has a fast product with a BCSR matrix, but differentiates by BCOO. This uses the parts of both.
    x, kernel, indices, (order, sorted_rows, column_ends) = residuals
    features = x.T
    values = _rows_at(kernel.reshape(-1), order)
    d_x = sparse.BCSR((values, sorted_rows, column_ends), shape=(x.shape[1], kernel.shape[0])) @ dy.T

    def block(inputs, d_rows):
        products = _rows_at(features, inputs).astype(jnp.float32) * d_rows[:, None].astype(jnp.float32)
        return products.sum(axis=-1).astype(x.dtype)

    return d_x.T, _map_labels(block, indices, dy.T), dy.sum(axis=0), *[None] * 6


_bcsr_both_ways.defvjp(_bcsr_both_ways_fwd, _bcsr_both_ways_bwd)


# ---- fan_in_loss: contenders take x [B, D], kernel [L, F], bias [L] and return the squared hinge loss ----


def fan_in_loss(shape: Shape, dtype: DTypeLike, rng: np.random.Generator) -> Problem:
    """Make the problem for `xla_ops.fan_in_loss`, with normal logits whose mean sets the density."""
    labels, inputs, fan_in, batch, density = shape

    def normal(*size, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(size, np.float32)).astype(dtype)

    # A negative with logit s has a gradient if s > -1.
    bias = jnp.full(labels, -1 + stats.norm.ppf(np.clip(density, 1e-6, 0.999)), dtype)
    indices = rng.integers(0, inputs, (labels, fan_in), np.int32).astype(xla_ops.index_dtype(inputs))
    positives = rng.integers(0, labels, (batch, 8), np.int32)
    positives = np.where(np.triu(positives[:, :, None] == positives[:, None], 1).any(axis=1), -1, positives)
    constants = (jnp.asarray(indices), jnp.asarray(positives))
    return Problem(
        values=(normal(batch, inputs), normal(labels, fan_in, scale=fan_in**-0.5), bias),
        cotangent=None,
        contenders={
            "xla_ops.fan_in_loss": Contender(_fused_loss, constants),
            "fan_in_matmul + jnp loss": Contender(_loss_of_logits, constants),
        },
    )


def _fused_loss(x, kernel, bias, indices, positives):
    return xla_ops.fan_in_loss(x, kernel, indices, bias, positives)


def _loss_of_logits(x, kernel, bias, indices, positives):
    return squared_hinge(xla_ops.fan_in_matmul(x, kernel, indices, bias).astype(jnp.float32), positives)


OPS = {"fan_in_matmul": fan_in_matmul, "fan_in_loss": fan_in_loss}
