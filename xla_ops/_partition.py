"""Partitioning of handler calls when `jax.jit` shards arrays over devices.

XLA cannot partition a custom call by itself: it would gather all operands on every device. Each call here
defines along which dimensions it can be partitioned (batch, labels, and axes mapped by `jax.vmap`), and
raises an error for all other dimensions.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning


class _Dims(NamedTuple):
    """The dimensions of a handler's arrays as letters; B (batch) and L (labels) can be sharded.

    Results without the dimension L are summed over shards of labels, and results without the dimension B over
    shards of the batch.
    """

    operands: dict[str, str]
    results: tuple[str, ...]
    is_mean: bool = False  # The result is a mean over the batch: sums over shards are divided by their count.


_INPUTS = {"x": "BD", "sparse.rows": "N", "sparse.columns": "N", "sparse.values": "N"}
_LAYER = _INPUTS | {"kernel": "LF", "indices": "LF"}
_LOSS = _LAYER | {"bias": "L", "positives": "BP"}
_TOP_K = "xla_ops.fan_in_top_k"
_HANDLERS = {
    "xla_ops.fan_in_matmul.forward": _Dims(_LAYER | {"bias": "L"}, ("BL",)),
    "xla_ops.fan_in_matmul.gradients": _Dims(_LAYER | {"dy": "BL"}, ("BD", "LF", "L")),
    "xla_ops.fan_in_loss.value": _Dims(_LOSS, ("",), is_mean=True),
    "xla_ops.fan_in_loss.gradients": _Dims(_LOSS, ("", "BD", "LF", "L"), is_mean=True),
    _TOP_K: _Dims(_LAYER | {"bias": "L"}, ("BK", "BK")),
}
_OP_NAMES = {  # for errors: the public name of an op, where it is not the handler's name up to the last dot
    "xla_ops.fan_in_step.adam": "fan_in_adam_step",
    "xla_ops.fan_in_step.sgd": "fan_in_sgd_step",
    "xla_ops.dense_step.adam": "dense_adam_step",
    "xla_ops.kth_smallest": "kth_smallest_magnitude",
}

# A function from shapes of results to the call with these results.
Call = Callable[[Sequence[jax.ShapeDtypeStruct]], Callable[..., tuple[Array, ...]]]
_Axes = tuple[str, ...]


def partitioned(
    handler: str,
    results: Sequence[jax.ShapeDtypeStruct],
    call: Call,
    *operands: Array,
    mapped: tuple[tuple[bool, ...], ...] = (),
) -> tuple[Array, ...]:
    """Compute `call(results)(*operands)`, partitioned according to the shardings of the operands.

    Args:
      handler: name of the handler.
      results: shapes of the results.
      call: function from shapes of results to the call; `jax.vmap` of the call is a loop.
      operands: the operands in the order of `_HANDLERS`.
      mapped: for each enclosing `jax.vmap`, the outermost first, which operands are mapped.

    Raises:
      ValueError: operands are sharded in any other way, or the handler cannot be partitioned. The error is
        raised when XLA compiles the program, and becomes a `JaxRuntimeError`; for mesh axes of type Explicit
        it is raised immediately.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_manual:  # within `jax.shard_map`
        return _without_derivatives(handler, _vmap(call(results), mapped))(*operands)
    layout = _CallLayout(handler, operands, results, mapped)
    if mesh.explicit_axes:
        axes = layout.mesh_axes([jax.typeof(a) for a in operands], is_explicit=True)
        results = [
            jax.ShapeDtypeStruct(r.shape, r.dtype, sharding=jax.NamedSharding(mesh, _spec(axes, dims)))
            for r, dims in zip(results, layout.call_dims, strict=True)
        ]

    def shardings(mesh, axes, arrays):
        return tuple(jax.NamedSharding(mesh, _spec(axes, dims)) for dims in arrays)

    def partition(mesh, operands, wanted):
        axes = layout.mesh_axes(operands, wanted)
        on_device = _with_empty_mesh(_vmap(functools.partial(_call_on_device, layout, call, axes), mapped))
        return mesh, on_device, *(shardings(mesh, axes, d) for d in (layout.result_dims, layout.operand_dims))

    def infer(mesh, operands, _):  # used if Shardy is disabled
        try:
            axes = layout.mesh_axes(operands)
        except ValueError:
            axes = {}  # An error here would end the process; `partition` raises it instead.
        return shardings(mesh, axes, layout.result_dims)

    function = custom_partitioning(_vmap(call(results), mapped))
    function.def_partition(partition, infer, sharding_rule=layout.rule())

    # custom_partitioning has no batching rule, and a loop over it would gather the mapped axes.
    batched = jax.custom_batching.custom_vmap(_without_derivatives(handler, function))

    @batched.def_vmap
    def _(axis_size, in_batched, *operands):
        outer = (tuple(in_batched), *mapped)
        return partitioned(handler, layout.results, call, *operands, mapped=outer), (True,) * len(results)

    return batched(*operands)


def _without_derivatives(handler, function):
    """Return the function with an error for derivatives beyond those that the op defines."""
    call = jax.custom_jvp(lambda *operands: function(*operands))

    @call.defjvp
    def _(primals, tangents):
        op, _, handler_of_op = handler.removeprefix("xla_ops.").partition(".")
        # By convention, differentiable ops, and only these, have handlers with these names.
        if handler_of_op in ("forward", "value", "gradients"):
            raise ValueError(
                f"xla_ops.{op} has first derivatives alone, by jax.grad or jax.vjp: "
                "no second derivatives, no jax.jvp, no jax.hessian"
            )
        raise ValueError(f"xla_ops.{_OP_NAMES.get(handler, op)} has no derivatives")

    return call


def _with_empty_mesh(function):
    """Return the function of one device, traced under an empty abstract mesh.

    jax 0.10 always traces it so. jax 0.12 traces it under the caller's mesh; there, axes of type Explicit
    would give the shards of one device the sharding types of whole arrays.
    """

    def traced(*operands):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return function(*operands)

    return traced


def _vmap(function, mapped):
    for in_batched in reversed(mapped):
        function = jax.vmap(function, in_axes=tuple(0 if batched else None for batched in in_batched))
    return function


def _spec(axes: dict[str, _Axes], dims: str) -> jax.P:
    return jax.P(*(axes.get(letter) or None for letter in dims))


class _CallLayout:
    """The dimensions of the arrays of a call, and how they can be sharded.

    Attributes:
      names: names of the operands, for errors.
      results: shapes of the results of a call that is not mapped.
      call_dims: a letter for each dimension of these results.
      operand_dims, result_dims: a letter for each dimension of each array: B, L, a digit for a mapped axis,
        and other letters for dimensions that cannot be sharded.
      kernel_dims: the letters of the kernel.
      shardable: letters of the dimensions that can be sharded, those of the kernel first.
    """

    def __init__(self, handler, operands, results, mapped):
        self.handler, self.results = handler, results
        dims_of_handler = _HANDLERS.get(handler)
        self.is_mean = dims_of_handler is not None and dims_of_handler.is_mean
        if dims_of_handler is None:
            ranks = [a.ndim - sum(in_batched[i] for in_batched in mapped) for i, a in enumerate(operands)]
            named = {f"operand {i}": "-" * rank for i, rank in enumerate(ranks)}
            self.call_dims = ["-" * len(r.shape) for r in results]
        else:
            named = dims_of_handler.operands
            self.call_dims = [
                _letters(r.shape, d) for r, d in zip(results, dims_of_handler.results, strict=True)
            ]
        self.names = list(named)
        digits = [str(level) for level in range(len(mapped))]
        self.operand_dims = [
            _letters(
                a.shape,
                "".join(digit for digit, in_batched in zip(digits, mapped, strict=True) if in_batched[i])
                + dims,
            )
            for i, (a, dims) in enumerate(zip(operands, named.values(), strict=True))
        ]
        self.result_dims = ["".join(digits) + dims for dims in self.call_dims]
        self.kernel_dims = dict(zip(self.names, self.operand_dims, strict=True)).get("kernel", "")
        shardable = ["L", "B"] * (dims_of_handler is not None) + digits
        self.shardable = sorted(shardable, key=lambda letter: letter not in self.kernel_dims)

    def rule(self) -> str:
        """Return the rule for Shardy: dimensions in `shardable` are sharded equally in all arrays."""
        number = itertools.count()

        def factors(dims):
            # All other dimensions get factors of their own. With a common factor, Shardy would propagate a
            # sharding that is an error, or the sharding of a result, to other arrays.
            return " ".join(f"shard{d}" if d in self.shardable else f"fixed{next(number)}" for d in dims)

        return " -> ".join(", ".join(map(factors, dims)) for dims in (self.operand_dims, self.result_dims))

    def mesh_axes(
        self, operands: Sequence[Any], wanted: Sequence[Any] = (), *, is_explicit: bool = False
    ) -> dict[str, _Axes]:
        """Return the mesh axes of each letter, from the shardings of operands and of wanted results.

        If the batch and the layer are sharded along the same mesh axis, the batch is gathered (its axes are
        left out of the result, and XLA gathers it); with explicit sharding this is an error.
        """
        found: dict[str, list[_Axes]] = {letter: [] for letter in self.shardable}
        for name, array, dims in zip(self.names, operands, self.operand_dims, strict=True):
            for i, letter in enumerate(dims):
                axes = self._axes_of_dim(array, i, name)
                if letter in found:
                    found[letter].append(axes)
                elif axes:
                    raise self._error(f"{name} {list(array.shape)} is sharded along dimension {i}")
        chosen: dict[str, _Axes] = {}
        for letter, choices in found.items():
            used = sum(chosen.values(), ())
            if letter not in self.kernel_dims and not is_explicit:
                choices = [_without(axes, used) for axes in choices]
            chosen[letter] = self._common_axes(letter, choices, is_explicit)
            if set(chosen[letter]) & set(used):
                raise self._error(f"{_describe(letter)} is sharded along a mesh axis of another dimension")
            if is_explicit and letter.isdigit() and chosen[letter]:
                raise self._error(f"{_describe(letter)} is sharded along an axis of type Explicit")
        # If operands are replicated, each device computes its shard of the wanted results.
        for array, dims in zip(wanted, self.result_dims if wanted else (), strict=True):
            for i, letter in enumerate(dims):
                if letter in chosen and not chosen[letter]:
                    chosen[letter] = _without(self._axes_of_dim(array, i), sum(chosen.values(), ()))
        return chosen

    def _common_axes(self, letter: str, choices: list[_Axes], is_explicit: bool) -> _Axes:
        """Return the longest of the choices.

        Operands sharded over a prefix of the longest choice are sharded further; anything else is an error.
        """
        longest = max(choices, key=len, default=())
        for axes in choices:
            if longest[: len(axes)] != axes or (is_explicit and axes != longest):
                raise self._error(
                    f"{_describe(letter)} is sharded over {longest} in one operand, {axes} in another"
                )
        return longest

    def _axes_of_dim(self, array: Any, dim: int, operand: str | None = None) -> _Axes:
        """Return the mesh axes of a dimension of an array; () for a result with uneven shards."""
        sharding = array.sharding
        axes: _Axes = ()
        if isinstance(sharding, jax.NamedSharding):
            entry = (*sharding.spec, *[None] * len(array.shape))[dim] or ()
            entry = entry if isinstance(entry, tuple) else (entry,)
            axes = tuple(axis for axis in entry if sharding.mesh.shape[axis] > 1)
            if array.shape[dim] % math.prod(sharding.mesh.shape[axis] for axis in axes) == 0:
                return axes
        elif sharding is None or sharding.is_fully_replicated:
            return ()
        if operand is None:
            return ()
        how = f"over {axes} in shards of unequal size" if axes else "without a NamedSharding"
        raise self._error(f"{operand} {list(array.shape)} is sharded {how}")

    def _error(self, problem: str) -> ValueError:
        op = _OP_NAMES.get(self.handler, self.handler.split(".")[1])
        along = "Under plain jax.jit, batch and labels can be sharded, equally in all operands. "
        return ValueError(
            f"xla_ops.{op} cannot be partitioned: {problem}. {along * (self.handler in _HANDLERS)}"
            "Use jax.shard_map, or replicate the operand (jax.lax.with_sharding_constraint)."
        )


def _letters(shape: Sequence[int], dims: str) -> str:
    """Return `dims` with "-" for dimensions of size 0, such as that of a missing bias."""
    return "".join("-" if size == 0 else letter for size, letter in zip(shape, dims, strict=True))


def _describe(letter: str) -> str:
    """Return the description of a dimension, for errors."""
    return {"B": "the batch", "L": "the dimension of labels"}.get(letter, "a dimension mapped by jax.vmap")


def _without(axes: _Axes, others: _Axes) -> _Axes:
    return tuple(axis for axis in axes if axis not in others)


def _call_on_device(
    layout: _CallLayout, call: Call, axes: dict[str, _Axes], *operands: Array
) -> tuple[Array, ...]:
    """Compute the results of one device from its shards of the operands; sum over devices where needed."""
    num_shards = {letter: math.prod(map(jax.lax.axis_size, axes.get(letter, ()))) for letter in "BL"}
    local = dict(zip(layout.names, operands, strict=True))
    for name, letter, sized_by in (("positives", "L", "kernel"), ("sparse.rows", "B", "x")):
        if name in local and num_shards[letter] > 1:  # out of range in other shards, so ignored
            first = jax.lax.axis_index(axes[letter]) * local[sized_by].shape[0]
            local[name] = local[name] - first.astype(jnp.int32)
    results = [
        jax.ShapeDtypeStruct(
            [size // num_shards.get(letter, 1) for size, letter in zip(r.shape, dims, strict=True)], r.dtype
        )
        for r, dims in zip(layout.results, layout.call_dims, strict=True)
    ]
    if layout.handler == _TOP_K and num_shards["L"] > 1:
        return _top_k(results, call, axes["L"], local)

    def reduce(result, dims):
        missing = [axis for letter in "BL" if letter not in dims for axis in axes.get(letter, ())]
        result = jax.lax.psum(result, tuple(missing)) if missing and result.size else result
        return result / num_shards["B"] if layout.is_mean and num_shards["B"] > 1 else result

    return tuple(map(reduce, call(results)(*local.values()), layout.call_dims))


def _top_k(
    results: Sequence[jax.ShapeDtypeStruct], call: Call, label_axes: _Axes, local: dict[str, Array]
) -> tuple[Array, ...]:
    """Merge the best labels of all shards of the labels."""
    labels, (batch, k) = local["kernel"].shape[0], results[0].shape
    shapes = [jax.ShapeDtypeStruct((batch, min(k, labels)), r.dtype) for r in results]
    scores, best = call(shapes)(*local.values())
    first = (jax.lax.axis_index(label_axes) * labels).astype(jnp.int32)
    best = jnp.where(best < 0, best, best + first)
    # Shards are in the order of the devices, so that of equal scores the lower label still comes first.
    scores, best = (jax.lax.all_gather(a, label_axes, axis=1, tiled=True) for a in (scores, best))
    _, order = jax.lax.top_k(jnp.where(scores == 0, 0, scores), k)  # XLA orders -0 below 0.
    return tuple(jnp.take_along_axis(a, order, axis=1) for a in (scores, best))
