"""A head with its labels sharded over the devices of a mesh; each device holds one shard only.

All devices receive the features of the batch, and the gradients of the features are summed over devices: no
array that is sent between devices has a size proportional to the number of labels.

    mesh axes        labels are sharded over all axes of the mesh, such as "data" and "label"
    output layer     sharded by labels, with its moments; padding labels fill the last shards (`LabelShard`)
    penultimate      replicated; all devices take equal steps
    d_features       summed over devices, [B, I] behind a penultimate layer, else [B, E]
    top k            of each device, [B, k], gathered and merged
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_xmc.data.dataset import Dataset
from sparse_xmc.encoders.output import EncoderOutput
from sparse_xmc.heads.fixed_fan_in import FixedFanInHead
from sparse_xmc.heads.head import Head, HeadSpec, HeadTraining, StepInputs, StepResult, label_blocks
from sparse_xmc.heads.label_shard import PADDING_BIAS, LabelShard, merge_top_k
from sparse_xmc.heads.rewiring import RewireConfig
from sparse_xmc.heads.specs import moment_specs, state_specs
from sparse_xmc.modules import merge
from xla_ops import SparseInputs

_EVERYWHERE = PartitionSpec()


class ShardedHead(Head):
    """A `FixedFanInHead` with its labels sharded over a mesh. It trains and ranks as on one device.

    Its parameters have the same names as on one device, so checkpoints and saved models of either can be
    read by the other. The arrays are of the whole head, padded to a multiple of the number of devices.

    Args:
      graphdef: the structure of the `FixedFanInHead` of one device.
      state: the variables of the whole head.
      mesh: the mesh.
      in_features: E, the number of features.
      num_labels: L, the number of labels.
    """

    mesh: Mesh

    def __init__(
        self, graphdef: nnx.GraphDef, state: nnx.State, mesh: Mesh, in_features: int, num_labels: int
    ):
        local = nnx.merge(graphdef, state)
        self.in_features = in_features
        self.num_labels = num_labels
        self.mesh = mesh
        self.local = graphdef
        self.penultimate = local.penultimate
        self.output = local.output

    @classmethod
    def make(
        cls, make_shard: Callable[[LabelShard, nnx.Rngs], FixedFanInHead], spec: HeadSpec, rngs: nnx.Rngs
    ) -> "ShardedHead":
        """Make a sharded head with the same initial weights and connections as on one device.

        No device and no process ever holds more than its own shards.

        Args:
          make_shard: function that makes the head of one device, within `jax.shard_map`.
          spec: the sizes, with a mesh.
          rngs: random keys; the stream `params` is used.
        """
        mesh, num_labels = spec.mesh, spec.num_labels
        assert mesh is not None
        size = -(-num_labels // mesh.size)
        rngs_graphdef, keys = nnx.split(rngs)
        graphdefs = []  # the structure is static, so it leaves the traced function through this list

        def make_on_device(shard: LabelShard, key_data: nnx.State) -> tuple[nnx.State, nnx.State]:
            rngs = merge(rngs_graphdef, jax.tree.map(_as_key, key_data, keys))
            head = make_shard(shard, rngs)
            _reset_padding_labels(head)
            graphdef, state = nnx.split(head)
            graphdefs.append(graphdef)
            return state, jax.tree.map(_as_key_data, nnx.state(rngs))

        key_data = jax.tree.map(lambda key: np.asarray(_as_key_data(key)), keys)
        shapes, _ = jax.eval_shape(functools.partial(make_on_device, LabelShard.whole(size)), key_data)
        on_devices = jax.shard_map(
            functools.partial(make_on_device, LabelShard(num_labels, size, tuple(mesh.axis_names))),
            mesh=mesh,
            in_specs=_EVERYWHERE,
            out_specs=(state_specs(shapes, mesh), _EVERYWHERE),
        )
        state, key_data = jax.jit(on_devices)(key_data)
        nnx.update(rngs, jax.tree.map(lambda data, key: _as_key(np.asarray(data), key), key_data, keys))
        return cls(graphdefs[-1], state, mesh, spec.in_features, num_labels)

    def connect_direct_inputs(self, count: int, train: Dataset, key: Array) -> None:
        """Run `FixedFanInHead.connect_direct_inputs` on the shard of each device."""
        local = self._local(nnx.split(self)[1])
        kernel, indices = self.output.kernel[...], self.output.indices[...]
        kernel_shards, indices_shards = [], []
        for shard in kernel.addressable_shards:
            first = shard.index[0].start or 0
            last = min(first + shard.data.shape[0], self.num_labels)
            new_kernel, new_indices = np.array(shard.data), np.zeros(shard.data.shape, indices.dtype)
            if last > first:
                rows = slice(0, last - first)  # without padding labels
                new_kernel[rows], new_indices[rows] = local.connections_of(
                    slice(first, last), count, train, key, shard.data[rows]
                )
            kernel_shards.append(jax.device_put(new_kernel, shard.device))
            indices_shards.append(jax.device_put(new_indices, shard.device))
        join = functools.partial(jax.make_array_from_single_device_arrays, kernel.shape, kernel.sharding)
        self.output.kernel.set_value(join(kernel_shards))
        self.output.indices.set_value(join(indices_shards))

    # ---- on the devices ----

    def _local(self, state: nnx.State) -> FixedFanInHead:
        return merge(self.local, state)

    def _run(self, function: "_Function", *arguments: Any, changes: bool = False, **static: Any) -> Any:
        """Run a function on all devices, and return its results.

        Args:
          function: function of the head of a device, `arguments` and `static`; a key of `_RESULTS`.
          arguments: pytrees of arrays.
          changes: whether the function changes the head, and the changes are kept.
          static: hashable values, given to the function by name. It is compiled once for each of them.
        """
        call = _on_devices(self.local, self.mesh, function, changes, tuple(static.items()))
        results = call(nnx.split(self)[1], *arguments)
        if not changes:
            return results
        state, results = results
        nnx.update(self, state)
        return results

    def __call__(self, x: Array | EncoderOutput) -> Array:
        """Return the logits [B, L]. All of them are in memory at once: for tests and small L only."""
        return self._run(_logits, x)[:, : self.num_labels]

    def loss(self, x: Array | EncoderOutput, positives: Array, loss: str = "squared_hinge") -> Array:
        return self._run(_loss, x, positives, loss=loss)

    def top_k(self, x: Array | EncoderOutput, k: int) -> tuple[Array, Array]:
        if not 1 <= k <= self.num_labels:
            raise ValueError(f"k must be in 1..{self.num_labels}, got {k}")
        return self._run(_top_k, x, k=k)

    def logits_in_blocks(self, x: Array | EncoderOutput) -> Iterator[tuple[Array, Array]]:
        size = self.output.kernel.shape[0] // self.mesh.size
        firsts = range(0, size * self.mesh.size, size)
        inputs = self._run(_inputs, x)
        for block in label_blocks(size):
            rows = block.stop - block.start
            logits, labels = self._run(_logits_of_rows, inputs, np.int32(block.start), rows=rows)
            real = sum(min(rows, max(0, self.num_labels - first - block.start)) for first in firsts)
            yield logits[:, :real], labels[:real]

    # ---- training ----

    def init_moments(self, training: HeadTraining) -> optax.ScaleByAdamState:
        local = self._local(nnx.split(self)[1])
        shapes = jax.eval_shape(lambda: local.init_moments(training))
        specs = moment_specs(shapes, nnx.split(self)[1], self.mesh)

        def init() -> optax.ScaleByAdamState:
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

        shardings = jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)
        return jax.jit(init, out_shardings=shardings)()

    def step_fused(
        self, inputs: StepInputs, moments: optax.ScaleByAdamState, training: HeadTraining
    ) -> StepResult:
        return self._step("step_fused", inputs, moments, training)

    def step_by_optax(
        self, inputs: StepInputs, moments: optax.ScaleByAdamState, training: HeadTraining
    ) -> StepResult:
        return self._step("step_by_optax", inputs, moments, training)

    def _step(
        self, method: str, inputs: StepInputs, moments: optax.ScaleByAdamState, training: HeadTraining
    ) -> StepResult:
        arrays = inputs._replace(seed=jnp.asarray(inputs.seed, jnp.uint32), wants_d_x=False)
        static = {"method": method, "wants_d_x": inputs.wants_d_x, "training": training}
        return self._run(_step, arrays, moments, changes=True, **static)

    def check_rewiring(self, config: RewireConfig) -> None:
        self._local(nnx.split(self)[1]).check_rewiring(config)

    def rewire(
        self,
        x: Array | EncoderOutput,
        positives: Array,
        moments: optax.ScaleByAdamState,
        key: Array,
        config: RewireConfig,
    ) -> optax.ScaleByAdamState:
        return self._run(_rewire, x, positives, moments, key, changes=True, config=config)

    def reset_padding_labels(self) -> None:
        """Reset the weights and biases of the padding labels."""
        self._run(_reset_padding_labels, changes=True)


# ---- functions that run on each device ----

_Function = Callable[..., Any]


@functools.lru_cache(maxsize=128)
def _on_devices(
    local: nnx.GraphDef,
    mesh: Mesh,
    function: _Function,
    changes: bool,
    static: tuple[tuple[str, Any], ...],
) -> Callable:
    """Compile the function of `ShardedHead._run`, which takes the state of the head and the arguments."""

    def call(state: nnx.State, *arguments: Any) -> Any:
        def on_device(state: nnx.State, *arguments: Any) -> Any:
            head = merge(local, state)
            results = function(head, *arguments, **dict(static))
            return (nnx.split(head)[1], results) if changes else results

        def argument_specs(argument: Any) -> Any:
            is_moments = isinstance(argument, optax.ScaleByAdamState)
            return moment_specs(argument, state, mesh) if is_moments else _EVERYWHERE

        head_specs, specs = state_specs(state, mesh), tuple(map(argument_specs, arguments))
        moments = next((s for s in specs if isinstance(s, optax.ScaleByAdamState)), None)
        result_specs = _RESULTS[function](mesh.axis_names, moments)
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(head_specs, *specs),
            out_specs=(head_specs, result_specs) if changes else result_specs,
        )(state, *arguments)

    return jax.jit(call)


def _logits(head: FixedFanInHead, x: Array | EncoderOutput) -> Array:
    return head(x)


def _loss(head: FixedFanInHead, x: Array | EncoderOutput, positives: Array, *, loss: str) -> Array:
    return head.loss(x, positives, loss)


def _top_k(head: FixedFanInHead, x: Array | EncoderOutput, *, k: int) -> tuple[Array, Array]:
    shard = head.shard
    scores, labels = head.top_k(x, min(k, shard.size))
    # The ranking of one device has the label -1 for scores that are not finite. Padding labels get it too.
    numbers = labels + shard.first
    real = (labels >= 0) & (numbers < shard.global_num_labels)
    scores, labels = jnp.where(real, scores, -jnp.inf), jnp.where(real, numbers, -1)
    scores, labels = (_gathered(a, shard.axes) for a in (scores, labels))
    return merge_top_k([(scores, labels)], k)


def _inputs(head: FixedFanInHead, x: Array | EncoderOutput) -> tuple[Array, SparseInputs | None]:
    return head.output_inputs(x)


def _logits_of_rows(
    head: FixedFanInHead, inputs: tuple[Array, SparseInputs | None], start: Array, *, rows: int
) -> tuple[Array, Array]:
    """Return the logits of `rows` labels from `start` on in each shard, and the numbers of the labels."""
    labels = head.shard.first + start + jnp.arange(rows, dtype=jnp.int32)
    return head.logits_of(inputs, start, rows), labels


def _step(
    head: FixedFanInHead,
    inputs: StepInputs,
    moments: optax.ScaleByAdamState,
    *,
    method: str,
    wants_d_x: bool,
    training: HeadTraining,
) -> StepResult:
    return getattr(head, method)(inputs._replace(wants_d_x=wants_d_x), moments, training)


def _rewire(
    head: FixedFanInHead,
    x: Array | EncoderOutput,
    positives: Array,
    moments: optax.ScaleByAdamState,
    key: Array,
    *,
    config: RewireConfig,
) -> optax.ScaleByAdamState:
    return head.rewire(x, positives, moments, key, config)


def _reset_padding_labels(head: FixedFanInHead) -> None:
    """Reset the padding labels, so that they affect neither the loss nor any ranking."""
    kernel, bias, real = head.output.kernel, head.output.bias, head.shard.is_label()
    assert bias is not None
    kernel.set_value(jnp.where(real[:, None], kernel[...], 0).astype(kernel.dtype))
    bias.set_value(jnp.where(real, bias[...], PADDING_BIAS).astype(bias.dtype))


# The partition specs of the results of each function, given the mesh axes and the specs of the moments.
_RESULTS: dict[_Function, Callable[[tuple, Any], Any]] = {
    _logits: lambda axes, moments: PartitionSpec(None, axes),
    _loss: lambda axes, moments: _EVERYWHERE,
    _top_k: lambda axes, moments: _EVERYWHERE,
    _inputs: lambda axes, moments: _EVERYWHERE,
    _logits_of_rows: lambda axes, moments: (PartitionSpec(None, axes), PartitionSpec(axes)),
    _step: lambda axes, moments: (_EVERYWHERE, _EVERYWHERE, moments),
    _rewire: lambda axes, moments: moments,
    _reset_padding_labels: lambda axes, moments: None,
}


def _as_key_data(array: Array) -> Array:
    """Return a random key as integers, which processes can share; other arrays unchanged."""
    is_key = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


def _as_key(data: Any, like: Array) -> Array:
    """Invert `_as_key_data`; `like` is the original array or one of its type."""
    is_key = jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key)
    data = jnp.asarray(data)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like)) if is_key else data


def _gathered(array: Array, axes: tuple[str, ...]) -> Array:
    """Concatenate the arrays [B, n] of all devices along axis 1.

    It uses a sum over devices, so that JAX knows that the result is equal on all of them.
    """
    number = jax.lax.axis_index(axes)
    count = jax.lax.axis_size(axes)
    mine = jnp.zeros((count, *array.shape), array.dtype).at[number].set(array)
    return jnp.concatenate(list(jax.lax.psum(mine, axes)), axis=1)
