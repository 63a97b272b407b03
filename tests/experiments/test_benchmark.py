import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from experiments import benchmark

SHAPE = benchmark.Shape(labels=150, inputs=40, fan_in=5, batch=7)


def make_problem(dtype=jnp.float32):
    return benchmark.fan_in_matmul(SHAPE, jnp.dtype(dtype), np.random.default_rng(0))


@pytest.mark.parametrize("op", benchmark.OPS)
def test_program_writes_a_report(tmp_path, op):
    # In a process of its own, as users run it: neither its flags nor JAX's settings are the test suite's.
    path = tmp_path / "result.json"
    arguments = [f"--{name}={size}" for name, size in SHAPE._asdict().items()]
    command = [sys.executable, "-m", "experiments.benchmark", f"--op={op}", *arguments]
    command += ["--repeats=2", f"--json={path}"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(path.read_text())
    assert report["shape"] == SHAPE._asdict()
    assert report["copy_gb_per_second"] > 0
    for name, result in report["contenders"].items():
        assert name in printed
        for pass_name in benchmark.PASSES:
            low, high = result[pass_name]["quartiles_seconds"]
            assert 0 < low <= result[pass_name]["median_seconds"] <= high < math.inf
            assert result[pass_name]["runs"] == 2
    for pass_name in benchmark.PASSES:
        assert 0 < report["speedup"][pass_name]["ratio"] < math.inf


@pytest.mark.parametrize("op", benchmark.OPS)
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_every_contender_runs_and_agrees(op, density):
    shape = SHAPE._replace(density=density)
    problem = benchmark.OPS[op](shape, jnp.dtype(jnp.float32), np.random.default_rng(0))
    assert all(map(callable, benchmark.compile_contenders(problem).values()))
    benchmark.check_agreement(problem)


@pytest.mark.parametrize(
    ("change", "where"),
    [(lambda bias: 1.01 * bias, "forward"), (jax.lax.stop_gradient, "forward\\+backward")],
    ids=["result", "gradient"],
)
def test_a_contender_that_computes_something_else_is_found(change, where):
    problem = make_problem()
    function, constants = problem.contenders["gather + einsum"]

    def changed(x, kernel, bias, indices):
        return function(x, kernel, change(bias), indices)

    contenders = {
        "one": benchmark.Contender(function, constants),
        "other": benchmark.Contender(changed, constants),
    }
    with pytest.raises(AssertionError, match=f"other is off by .*, {where}$"):
        benchmark.check_agreement(problem._replace(contenders=contenders))


def test_a_contender_that_cannot_run_is_listed_with_the_reason(monkeypatch):
    def unfinished(*arrays):
        raise NotImplementedError("not for this dtype")

    def op(shape, dtype, rng):
        problem = benchmark.fan_in_matmul(shape, dtype, rng)
        ours = {"ours": next(iter(problem.contenders.values()))}
        return problem._replace(contenders=ours | {"other": benchmark.Contender(unfinished, ())})

    monkeypatch.setitem(benchmark.OPS, "op", op)
    report = benchmark.measure("op", SHAPE, "float32", repeats=1)
    assert "other, forward: NotImplementedError: not for this dtype" in benchmark.table(report)
    assert report["speedup"] == {"forward": None, "forward+backward": None}
    assert report["contenders"]["ours"]["forward"]["runs"] == 1


@pytest.mark.parametrize("density", [1.0, 0.1, 0.01])
def test_the_loss_has_the_density_that_was_asked_for(density):
    shape = benchmark.Shape(labels=5000, inputs=500, fan_in=16, batch=20, density=density)
    problem = benchmark.fan_in_loss(shape, jnp.dtype(jnp.float32), np.random.default_rng(0))
    (x, kernel, bias), (indices, _) = problem.values, problem.contenders["xla_ops.fan_in_loss"].constants
    measured = np.mean(np.asarray(xla_ops.fan_in_matmul(x, kernel, indices, bias)) > -1)
    assert abs(measured - density) < 0.4 * density
