"""Tests of the planned memory of training, and of the errors if it is not available."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.sparse
from flax import nnx

import xla_ops
from sparse_xmc import (
    ClassifierConfig,
    RewireConfig,
    Trainer,
    TrainingConfig,
    XMCClassifier,
    estimator,
    make_mesh,
    planning,
)
from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import Batches
from sparse_xmc.heads import DenseConfig, FixedFanInConfig
from sparse_xmc.planning import check_memory, plan_memory

pytestmark = pytest.mark.usefixtures("standard_promotion")


def points(labels, features=24, size=32, *, sparse=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, features)).astype(np.float32)
    positives = np.zeros((size, labels), bool)
    positives[np.arange(size), rng.integers(labels, size=size)] = True
    return Dataset(
        scipy.sparse.csr_array(np.maximum(x, 0)) if sparse else x, scipy.sparse.csr_array(positives)
    )


def state_bytes(plan):
    return sum(
        plan.parts[name]
        for name in ("encoder", "encoder's moments", "embedding tables", "head", "head's moments")
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_planned_state_matches_real_arrays(sparse):
    train = points(500, sparse=sparse)
    config = ClassifierConfig(24, 500, bag_of_words=sparse, head=FixedFanInConfig(penultimate=64, fan_in=8))
    training = TrainingConfig(moment_dtype="bfloat16")
    plan = plan_memory(config, training, train)
    trainer = Trainer(config.make(train=train, rngs=nnx.Rngs(0)), training)
    arrays = [a for a in jax.tree.leaves(trainer.state) if isinstance(a, jax.Array)]
    assert state_bytes(plan) == sum(a.size * a.dtype.itemsize for a in arrays)
    assert plan.bytes == sum(plan.parts.values())
    table = 24 * (512 + 1) * 4  # with a sum of squares for each row
    assert plan.parts["embedding tables"] == (table if sparse else 0)


def test_planned_head_matches_manual_computation():
    def head(config, labels=1000, **training):
        plan = plan_memory(
            ClassifierConfig(24, labels, head=config), TrainingConfig(**training), points(1000)
        )
        return plan.parts["head"], plan.parts["head's moments"]

    weights = 4 * (24 * 1000 + 1000)
    assert head(DenseConfig()) == (weights, 2 * weights + 4)  # and the step counter
    weights, connections = 4 * (24 * 64 + 64 + 8 * 1000 + 1000), 2 * 8 * 1000
    sparse = FixedFanInConfig(penultimate=64, fan_in=8)
    assert head(sparse) == (weights + connections, 2 * weights + 4)
    assert head(sparse, output_optimizer="sgd")[1] == 2 * 4 * (24 * 64 + 64) + 4


def test_plan_includes_logits_of_dense_heads_only():
    def temporaries(config, labels):
        train = points(labels, size=64)
        training = TrainingConfig(batch_size=64, rewire=RewireConfig(fraction=0))
        plan = plan_memory(ClassifierConfig(24, labels, head=config), training, train)
        return plan.parts["temporaries"]

    logits = 4 * 64 * 20_000
    assert logits <= temporaries(DenseConfig(), 20_000) - temporaries(DenseConfig(), 10) < 8 * logits
    sparse = FixedFanInConfig(penultimate=64, fan_in=8)
    assert temporaries(sparse, 20_000) - temporaries(sparse, 10) < logits / 2


@pytest.mark.parametrize("fused", [True, False])
def test_plan_with_more_than_2_to_the_31_logits(monkeypatch, fused):
    monkeypatch.setattr(xla_ops, "platforms", lambda: ("cpu",) if fused else ())
    config = ClassifierConfig(24, 2**31 // 32 + 1, head=FixedFanInConfig(penultimate=0, fan_in=1))
    training = TrainingConfig(output_optimizer="sgd", rewire=RewireConfig(fraction=0))
    plan = plan_memory(config, training, points(1))
    assert plan.parts["head"] == (2**31 // 32 + 1) * (4 + 2 + 4)


def test_scratch_bytes_match_measured_peak():
    program = """
import jax, jax.numpy as jnp, xla_ops
from xla_ops import _native
batch, inputs, labels, fan_in, entries = 32, 200_000, 20_000, 32, 5_000
kernel, indices = jnp.zeros((labels, fan_in)), jnp.zeros((labels, fan_in), jnp.int32)
columns = jnp.arange(entries, dtype=jnp.int32)
words = xla_ops.SparseInputs(columns % batch, columns, jnp.ones(entries), 100_000)
arguments = jnp.ones((batch, inputs)), kernel, indices, jnp.zeros(labels), jnp.zeros((batch, 1), jnp.int32)
loss = jax.jit(lambda *a, **s: jax.value_and_grad(xla_ops.fan_in_loss)(*a, **s))
for sparse in ({}, {"sparse": words}):
    compiled = loss.lower(*arguments, **sparse).compile()
    jax.block_until_ready(compiled(*arguments, **sparse))
    print(xla_ops.scratch_bytes(compiled.as_text()) / _native.cpu().peak_scratch_bytes())
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert [float(line) for line in finished.stdout.split()] == pytest.approx([1, 1], rel=0.1)


def test_plan_above_available_memory_raises_and_names_smaller_settings(monkeypatch):
    config = ClassifierConfig(24, 5000, head=FixedFanInConfig(penultimate=4096, fan_in=32))
    training, train = TrainingConfig(batch_size=64), points(5000, size=64)
    plan = check_memory(config, training, train)
    monkeypatch.setattr(planning, "_available", lambda mesh: (plan.bytes - 2**20, "a small machine"))
    named = r"with output_dtype=bfloat16, output_optimizer=sgd, moment_dtype=bfloat16\."
    with pytest.raises(MemoryError, match=named):
        check_memory(config, training, train)
    smaller = ClassifierConfig(24, 5000, head=FixedFanInConfig(penultimate=4096, output_dtype="bfloat16"))
    lean = TrainingConfig(batch_size=64, output_optimizer="sgd", moment_dtype="bfloat16")
    assert check_memory(smaller, lean, train).fits  # the named settings do fit
    monkeypatch.setattr(planning, "_available", lambda mesh: (100 * 2**20, "a small machine"))
    dense = ClassifierConfig(24, 20_000, head=DenseConfig())
    with pytest.raises(MemoryError, match="with head=fixed_fan_in"):
        check_memory(dense, TrainingConfig(batch_size=512), points(20_000, size=512))
    monkeypatch.setattr(planning, "_available", lambda mesh: (1000, "a tiny machine"))
    with pytest.raises(MemoryError, match="No smaller settings that this program knows would fit"):
        check_memory(config, training, train)


def test_estimator_checks_memory_before_building_the_model(monkeypatch):
    monkeypatch.setattr(planning, "_available", lambda mesh: (1000, "a tiny machine"))
    monkeypatch.setattr(estimator, "build", None)
    with pytest.raises(MemoryError, match="a tiny machine"):
        XMCClassifier().fit(np.eye(8, dtype=np.float32), np.eye(8, dtype=bool))


def test_devices_of_one_machine_share_memory_and_labels(monkeypatch):
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: type("M", (), {"available": 8 << 30}))
    config = ClassifierConfig(24, 5001, head=FixedFanInConfig(penultimate=0, fan_in=8))
    one, four = (
        plan_memory(config, TrainingConfig(), points(5001), mesh=mesh)
        for mesh in (None, make_mesh(data=1, label=4))
    )
    assert (one.available, four.available) == (8 << 30, 2 << 30)
    assert four.parts["head"] == -(-5001 // 4) * (8 * 4 + 8 * 2 + 4)


def test_available_memory_respects_limits_of_the_process(monkeypatch):
    monkeypatch.setattr(planning, "memory_left", lambda: 4_000_000)
    assert planning._available(None) == (4_000_000, "this machine")
    monkeypatch.setattr(planning, "memory_left", lambda: None)
    assert planning._available(None)[0] > 4_000_000


def test_training_reuses_programs_compiled_for_the_plan():
    config = ClassifierConfig(24, 77, head=FixedFanInConfig(penultimate=16, fan_in=4))
    training, train = TrainingConfig(batch_size=32), points(77)
    plan_memory(config, training, train)
    trainer = Trainer(config.make(train=train, rngs=nnx.Rngs(1)), training)
    (batch,) = Batches(train, 32).shuffled(0, 0)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        trainer.train_step(batch, 1e-3)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled


def test_plan_program_needs_only_sizes(tmp_path):
    command = [sys.executable, "-m", "experiments.plan", "--words=1000", "--penultimate=64", "--seed=3"]
    fits = subprocess.run([*command, "--labels=3000"], capture_output=True, text=True)
    assert fits.returncode == 0, fits.stderr
    assert "does not use --seed" in fits.stdout
    assert "planned peak" in fits.stdout
    too_large = [*command, "--labels=2000000000", "--head=dense"]  # more than 2^31 logits
    refused = subprocess.run(too_large, capture_output=True, text=True)
    assert refused.returncode == 1, refused.stderr
    assert "more memory than there is" in refused.stderr
