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
def test_program_writes_report(tmp_path, op):
    # A subprocess does not share the flags and JAX settings of the test suite.
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
def test_contenders_agree(op, density):
    shape = SHAPE._replace(density=density)
    problem = problems.OPS[op](shape, jnp.dtype(jnp.float32), np.random.default_rng(0))
    compiled, failures = ops.compile_contenders(problem)
    assert len(compiled) == len(problem.contenders) * len(ops.PASSES)
    assert not failures
    ops.check_agreement(problem)


@pytest.mark.parametrize(
    ("change", "pass_name"),
    [(lambda bias: 1.01 * bias, "forward"), (jax.lax.stop_gradient, "forward\\+backward")],
    ids=["result", "gradient"],
)
def test_check_agreement_raises_for_different_results(change, pass_name):
    problem = make_problem()
    function, constants = problem.contenders["gather + einsum"]

    def changed(x, kernel, bias, indices):
        return function(x, kernel, change(bias), indices)

    contenders = {
        "one": problems.Contender(function, constants),
        "other": problems.Contender(changed, constants),
    }
    with pytest.raises(AssertionError, match=f"other is off by .*, {pass_name}$"):
        ops.check_agreement(problem._replace(contenders=contenders))


def test_measure_reports_quartiles():
    report = ops.measure("fan_in_loss", SHAPE, "float32", repeats=4, now=itertools.count().__next__)
    expected = {"median_seconds": 1.0, "quartiles_seconds": [1.0, 1.0], "runs": 4}
    assert all(result == dict.fromkeys(ops.PASSES, expected) for result in report["contenders"].values())
    speedup = {"over": "fan_in_matmul + jnp loss", "ratio": 1.0}
    assert report["speedup"] == dict.fromkeys(ops.PASSES, speedup)


def test_measure_reports_failed_contenders(monkeypatch):
    def unsupported(*arrays):
        raise NotImplementedError("not for this dtype")

    def op(shape, dtype, rng):
        problem = problems.fan_in_matmul(shape, dtype, rng)
        ours = {"ours": next(iter(problem.contenders.values()))}
        return problem._replace(contenders=ours | {"other": problems.Contender(unsupported, ())})

    monkeypatch.setitem(problems.OPS, "op", op)
    report = ops.measure("op", SHAPE, "float32", repeats=1)
    assert "other, forward: NotImplementedError: not for this dtype" in ops.table(report)
    assert report["speedup"] == {"forward": None, "forward+backward": None}
    assert report["contenders"]["ours"]["forward"]["runs"] == 1


@pytest.mark.parametrize("density", [1.0, 0.1, 0.01])
def test_fan_in_loss_problem_has_requested_density(density):
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
def test_program_rejects_unused_flags(arguments, unused):
    command = [sys.executable, "-m", "experiments.benchmark", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode != 0
    assert f"does not use {unused}" in finished.stdout + finished.stderr
