"""The fixed fan-in matrix product, in which every output reads exactly F inputs."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from xla_ops import _native
from xla_ops._inputs import SparseInputs, all_inputs, check_layer, d_x_shape


def fan_in_matmul(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    sparse: SparseInputs | None = None,
) -> Array:
    """Multiply by a sparse matrix in which every output has exactly F inputs.

    `y[..., l] = bias[l] + sum_f kernel[l, f] * x[..., indices[l, f]]`

    Differentiable (reverse mode, once) in x, kernel and bias. An input that is repeated in a row of `indices`
    counts as often; an index outside [0, D + C), where C is the number of columns of `sparse` or 0,
    contributes nothing (for a finite weight) and gets no gradient. Sums are accumulated in float32, also for
    bfloat16. Results are bit-for-bit reproducible on the same machine with the same number of threads, except
    for the gradient with respect to x on a GPU, which is summed by atomic additions in varying order.

    Args:
      x: [..., D], float32 or bfloat16.
      kernel: [L, F], of x's dtype.
      indices: [L, F], uint16 (for D + C <= 65,536) or int32.
      bias: [L], of x's dtype, or None.
      sparse: C further inputs, numbered D to D + C - 1, of the points [...] in order; or None.

    Returns:
      [..., L], of x's dtype.

    Raises:
      TypeError, ValueError: an argument has a wrong dtype or shape; the message names it.

    Reference: Schultheis & Babbar, "Towards Memory-Efficient Training for Extremely Large Output Spaces",
    ECML-PKDD 2023, section 3.
    """
    x, entries, kernel, indices, bias, num_columns = check_layer(x, kernel, indices, bias, sparse)
    _native.register()
    examples = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = _matmul(num_columns, *_native.match_varying_axes(examples, *entries, kernel, indices, bias))
    return y.reshape(*x.shape[:-1], kernel.shape[0])


def fan_in_matmul_reference(
    x: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    sparse: SparseInputs | None = None,
) -> Array:
    """Compute `fan_in_matmul` with plain `jax.numpy`; slow, with [..., L, F] in memory. Same arguments."""
    x, _, kernel, indices, bias, _ = check_layer(x, kernel, indices, bias, sparse)
    return matmul_in_jnp(all_inputs(x, sparse), kernel, indices, bias)


def matmul_in_jnp(x: Array, kernel: Array, indices: Array, bias: Array) -> Array:
    """Compute `fan_in_matmul_reference` for arguments from `check_layer`, with all inputs in x."""
    indices = indices.astype(jnp.int32)
    valid = (indices >= 0) & (indices < x.shape[-1])
    inputs = jnp.take(x, jnp.where(valid, indices, 0), axis=-1)
    weights = jnp.where(valid, kernel, 0).astype(kernel.dtype)
    y = jnp.einsum("...lf,lf->...l", inputs, weights, preferred_element_type=jnp.float32)
    if bias.size:
        y = y + jnp.broadcast_to(bias, y.shape).astype(jnp.float32)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(num_columns, x, rows, columns, values, kernel, indices, bias):
    return _forward(num_columns)(x, rows, columns, values, kernel, indices, bias)


def _matmul_fwd(num_columns, *operands):
    # Whether d_x is needed must be static in the backward pass; the structure of a pytree, () or None, is.
    needs_d_x = () if operands[0].perturbed else None
    operands = tuple(operand.value for operand in operands)
    return _forward(num_columns)(*operands), (needs_d_x, operands)


def _matmul_bwd(num_columns, residuals, dy):
    needs_d_x, operands = residuals
    wants_d_x = needs_d_x is not None
    x, _, _, _, kernel, _, bias = operands
    results = (
        d_x_shape(x, wants_d_x),
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (kernel, bias)),
    )
    d_x, d_kernel, d_bias = _native.call(
        "xla_ops.fan_in_matmul.gradients", results, *operands[:-1], dy, num_columns=num_columns
    )
    return (d_x if wants_d_x else None), None, None, None, d_kernel, None, d_bias


_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


@functools.cache
def _forward(num_columns):
    """Return the forward pass; `jax.vmap` over the inputs alone makes it one call with a larger batch."""

    def call(x, *others):
        result = jax.ShapeDtypeStruct((x.shape[0], others[3].shape[0]), x.dtype)
        handler = "xla_ops.fan_in_matmul.forward"
        return _native.call(handler, [result], x, *others, num_columns=num_columns)[0]

    forward = jax.custom_batching.custom_vmap(call)

    @forward.def_vmap
    def _(axis_size, in_batched, x, rows, columns, values, *layer):
        all_inputs_mapped = all(in_batched[:4])
        if (all_inputs_mapped or (in_batched[0] and not rows.size)) and not any(in_batched[4:]):
            batch = x.shape[1]
            if all_inputs_mapped:
                offset = batch * jnp.arange(axis_size, dtype=jnp.int32)[:, None]
                rows = jnp.where((rows >= 0) & (rows < batch), rows + offset, -1)
            flat = (rows.reshape(-1), columns.reshape(-1), values.reshape(-1))
            y = forward(x.reshape(axis_size * batch, x.shape[2]), *flat, *layer)
            return y.reshape(axis_size, batch, y.shape[1]), True
        axes = [0 if b else None for b in in_batched]
        return jax.vmap(call, in_axes=axes)(x, rows, columns, values, *layer), True

    return forward
