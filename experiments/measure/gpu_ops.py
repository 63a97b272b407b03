"""Time ops and training steps on a GPU at the size of Amazon-670K, beside lower bounds and alternatives.

There is a row for each op, shape, dtype and density of the gradient of the logits: the time of our op, and at
one shape of each op, times of other JAX implementations. In-place ops (`adam_step`, `sgd_step`, `dense_step`)
continue from their last result; the learning rate is so low that the density does not change. `training_step`
is a step of `Trainer`, as in `experiments.run`, with a penultimate layer of --inputs hidden units.

Lower bounds ("floors") come from `experiments.measure.gpu_floors`, with the measured bandwidth of a copy, and
the bandwidths of the second-level cache and shared memory given by flags.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array
from scipy import stats

import xla_ops
from sparse_xmc.cli import environment, program
from sparse_xmc.losses import squared_hinge

from . import clock, gpu_floors, problems, workloads
from .gpu_floors import Bandwidths
from .ops import compile_contenders
from .problems import Shape

OPS = (
    "forward",
    "gradients",
    "loss",
    "adam_step",
    "sgd_step",
    "top_k",
    "dense_step",
    "kth_smallest",
    "training_step",
)
BATCHES = (32, 256)
INPUTS = (32_768, 768)
FAN_INS = (32, 64)
DENSITIES = (1.0, 0.1, 0.01, 0.0)
DTYPES = ("float32", "bfloat16")
_K = 5
_RATE = 1e-6
_POSITIVES = 8  # number of positives of a point
_COPY_BYTES = 1 << 30
_CALLS_PER_ROUND = 10


class Case(NamedTuple):
    """A case to measure. `dtype` is the dtype of the weights; for `dense_step`, of the moments."""

    op: str
    shape: Shape
    dtype: str
    index_dtype: str

    @property
    def mode(self) -> str:
        """The mode of `training_step`, a key of `workloads.MODES`."""
        return "adam" if self.dtype == "float32" else "lean"


def _case(op: str, shape: Shape, dtype: str = "float32") -> Case:
    return Case(op, shape, dtype, jnp.dtype(xla_ops.index_dtype(shape.inputs)).name)


def cases(
    labels: int, batches: Sequence[int], inputs: Sequence[int], fan_ins: Sequence[int]
) -> Iterator[Case]:
    """Yield all cases. The first values are the defaults; the other values are varied one at a time."""
    for op, n, dtype in itertools.product(OPS, inputs, DTYPES):
        if op == "adam_step" and dtype != "float32":
            continue
        shape = Shape(labels, n, fan_ins[0], batches[0])
        if op in ("dense_step", "kth_smallest"):
            yield _case(op, shape, dtype)
            continue
        densities = {"forward": (1.0,), "top_k": (1.0,), "training_step": (1.0, 0.0)}.get(op, DENSITIES)
        yield from (_case(op, shape._replace(density=d), dtype) for d in densities)
        if op == "training_step":
            continue
        shape = shape._replace(density=1.0 if 0.01 not in densities else 0.01)
        yield from (_case(op, shape._replace(batch=b), dtype) for b in batches[1:])
        yield from (_case(op, shape._replace(fan_in=f), dtype) for f in fan_ins[1:])
        if n == inputs[0]:
            yield Case(op, shape, dtype, "int32")


def quick_cases(
    labels: int, batches: Sequence[int], inputs: Sequence[int], fan_ins: Sequence[int]
) -> Iterator[Case]:
    """Yield one or two cases of each op."""
    shape = Shape(labels, inputs[0], fan_ins[0], batches[0])
    low, small = shape._replace(density=0.01), shape._replace(inputs=inputs[-1])
    yield from (_case("forward", s, dtype) for s, dtype in ((shape, "float32"), (small, "bfloat16")))
    yield from (_case("gradients", s, dtype) for s in (shape, low) for dtype in DTYPES)
    yield _case("gradients", small)
    yield _case("loss", low)
    yield from (_case("adam_step", s) for s in (shape, low))
    yield from (_case(op, low, "bfloat16") for op in ("sgd_step", "top_k", "dense_step", "kth_smallest"))
    yield from (_case("training_step", shape._replace(density=d)) for d in (1.0, 0.0))


# ---- ours ----


class Arrays(NamedTuple):
    """The arrays of a layer and a batch, on the device."""

    x: Array
    kernel: Array
    indices: Array
    bias: Array
    positives: Array
    dy: Array


def make_arrays(case: Case) -> Arrays:
    """Make arrays with normal logits, whose mean sets the density of the gradient, and of `dy`."""
    labels, inputs, fan_in, batch, density = case.shape
    keys = iter(jax.random.split(jax.random.key(0), 6))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key, shape, scale):
        return (scale * jax.random.normal(key, shape)).astype(case.dtype)

    # A negative with logit s has a gradient if s > -1.
    mean = -1 + float(stats.norm.ppf(np.clip(density, 1e-9, 0.9999999)))
    positives = jax.random.randint(next(keys), (batch, _POSITIVES), 0, labels)
    return Arrays(
        x=normal(next(keys), (batch, inputs), 1.0),
        kernel=normal(next(keys), (labels, fan_in), fan_in**-0.5),
        indices=jax.random.randint(next(keys), (labels, fan_in), 0, inputs).astype(case.index_dtype),
        bias=jnp.full(labels, mean, case.dtype),
        positives=_distinct(positives),
        dy=jnp.where(
            jax.random.bernoulli(next(keys), density, (batch, labels)),
            normal(next(keys), (batch, labels), 1.0),
            jnp.zeros((), case.dtype),
        ),
    )


def _distinct(positives: Array) -> Array:
    ordered = jnp.sort(positives, axis=1)
    return ordered.at[:, 1:].set(jnp.where(ordered[:, 1:] == ordered[:, :-1], -1, ordered[:, 1:]))


def _gradients(x, kernel, indices, bias, dy):
    _, vjp = jax.vjp(lambda x, kernel, bias: xla_ops.fan_in_matmul(x, kernel, indices, bias), x, kernel, bias)
    return vjp(dy)  # The result is not needed, so XLA removes the forward pass.


def _in_place(step: Callable, *state: Any) -> Callable[[], Any]:
    """Return a function without arguments that continues from its last result.

    Args:
      step: function of the state that returns (other results, new state).
      state: the initial state.
    """
    compiled = jax.jit(step, donate_argnums=tuple(range(len(state))))
    held = [state]

    def call():
        results, held[0] = compiled(*held[0])
        return results, held[0]

    return call


def our_call(case: Case) -> Callable[[], Any]:
    """Return the op as a function without arguments."""
    if case.op == "dense_step":
        return _dense_step(case, xla_ops.dense_adam_step)
    if case.op == "training_step":
        return _training_step(case)
    x, kernel, indices, bias, positives, dy = make_arrays(case)
    match case.op:
        case "forward":
            return functools.partial(jax.jit(xla_ops.fan_in_matmul), x, kernel, indices, bias)
        case "gradients":
            return functools.partial(jax.jit(_gradients), x, kernel, indices, bias, dy)
        case "loss":
            loss = jax.jit(jax.value_and_grad(xla_ops.fan_in_loss, argnums=(0, 1, 3)))
            return functools.partial(loss, x, kernel, indices, bias, positives)
        case "adam_step":
            # Moments are nonzero, as during training.
            state = xla_ops.adam_init(kernel, bias)
            state = jax.tree.map(lambda a: a + jnp.asarray(1e-8, a.dtype) if a.ndim else a + 1000, state)

            def adam(kernel, bias, state):
                loss, d_x, *new = xla_ops.fan_in_adam_step(x, kernel, indices, bias, positives, state, _RATE)
                return (loss, d_x), tuple(new)

            return _in_place(adam, kernel, bias, state)
        case "sgd_step":

            def sgd(kernel, bias, step):
                options = {"seed": 1, "step": step}
                loss, d_x, *new = xla_ops.fan_in_sgd_step(
                    x, kernel, indices, bias, positives, _RATE, **options
                )
                return (loss, d_x), (*new, step + 1)

            return _in_place(sgd, kernel, bias, jnp.int32(0))
        case "top_k":
            return functools.partial(
                jax.jit(xla_ops.fan_in_top_k, static_argnums=4), x, kernel, indices, bias, _K
            )
        case "kth_smallest":
            kth = jax.jit(xla_ops.kth_smallest_magnitude, static_argnums=1)
            return functools.partial(kth, kernel, kernel.size // 10)
    raise ValueError(f"no such op: {case.op!r}")


def _dense_step(case: Case, update: Callable) -> Callable[[], Any]:
    """Return a function that updates a kernel [features, D] in place, where D is the output layer's width."""
    features, width, batch = workloads.NUM_FEATURES, case.shape.inputs, case.shape.batch
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = jax.random.normal(keys[0], (batch, features)), jax.random.normal(keys[1], (batch, width))
    kernel = jax.random.normal(keys[2], (features, width))
    state = xla_ops.dense_adam_init(kernel, jnp.dtype(case.dtype))

    def step(kernel, state):
        return (), update(x, dy, kernel, state, _RATE)

    return _in_place(step, kernel, state)


def _training_step(case: Case, *arguments: str) -> Callable[[], Any]:
    labels, width, fan_in, batch, density = case.shape
    network = workloads.NETWORKS[0]._replace(labels=labels, penultimate=width, fan_in=fan_in)
    start = f"--output_bias={-2.0 if density == 0 else 0.0}", "--output_bound=none"
    trainer = network.trainer(case.mode, f"--batch_size={batch}", *start)
    batches = workloads.make_batches(labels, network.labels_per_point, network.features, count=4, size=batch)
    step = workloads.stepper(trainer, batches, _RATE)
    jax.block_until_ready(step())  # The first step is followed by a rewiring.
    return step


# ---- alternatives ----


def other_calls(case: Case) -> dict[str, Callable[[], Any]]:
    """Return alternative implementations of `our_call`, by name."""
    if case.op in ("forward", "gradients"):
        problem = problems.fan_in_matmul(case.shape, jnp.dtype(case.dtype), np.random.default_rng(0))
        compiled, _ = compile_contenders(problem)
        wanted_pass = "forward" if case.op == "forward" else "forward+backward"
        ours = next(iter(problem.contenders))
        return {
            name if case.op == "forward" else f"{name}, with the forward pass": call
            for (name, pass_name), call in compiled.items()
            if pass_name == wanted_pass and (name != ours or case.op == "gradients")
        } | {"dense layer of as many products": _dense_layer(case)}
    if case.op == "dense_step":
        return {"product, then update": _dense_step(case, _dense_adam)}
    if case.op not in ("loss", "top_k"):
        return {}
    x, kernel, indices, bias, positives, _ = make_arrays(case)
    if case.op == "top_k":

        def top_k(x, kernel, indices, bias):
            return jax.lax.top_k(xla_ops.fan_in_matmul(x, kernel, indices, bias), _K)

        return {"fan_in_matmul, then top_k": functools.partial(jax.jit(top_k), x, kernel, indices, bias)}

    def loss(x, kernel, bias):
        logits = xla_ops.fan_in_matmul(x, kernel, indices, bias)
        return squared_hinge(logits.astype(jnp.float32), positives)

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return {"fan_in_matmul, then the loss": functools.partial(gradients, x, kernel, bias)}


def _dense_layer(case: Case) -> Callable[[], Any]:
    """Return a dense product with as many multiplications, and for gradients, both of its gradients."""
    labels, _, fan_in, batch, _ = case.shape
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, dy = (
        jax.random.normal(key, shape, case.dtype)
        for key, shape in zip(keys, ((batch, fan_in), (labels, fan_in), (batch, labels)), strict=True)
    )
    if case.op == "forward":
        return functools.partial(jax.jit(lambda x, kernel: x @ kernel.T), x, kernel)
    return functools.partial(jax.jit(lambda x, kernel, dy: (dy @ kernel, dy.T @ x)), x, kernel, dy)


def _dense_adam(x, dy, kernel, state, rate):
    """Compute `xla_ops.dense_adam_step` by XLA, without stochastic rounding."""
    gradient, count = x.T @ dy, state.count + 1
    mu = 0.9 * state.mu.astype(jnp.float32) + 0.1 * gradient
    nu = 0.999 * state.nu.astype(jnp.float32) + 0.001 * gradient**2
    steps = count.astype(jnp.float32)
    update = mu / (1 - 0.9**steps) / (jnp.sqrt(nu / (1 - 0.999**steps)) + 1e-7)
    state = xla_ops.DenseAdamState(count, mu.astype(state.mu.dtype), nu.astype(state.nu.dtype))
    return kernel - rate * update, state


# ---- rows ----


def traffic(case: Case) -> gpu_floors.Traffic:
    """Return the minimum traffic of the op."""
    if case.op == "dense_step":
        return gpu_floors.dense_step_traffic(workloads.NUM_FEATURES, case.shape.inputs, case.dtype)
    if case.op == "training_step":
        return gpu_floors.training_step_traffic(workloads.NUM_FEATURES, case.shape, case.mode)
    return gpu_floors.traffic(case.op, case.shape, case.dtype, case.index_dtype)


def row_of(case: Case, bandwidths: Bandwidths, rounds: int, *, others: bool) -> dict:
    """Time one case; return a row serializable as JSON."""
    floors = gpu_floors.floor_seconds(traffic(case), case.shape.inputs, case.dtype, bandwidths)
    head = {"op": case.op, **case.shape._asdict(), "dtype": case.dtype, "indices": case.index_dtype}
    row = {**head, "floors_seconds": floors}
    try:
        call = our_call(case)
        row["seconds"] = clock.median_seconds(call, rounds, calls_per_round=_CALLS_PER_ROUND)
        row["over_floor"] = row["seconds"] / floors["floor"]
        del call  # frees its arrays
        if others:
            failures: dict[str, str] = {}
            times = clock.interleaved_times(other_calls(case), rounds, seconds=3, failures=failures)
            row["others_seconds"] = {name: float(np.median(t)) for name, t in times.items()} | failures
    except Exception as error:  # for example out of memory; the other cases are still measured
        row["failed"] = clock.reason(error)
    return row


def table_row(row: dict) -> str:
    """Render one row for the terminal, in ms."""
    text = f"{row['op']:14}{row['batch']:4} {row['inputs']:6} {row['fan_in']:3} {row['density']:5} "
    text += f"{row['dtype']:9}{row['indices']:7}{row['floors_seconds']['floor'] * 1e3:9.3f}"
    if "failed" in row:
        return f"{text} {row['failed']}"
    times = f"{row['seconds'] * 1e3:9.3f} {row['over_floor']:6.2f}"
    measured = {name: s for name, s in row.get("others_seconds", {}).items() if isinstance(s, float)}
    fastest = min(measured, key=lambda name: measured[name], default=None)
    return f"{text}{times}" + (f"   {measured[fastest] * 1e3:.3f} {fastest}" if fastest else "")


def copy_bytes_per_second(rounds: int, size: int = _COPY_BYTES) -> float:
    """Measure the bytes per second, read plus written, of a kernel that adds 1 to a large array."""
    call = functools.partial(jax.jit(lambda a: a + 1), jnp.zeros(size // 4, jnp.float32))
    return 2 * size / clock.median_seconds(call, rounds, calls_per_round=_CALLS_PER_ROUND)


def _define_flags() -> None:
    flags.DEFINE_integer("labels", workloads.AMAZON_670K.labels, "Number of labels.", lower_bound=1)
    flags.DEFINE_multi_integer(
        "batch",
        list(BATCHES),
        "Number of points in the batch; the first value is the default, and is varied to the others.",
    )
    flags.DEFINE_multi_integer(
        "inputs", list(INPUTS), "Number of inputs of the output layer; can be repeated."
    )
    flags.DEFINE_multi_integer(
        "connections",
        list(FAN_INS),
        "Fan-in of the labels; the first value is the default, and is varied to the others.",
    )
    flags.DEFINE_multi_enum("op", list(OPS), list(OPS), "Op to time; can be repeated.")
    flags.DEFINE_bool("quick", False, "Time only one or two cases of each op, without other implementations.")
    flags.DEFINE_float(
        "l2_tb_per_second",
        5.5,
        "Bandwidth of the second-level cache, in TB/s; the default is assumed for an H100.",
    )
    flags.DEFINE_float(
        "shared_tb_per_second",
        29.6,
        "Bandwidth of shared memory, in TB/s; the default is assumed for an H100.",
    )
    flags.DEFINE_integer("shared_kib", 227, "Maximum shared memory of a block of threads, in KiB.")
    flags.DEFINE_integer(
        "copy_bytes",
        _COPY_BYTES,
        "Size of the array that is copied to measure the memory bandwidth, in bytes.",
    )
    flags.DEFINE_integer("rounds", 7, "Number of rounds of each measurement.", lower_bound=1)
    flags.DEFINE_string("json", None, "File to write the report to, as JSON.", required=True)


def main() -> None:
    """Print a table, and write --json after each row."""
    values = flags.FLAGS
    bandwidths = Bandwidths(
        memory=copy_bytes_per_second(values.rounds, values.copy_bytes),
        l2=1e12 * values.l2_tb_per_second,
        shared=1e12 * values.shared_tb_per_second,
        shared_bytes=1024 * values.shared_kib,
    )
    rows: list[dict] = []
    report = {"bytes_per_second": bandwidths._asdict(), "rows": rows, "environment": environment.describe()}
    print(
        "op, batch, inputs, connections, density, dtype, indices; ms: floor, ours, in floors, fastest other"
    )
    select_cases = quick_cases if values.quick else cases
    seen = set()  # pairs of op and dtype; only the first case of each is compared with alternatives
    for case in select_cases(values.labels, values.batch, values.inputs, values.connections):
        if case.op not in values.op:
            continue
        row = row_of(
            case, bandwidths, values.rounds, others=not values.quick and (case.op, case.dtype) not in seen
        )
        seen.add((case.op, case.dtype))
        print(table_row(row), flush=True)
        rows.append(row)
        Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()
    program.start(main)
