"""A head with its labels sharded over the devices of a mesh; each device holds one shard only.

All devices receive the features of the batch, and the gradients of the features are summed over devices: no
array that is sent between devices has a size proportional to the number of labels.

    mesh axes        labels are sharded over all axes of the mesh, such as "data" and "label"
    output layer     sharded by labels, with its moments; padding labels fill the last shards (`LabelPart`)
    penultimate      replicated; all devices take equal steps
    d_features       summed over devices, [B, I] behind a penultimate layer, else [B, E]
    top k            of each device, [B, k], gathered and merged
"""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_xmc.data.dataset import Dataset
from sparse_xmc.heads.head import Features, Head, HeadTraining, StepInputs, label_blocks
from sparse_xmc.heads.part import BY_LABEL, PADDING_BIAS, LabelPart, merge_top_k
from sparse_xmc.heads.rewiring import RewireConfig
from sparse_xmc.modules import key_path_names

if TYPE_CHECKING:
    from sparse_xmc.heads.fixed_fan_in import FixedFanInConfig, FixedFanInHead

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
    by_label = BY_LABEL

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
        cls,
        config: "FixedFanInConfig",
        in_features: int,
        num_labels: int,
        mesh: Mesh,
        *,
        num_words: int,
        train: Dataset | None,
        rngs: nnx.Rngs,
    ) -> "ShardedHead":
        """Make a sharded head with the same initial weights and connections as on one device.

        No device and no process ever holds more than its own shards.

        Args:
          config: the configuration of the head.
          in_features: E, the number of features.
          num_labels: L, the number of labels.
          mesh: the mesh.
          num_words: V, the number of words that labels may read directly.
          train: the training points, from which direct inputs are chosen; or None.
          rngs: random keys; the stream `params` is used.
        """
        part = LabelPart(num_labels, tuple(mesh.axis_names))
        size = -(-num_labels // mesh.size)
        of_rngs, keys = nnx.split(rngs)
        graphdefs = []

        def make(words, part=part):
            rngs = nnx.merge(of_rngs, jax.tree.map(_as_key, words, keys), copy=True)
            head = config.make_part(in_features, size, part, num_words=num_words, rngs=rngs)
            if part is not None:
                _fill_up(head, ())
            graphdef, state = nnx.split(head)
            graphdefs.append(graphdef)
            return state, jax.tree.map(_as_words, nnx.state(rngs))

        words = jax.tree.map(lambda key: np.asarray(_as_words(key)), keys)
        shapes, _ = jax.eval_shape(functools.partial(make, part=None), words)
        results = (_specs(shapes, mesh), _EVERYWHERE)
        on_devices = jax.shard_map(make, mesh=mesh, in_specs=_EVERYWHERE, out_specs=results)
        state, words = jax.jit(on_devices)(words)
        nnx.update(rngs, jax.tree.map(lambda words, key: _as_key(np.asarray(words), key), words, keys))
        head = cls(graphdefs[-1], state, mesh, in_features, num_labels)
        if config.direct_inputs and train is not None:
            head._choose(config.direct_inputs, train, rngs.params())
        return head

    def _choose(self, count: int, train: Dataset, key: Array) -> None:
        """Run `FixedFanInHead.choose` on the shard of each device."""
        local = self._local(nnx.split(self)[1])
        kernel, indices = self.output.kernel[...], self.output.indices[...]
        kernels, connections = [], []
        for shard in kernel.addressable_shards:
            rows = shard.index[0]
            first = rows.start or 0
            last = min(first + shard.data.shape[0], self.num_labels)
            of_kernel, of_indices = np.array(shard.data), np.zeros(shard.data.shape, indices.dtype)
            if last > first:
                real = slice(0, last - first)
                of_kernel[real], of_indices[real] = local.chosen(
                    count, train, key, slice(first, last), shard.data[real]
                )
            kernels.append(jax.device_put(of_kernel, shard.device))
            connections.append(jax.device_put(of_indices, shard.device))
        together = functools.partial(jax.make_array_from_single_device_arrays, kernel.shape, kernel.sharding)
        self.output.kernel.set_value(together(kernels))
        self.output.indices.set_value(together(connections))

    # ---- on the devices ----

    def _local(self, state: nnx.State) -> "FixedFanInHead":
        return nnx.merge(self.local, state, copy=True)

    def _run(self, function: "_Function", static: tuple, *arguments: Any, changes: bool = False) -> Any:
        """Run a function of (head, static, *arguments) on all devices and return its results.

        If `changes` is set, changes of the head by the function are kept. The function is compiled once for
        each value of `static`.
        """
        call = _on_devices(self.local, self.mesh, function, static, changes)
        results = call(nnx.split(self)[1], *arguments)
        if not changes:
            return results
        state, results = results
        nnx.update(self, state)
        return results

    def __call__(self, x: Array | Features) -> Array:
        """Return the logits [B, L]. All of them are in memory at once: for tests and small L only."""
        return self._run(_logits, (), x)[:, : self.num_labels]

    def loss(self, x: Array | Features, positives: Array, loss: str = "squared_hinge") -> Array:
        return self._run(_loss, (loss,), x, positives)

    def top_k(self, x: Array | Features, k: int) -> tuple[Array, Array]:
        if not 1 <= k <= self.num_labels:
            raise ValueError(f"k must be in 1..{self.num_labels}, got {k}")
        return self._run(_top_k, (k,), x)

    def logits_in_blocks(self, x: Array | Features) -> Iterator[tuple[Array, Array]]:
        size = self.output.kernel.shape[0] // self.mesh.size
        firsts = range(0, size * self.mesh.size, size)
        inputs = self._run(_inputs, (), x)
        for block in label_blocks(size):
            rows = block.stop - block.start
            logits, labels = self._run(_logits_of_rows, (rows,), inputs, np.int32(block.start))
            real = sum(min(rows, max(0, self.num_labels - first - block.start)) for first in firsts)
            yield logits[:, :real], labels[:real]

    # ---- training ----

    def init_moments(self, training: HeadTraining) -> optax.ScaleByAdamState:
        local = self._local(nnx.split(self)[1])
        shapes = jax.eval_shape(lambda: local.init_moments(training))
        specs = _specs_of_moments(shapes, self.mesh)

        def init():
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

        shardings = jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)
        return jax.jit(init, out_shardings=shardings)()

    def step_fused(self, inputs, moments, training):
        return self._step("step_fused", inputs, moments, training)

    def step_by_optax(self, inputs, moments, training):
        return self._step("step_by_optax", inputs, moments, training)

    def _step(self, kind: str, inputs: StepInputs, moments: optax.ScaleByAdamState, training: HeadTraining):
        arrays = inputs._replace(seed=jnp.asarray(inputs.seed, jnp.uint32), wants_d_x=False)
        return self._run(_step, (kind, inputs.wants_d_x, training), arrays, moments, changes=True)

    def check_rewiring(self, config: RewireConfig) -> None:
        self._local(nnx.split(self)[1]).check_rewiring(config)

    def rewire(self, x, positives, moments, key, config):
        return self._run(_rewire, (config,), x, positives, moments, key, changes=True)

    @property
    def label_rows(self) -> int:
        return self.output.kernel.shape[0]

    def fill_up(self) -> None:
        """Reset the weights and biases of the padding labels."""
        self._run(_fill_up, (), changes=True)


# ---- functions that run on each device ----

_Function = Callable[..., Any]


@functools.lru_cache(maxsize=128)
def _on_devices(
    local: nnx.GraphDef, mesh: Mesh, function: _Function, static: tuple, changes: bool
) -> Callable:
    """Compile the function of `ShardedHead._run`, which takes the state of the head and the arguments."""

    def specs_of(argument):
        is_moments = isinstance(argument, optax.ScaleByAdamState)
        return _specs_of_moments(argument, mesh) if is_moments else _EVERYWHERE

    def call(state, *arguments):
        def on_device(state, *arguments):
            head = nnx.merge(local, state, copy=True)
            results = function(head, static, *arguments)
            return (nnx.split(head)[1], results) if changes else results

        specs, of_arguments = _specs(state, mesh), tuple(map(specs_of, arguments))
        moments = next((s for s in of_arguments if isinstance(s, optax.ScaleByAdamState)), None)
        of_results = _RESULTS[function](mesh.axis_names, moments)
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs, *of_arguments),
            out_specs=(specs, of_results) if changes else of_results,
        )(state, *arguments)

    return jax.jit(call)


def _logits(head, static, x):
    return head(x)


def _loss(head, static, x, positives):
    return head.loss(x, positives, *static)


def _top_k(head, static, x):
    (k,), axes = static, head.part.axes
    scores, labels = head.top_k(x, min(k, head.num_labels))
    # The ranking of one device has the label -1 for scores that are not finite. Padding labels get it too.
    numbers = labels + head.first_label()
    real = (labels >= 0) & (numbers < head.part.num_labels)
    scores, labels = jnp.where(real, scores, -jnp.inf), jnp.where(real, numbers, -1)
    scores, labels = (_gathered(a, axes) for a in (scores, labels))
    return merge_top_k([(scores, labels)], k)


def _inputs(head, static, x):
    return head.output_inputs(x)


def _logits_of_rows(head, static, inputs, start):
    """Return the logits of the labels from `start` on in each shard, and the numbers of the labels."""
    (rows,) = static
    return head.logits_of(inputs, start, rows), head.first_label() + start + jnp.arange(rows, dtype=jnp.int32)


def _step(head, static, inputs, moments):
    kind, wants_d_x, training = static
    return getattr(head, kind)(inputs._replace(wants_d_x=wants_d_x), moments, training)


def _rewire(head, static, x, positives, moments, key):
    return head.rewire(x, positives, moments, key, *static)


def _fill_up(head, static):
    """Reset the padding labels, so that they affect neither the loss nor any ranking."""
    assert head.part is not None
    assert head.output.bias is not None
    real = (
        head.part.first(head.num_labels) + jnp.arange(head.num_labels, dtype=jnp.int32) < head.part.num_labels
    )
    kernel, bias = head.output.kernel, head.output.bias
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
    _fill_up: lambda axes, moments: None,
}


def _as_words(array: Array) -> Array:
    """Return a random key as integers, which processes can share; other arrays unchanged."""
    is_key = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


def _as_key(words: Any, like: Array) -> Array:
    """Invert `_as_words`; `like` is the original array or one of its type."""
    is_key = jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key)
    words = jnp.asarray(words)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(like)) if is_key else words


def _gathered(array: Array, axes: tuple[str, ...]) -> Array:
    """Concatenate the arrays [B, n] of all devices along axis 1.

    It uses a sum over devices, so that JAX knows that the result is equal on all of them.
    """
    number = jax.lax.axis_index(axes)
    count = jax.lax.axis_size(axes)
    mine = jnp.zeros((count, *array.shape), array.dtype).at[number].set(array)
    return jnp.concatenate(list(jax.lax.psum(mine, axes)), axis=1)


def _is_split(path: tuple) -> bool:
    """Return whether the variable at this path of the state has a row for each label."""
    return ".".join(key_path_names(path)[:2]) in BY_LABEL


def _specs(state: Any, mesh: Mesh) -> Any:
    """Return the partition specs of the variables of a head."""
    by_label = PartitionSpec(mesh.axis_names)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_label if _is_split(path) else _EVERYWHERE, state
    )


def _specs_of_moments(moments: optax.ScaleByAdamState, mesh: Mesh) -> optax.ScaleByAdamState:
    """Return the partition specs of moments, which are stored by parameter name."""
    by_label = PartitionSpec(mesh.axis_names)

    def specs(arrays):
        return {name: by_label if name in BY_LABEL else _EVERYWHERE for name in arrays}

    return optax.ScaleByAdamState(_EVERYWHERE, specs(moments.mu), specs(moments.nu))
