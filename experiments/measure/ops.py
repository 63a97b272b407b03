"""Timing of an op of `xla_ops` against other JAX implementations, for `experiments.benchmark`.

Before the timing, all contenders are compared on a small problem: their results and gradients must agree.
Then they run in turn (see `clock.interleaved_times`), compiled, with all arrays passed as arguments, so that
XLA cannot fold constants. Preparations that depend only on the connections (such as sorting) are not counted.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from xla_ops import _native

from . import clock, environment
from .problems import OPS, Problem, Shape

_Key = tuple[str, str]  # contender and pass


def _forward(function, values, constants, cotangent):
    return function(*values, *constants)


def _forward_backward(function, values, constants, cotangent):
    # The result is returned too; otherwise XLA could remove the forward pass.
    y, vjp = jax.vjp(lambda *values: function(*values, *constants), *values)
    return y, vjp(jnp.ones_like(y) if cotangent is None else cotangent)


PASSES = {"forward": _forward, "forward+backward": _forward_backward}


def compile_contenders(problem: Problem) -> tuple[dict[_Key, Callable[[], Any]], dict[_Key, str]]:
    """Return compiled functions without arguments, and the reasons of failed compilations."""
    compiled: dict[_Key, Callable[[], Any]] = {}
    failures: dict[_Key, str] = {}
    for name, (function, constants) in problem.contenders.items():
        arguments = (problem.values, constants, problem.cotangent)
        for pass_name, run in PASSES.items():
            try:
                program = jax.jit(functools.partial(run, function)).lower(*arguments).compile()
                _require_memory(program)
                compiled[name, pass_name] = functools.partial(program, *arguments)
            except Exception as error:
                failures[name, pass_name] = clock.reason(error)
    return compiled, failures


def _require_memory(program: jax.stages.Compiled) -> None:
    """Raise MemoryError if the system would later kill the process (a GPU raises an error itself)."""
    if jax.default_backend() != "cpu":
        return
    memory: Any = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    available = psutil.virtual_memory().available
    if needed > available:
        raise MemoryError(f"needs {needed / 1e9:.1f} GB, of which {available / 1e9:.1f} GB are available")


def check_agreement(problem: Problem) -> None:
    """Raise AssertionError unless all contenders that run return the same result as the first."""
    tolerance = 4 * float(jnp.finfo(problem.values[0].dtype).eps) * problem.values[0].shape[0] ** 0.5
    expected: dict[str, list[np.ndarray]] = {}
    compiled, _ = compile_contenders(problem)
    for (name, pass_name), call in compiled.items():
        result = [np.asarray(a, np.float32) for a in jax.tree.leaves(call())]
        for a, b in zip(result, expected.setdefault(pass_name, result), strict=True):
            error = np.max(np.abs(a - b)) / np.max(np.abs(b))
            if not error <= tolerance:
                raise AssertionError(f"{name} is off by {error:.1e} of the largest value, {pass_name}")


def measure(op: str, shape: Shape, dtype: str, repeats: int, now: clock.Clock = time.perf_counter) -> dict:
    """Time all contenders of an op by the clock `now`; return a report serializable as JSON."""
    small = shape._replace(labels=min(shape.labels, 300), inputs=min(shape.inputs, 70))
    check_agreement(OPS[op](small, jnp.dtype(dtype), np.random.default_rng(0)))
    problem = OPS[op](shape, jnp.dtype(dtype), np.random.default_rng(0))
    compiled, failures = compile_contenders(problem)
    times = clock.interleaved_times(compiled, repeats, failures=failures, clock=now)
    summaries = {key: _summary(t) for key, t in times.items()}
    summaries |= {key: {"failed": reason} for key, reason in failures.items()}
    medians = {
        p: {name: summaries[name, p]["median_seconds"] for name in problem.contenders if (name, p) in times}
        for p in PASSES
    }
    ours = next(iter(problem.contenders))
    return {
        "op": op,
        "shape": shape._asdict(),
        "dtype": dtype,
        "contenders": {name: {p: summaries[name, p] for p in PASSES} for name in problem.contenders},
        "speedup": {p: speedup(ours, medians[p]) for p in PASSES},
        "copy_gb_per_second": clock.copy_gb_per_second(),
        "instruction_set": _native.cpu().isa(),
        "environment": environment.describe(),
    }


def _summary(times: list[float]) -> dict[str, Any]:
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
    return {"median_seconds": median, "quartiles_seconds": [low, high], "runs": len(times)}


def speedup(ours: str, seconds: Mapping[str, float]) -> dict | None:
    """Return the time of the fastest other contender divided by our time, of `seconds` by contender."""
    others = [name for name in seconds if name != ours]
    if ours not in seconds or not others:
        return None
    best = min(others, key=lambda name: seconds[name])
    return {"over": best, "ratio": seconds[best] / seconds[ours]}


def table(report: dict) -> str:
    """Render a report for the terminal."""
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
