r"""Times an op of `xla_ops` against other ways to compute the same in JAX.

    python -m experiments.benchmark --op=fan_in_matmul --labels=670091 --json=result.json

Before anything is timed, all contenders are compared on a small problem: they must agree, forward and
backward. Then they run in turn (see `environment.interleaved_times`), compiled, with all arrays passed as
arguments, so that nothing is folded into the program. Whatever a contender can prepare once for fixed
connections (sorting them, for example) is not counted.

To add an op, write a function like `fan_in_matmul` below and list it in OPS.

    python -m experiments.benchmark --op=training_step --json=result.json

measures whole training steps instead: see `experiments.training_step`.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from absl import app, flags
from jax import Array
from jax.experimental import sparse
from scipy import stats

import xla_ops
from experiments import environment, training_step
from sparse_xmc.losses import squared_hinge
from xla_ops import _native

_LABELS_AT_ONCE = 128


class Shape(NamedTuple):
    """The sizes of a problem."""

    labels: int
    inputs: int
    fan_in: int
    batch: int
    density: float = 1.0  # of the gradient of the logits, for fan_in_loss


class Contender(NamedTuple):
    """A way to compute an op: `function(*values, *constants)`."""

    function: Callable
    constants: tuple


class Problem(NamedTuple):
    """Arrays that gradients are taken in, a cotangent of the result, and the contenders, ours first.

    Without a cotangent the result is a loss, and the cotangent 1, as in training.
    """

    values: tuple
    cotangent: Array | None
    contenders: dict[str, Contender]


# ---- fan_in_matmul: contenders take x [B, D], kernel [L, F], bias [L] and return [B, L] ----


def fan_in_matmul(shape: Shape, dtype, rng: np.random.Generator) -> Problem:
    """The problem for `xla_ops.fan_in_matmul`, with connections drawn uniformly."""
    labels, inputs, fan_in, batch, _ = shape

    def normal(*size):
        return jnp.asarray(rng.standard_normal(size, np.float32)).astype(dtype)

    indices = rng.integers(0, inputs, (labels, fan_in), np.int32)
    flat = indices.reshape(-1)
    rows = np.repeat(np.arange(labels, dtype=np.int32), fan_in)
    row_ends = np.arange(labels + 1, dtype=np.int32) * fan_in
    # The transposed matrix in compressed form, and where its values are in the kernel.
    order = np.argsort(flat, kind="stable").astype(np.int32)
    column_ends = np.cumsum(np.bincount(flat + 1, minlength=inputs + 1), dtype=np.int32)
    narrow = jnp.asarray(indices.astype(xla_ops.index_dtype(inputs)))
    wide, flat, rows, row_ends, order, column_ends = map(
        jnp.asarray, (indices, flat, rows, row_ends, order, column_ends)
    )
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
    """Applies `function` to a few labels at a time, the last ones included, so that they stay in cache."""
    whole = arrays[0].shape[0] // _LABELS_AT_ONCE * _LABELS_AT_ONCE
    blocks = [a[:whole].reshape(-1, _LABELS_AT_ONCE, *a.shape[1:]) for a in arrays]
    results = jax.lax.map(lambda block: function(*block), blocks)
    results = results.reshape(whole, *results.shape[2:])
    return jnp.concatenate([results, function(*(a[whole:] for a in arrays))])


def _map(x, kernel, bias, indices):
    features = x.T

    @jax.checkpoint  # or the backward pass keeps all that was gathered: B times the kernel
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
    # JAX multiplies fast by a BCSR matrix, but differentiates through BCOO: this is what its parts can do.
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


def fan_in_loss(shape: Shape, dtype, rng: np.random.Generator) -> Problem:
    """The problem for `xla_ops.fan_in_loss`: normal logits, whose mean gives the gradient its density."""
    labels, inputs, fan_in, batch, density = shape

    def normal(*size, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(size, np.float32)).astype(dtype)

    # A negative with logit s has a gradient where s > -1.
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


# ---- measuring ----


def _forward(function, values, constants, cotangent):
    return function(*values, *constants)


def _forward_backward(function, values, constants, cotangent):
    # The result is returned as well: otherwise XLA could leave out the forward pass.
    y, vjp = jax.vjp(lambda *values: function(*values, *constants), *values)
    return y, vjp(jnp.ones_like(y) if cotangent is None else cotangent)


PASSES = {"forward": _forward, "forward+backward": _forward_backward}


def compile_contenders(problem: Problem) -> dict[tuple[str, str], Callable | str]:
    """Maps (contender, pass) to a compiled function of no arguments, or to the reason why there is none."""
    compiled = {}
    for name, (function, constants) in problem.contenders.items():
        arguments = (problem.values, constants, problem.cotangent)
        for pass_name, run in PASSES.items():
            try:
                program = jax.jit(functools.partial(run, function)).lower(*arguments).compile()
                _require_memory(program)
                compiled[name, pass_name] = functools.partial(program, *arguments)
            except Exception as error:
                compiled[name, pass_name] = environment.reason(error)
    return compiled


def _require_memory(program) -> None:
    """Raises MemoryError now, where the system would kill the whole process later (a GPU says so itself)."""
    if jax.default_backend() != "cpu":
        return
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    available = psutil.virtual_memory().available
    if needed > available:
        raise MemoryError(f"needs {needed / 1e9:.1f} GB, of which {available / 1e9:.1f} GB are available")


def check_agreement(problem: Problem) -> None:
    """Raises AssertionError unless all contenders that run return what the first does."""
    tolerance = 4 * float(jnp.finfo(problem.values[0].dtype).eps) * problem.values[0].shape[0] ** 0.5
    expected = {}
    for (name, pass_name), call in compile_contenders(problem).items():
        if isinstance(call, str):
            continue
        result = [np.asarray(a, np.float32) for a in jax.tree.leaves(call())]
        for a, b in zip(result, expected.setdefault(pass_name, result), strict=True):
            error = np.max(np.abs(a - b)) / np.max(np.abs(b))
            if not error <= tolerance:
                raise AssertionError(f"{name} is off by {error:.1e} of the largest value, {pass_name}")


def measure(op: str, shape: Shape, dtype: str, repeats: int) -> dict:
    """Times all contenders of an op; the returned report is ready for JSON."""
    small = shape._replace(labels=min(shape.labels, 300), inputs=min(shape.inputs, 70))
    check_agreement(OPS[op](small, jnp.dtype(dtype), np.random.default_rng(0)))
    problem = OPS[op](shape, jnp.dtype(dtype), np.random.default_rng(0))
    calls = compile_contenders(problem)
    runnable = {key: call for key, call in calls.items() if callable(call)}
    times = calls | environment.interleaved_times(runnable, repeats)
    results = {name: {p: _summary(times[name, p]) for p in PASSES} for name in problem.contenders}
    return {
        "op": op,
        "shape": shape._asdict(),
        "dtype": dtype,
        "contenders": results,
        "speedup": {p: _speedup(results, p) for p in PASSES},
        "copy_gb_per_second": environment.copy_gb_per_second(),
        "instruction_set": _native.cpu().isa(),
        "environment": environment.describe(),
    }


def _summary(times: list[float] | str) -> dict:
    if isinstance(times, str):
        return {"failed": times}
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
    return {"median_seconds": median, "quartiles_seconds": [low, high], "runs": len(times)}


def _speedup(results: dict, pass_name: str) -> dict | None:
    """How many times as long as ours, the first of `results`, the fastest other contender takes."""
    medians = {name: r[pass_name].get("median_seconds") for name, r in results.items()}
    ours, *others = medians
    others = [name for name in others if medians[name] is not None]
    if medians[ours] is None or not others:
        return None
    best = min(others, key=medians.get)
    return {"over": best, "ratio": medians[best] / medians[ours]}


def table(report: dict) -> str:
    """Renders a report for the terminal."""
    shape, machine = report["shape"], report["environment"]
    lines = [
        f"{report['op']}, {report['dtype']}: " + ", ".join(f"{k} {v:,}" for k, v in shape.items()),
        f"{machine['cpu']}, {machine['threads']} threads, {report['instruction_set']}, "
        f"copies memory at {report['copy_gb_per_second']:.1f} GB/s",
        "",
        f"{'ms: median (quartiles), runs':28}" + "".join(f"{p:>42}" for p in PASSES),
    ]
    lines += [
        f"{name:28}" + "".join(f"{_cell(result[p]):>42}" for p in PASSES)
        for name, result in report["contenders"].items()
    ]
    for name, result in report["contenders"].items():
        lines += [f"{name}, {p}: {result[p]['failed']}" for p in PASSES if "failed" in result[p]]
    for p, speedup in report["speedup"].items():
        if speedup:
            lines.append(f"{p}: {speedup['ratio']:.1f} times as fast as the best other, {speedup['over']}")
    return "\n".join(lines)


def _cell(result: dict) -> str:
    if "failed" in result:
        return "failed"
    low, high = result["quartiles_seconds"]
    return (
        f"{result['median_seconds'] * 1e3:,.1f} ({low * 1e3:,.1f} to {high * 1e3:,.1f}), {result['runs']:2}"
    )


# ---- command line ----


def _define_flags() -> None:
    flags.DEFINE_enum("op", "fan_in_matmul", [*OPS, "training_step"], "What to measure.")
    flags.DEFINE_integer("labels", 670_091, "Number of labels.", lower_bound=1)
    flags.DEFINE_integer("inputs", 32_768, "Number of input features.", lower_bound=1)
    flags.DEFINE_integer("fan_in", 32, "Connections per label.", lower_bound=1)
    flags.DEFINE_integer("batch", 32, "Examples in the batch.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the values.")
    flags.DEFINE_float("density", 1.0, "The part of the logits with a gradient, for fan_in_loss.", 0.0, 1.0)
    flags.DEFINE_integer("repeats", 15, "Runs of each contender, fewer for slow ones.", lower_bound=1)
    flags.DEFINE_string("json", None, "File to write the report to.")


def main(argv: list[str]) -> None:
    """Prints the table, and writes --json."""
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    values = flags.FLAGS
    if values.op == "training_step":
        report = training_step.measure(values.repeats)
    else:
        shape = Shape(values.labels, values.inputs, values.fan_in, values.batch, values.density)
        report = measure(values.op, shape, values.dtype, values.repeats)
        print(table(report))
    if values.json is not None:
        Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()  # not on import: tests import several programs, and their flags share names
    app.run(main)
