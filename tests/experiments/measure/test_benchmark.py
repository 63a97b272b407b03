import itertools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from experiments.measure import ops, problems

SHAPE = problems.Shape(labels=150, inputs=40, fan_in=5, batch=7)


def make_problem(dtype=jnp.float32):
    return problems.fan_in_matmul(SHAPE, jnp.dtype(dtype), np.random.default_rng(0))


@pytest.mark.parametrize("op", problems.OPS)
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
        for pass_name in ops.PASSES:
            low, high = result[pass_name]["quartiles_seconds"]
            assert 0 < low <= result[pass_name]["median_seconds"] <= high < math.inf
            assert 1 <= result[pass_name]["runs"] <= 2
    for pass_name in ops.PASSES:
        assert 0 < report["speedup"][pass_name]["ratio"] < math.inf


@pytest.mark.parametrize("op", problems.OPS)
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_every_contender_runs_and_agrees(op, density):
    shape = SHAPE._replace(density=density)
    problem = problems.OPS[op](shape, jnp.dtype(jnp.float32), np.random.default_rng(0))
    compiled, failures = ops.compile_contenders(problem)
    assert len(compiled) == len(problem.contenders) * len(ops.PASSES)
    assert not failures
    ops.check_agreement(problem)


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
        "one": problems.Contender(function, constants),
        "other": problems.Contender(changed, constants),
    }
    with pytest.raises(AssertionError, match=f"other is off by .*, {where}$"):
        ops.check_agreement(problem._replace(contenders=contenders))


def test_a_report_has_the_quartiles_of_all_runs():
    report = ops.measure("fan_in_loss", SHAPE, "float32", repeats=4, now=itertools.count().__next__)
    second = {"median_seconds": 1.0, "quartiles_seconds": [1.0, 1.0], "runs": 4}
    assert all(result == dict.fromkeys(ops.PASSES, second) for result in report["contenders"].values())
    over = {"over": "fan_in_matmul + jnp loss", "ratio": 1.0}
    assert report["speedup"] == dict.fromkeys(ops.PASSES, over)


def test_a_contender_that_cannot_run_is_listed_with_the_reason(monkeypatch):
    def unfinished(*arrays):
        raise NotImplementedError("not for this dtype")

    def op(shape, dtype, rng):
        problem = problems.fan_in_matmul(shape, dtype, rng)
        ours = {"ours": next(iter(problem.contenders.values()))}
        return problem._replace(contenders=ours | {"other": problems.Contender(unfinished, ())})

    monkeypatch.setitem(problems.OPS, "op", op)
    report = ops.measure("op", SHAPE, "float32", repeats=1)
    assert "other, forward: NotImplementedError: not for this dtype" in ops.table(report)
    assert report["speedup"] == {"forward": None, "forward+backward": None}
    assert report["contenders"]["ours"]["forward"]["runs"] == 1


@pytest.mark.parametrize("density", [1.0, 0.1, 0.01])
def test_the_loss_has_the_density_that_was_asked_for(density):
    shape = problems.Shape(labels=5000, inputs=500, fan_in=16, batch=20, density=density)
    problem = problems.fan_in_loss(shape, jnp.dtype(jnp.float32), np.random.default_rng(0))
    (x, kernel, bias), (indices, _) = problem.values, problem.contenders["xla_ops.fan_in_loss"].constants
    measured = np.mean(np.asarray(xla_ops.fan_in_matmul(x, kernel, indices, bias)) > -1)
    assert abs(measured - density) < 0.4 * density


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["--op=fan_in_loss", "--penultimate=8", "--mode=lean"], "--mode, --penultimate"),
        (["--op=training_step", "--batch=8", "--learning_rate=1"], "--batch, --learning_rate"),
    ],
)
def test_flags_without_use_are_errors(arguments, unused):
    command = [sys.executable, "-m", "experiments.benchmark", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode != 0
    assert f"has no use for {unused}" in finished.stdout + finished.stderr
