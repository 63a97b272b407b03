import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.measure import gpu_floors, gpu_ops
from experiments.measure.problems import Shape

BANDWIDTHS = gpu_floors.Bandwidths(memory=1e9, l2=4e9, shared=20e9, shared_bytes=100_000)
SHAPE = Shape(labels=10, inputs=7, fan_in=3, batch=2)
# 30 connections of 4 + 2 bytes, and 10 biases and 2 * 7 features of 4 bytes each.
LAYER = 30 * 6 + 40 + 56


@pytest.mark.parametrize(
    ("op", "memory", "gathered", "added"),
    [
        ("forward", LAYER + 80, 240, 0),  # 2 * 10 logits; 30 rows of 2 points
        ("gradients", LAYER + 80 + 120 + 56, 240, 240),
        ("loss", LAYER + 120 + 56, 480, 240),
        ("adam_step", LAYER + 5 * 120 + 56, 480, 240),
        ("sgd_step", LAYER + 120 + 56, 480, 240),
        ("top_k", LAYER, 240, 0),
        ("kth_smallest", 120, 0, 0),
    ],
)
def test_traffic_of_small_example(op, memory, gathered, added):
    assert gpu_floors.traffic(op, SHAPE, "float32", "uint16") == (memory, gathered, added)
    zero_density = gpu_floors.traffic(op, SHAPE._replace(density=0.0), "float32", "uint16")
    forward = 0 if op in ("gradients", "kth_smallest") else 240
    assert zero_density == (memory - 120 * (op == "sgd_step"), forward, 0)


def test_traffic_counts_only_sectors_with_gradient():
    shape = SHAPE._replace(batch=32, density=0.01)
    for dtype, values_per_sector in (("float32", 8), ("bfloat16", 16)):
        value = 32 / values_per_sector
        moved = gpu_floors.traffic("gradients", shape, dtype, "uint16")
        assert moved.gathered == pytest.approx((1 - 0.99**values_per_sector) * 30 * 32 * value)
        assert moved.added == pytest.approx((1 - 0.99**8) * 30 * 32 * 4)


@pytest.mark.parametrize(
    ("moved", "inputs", "expected"),
    [
        ((3e9, 2e9, 4e9), 1000, (3, 0.5, 1, 3)),  # memory
        ((1e9, 2e9, 4e9), 1000, (1, 0.5, 1, 1.5)),  # rows from the second-level cache
        ((0, 2e9, 4e9), 100, (0, 0.1, 1, 1.1)),  # rows from shared memory
    ],
)
def test_floor_seconds(moved, inputs, expected):
    floors = gpu_floors.floor_seconds(gpu_floors.Traffic(*moved), inputs, "float32", BANDWIDTHS)
    assert list(floors) == ["memory", "gather", "add", "floor"]
    assert list(floors.values()) == pytest.approx(expected)


def test_training_step_traffic_sums_its_parts():
    step = gpu_floors.training_step_traffic(100, SHAPE, "adam")
    head = gpu_floors.traffic("adam_step", SHAPE, "float32", "uint16")
    assert step == head._replace(memory=head.memory + (6 + 1) * 4 * 700)
    lean = gpu_floors.training_step_traffic(100, SHAPE, "lean")
    head = gpu_floors.traffic("sgd_step", SHAPE, "bfloat16", "uint16")
    assert lean.memory == head.memory + 2 * 700 * (4 + 2 * 2) + 4 * 700


def test_cases_cover_all_ops_and_values():
    sizes = (670_091, gpu_ops.BATCHES, gpu_ops.INPUTS, gpu_ops.FAN_INS)
    full, quick = list(gpu_ops.cases(*sizes)), list(gpu_ops.quick_cases(*sizes))
    assert len(set(full)) == len(full) < 150
    assert len(quick) < 20
    assert set(gpu_ops.OPS) == {case.op for case in full} == {case.op for case in quick}
    for op in ("gradients", "loss", "sgd_step"):
        op_cases = [case for case in full if case.op == op]
        assert {case.dtype for case in op_cases} == set(gpu_ops.DTYPES)
        assert {case.index_dtype for case in op_cases} == {"uint16", "int32"}
        assert {case.shape.density for case in op_cases} == set(gpu_ops.DENSITIES)
        assert {case.shape.batch for case in op_cases} == set(gpu_ops.BATCHES)
        assert {case.shape.inputs for case in op_cases} == set(gpu_ops.INPUTS)


SMALL = (1000, (7, 9), (40, 20), (5, 6))


@pytest.mark.parametrize("op", ["forward", "gradients", "adam_step", "sgd_step"])
def test_row_of_times_op(op):  # Training steps take seconds to compile, and are tested in test_gpu_claim.py.
    case = next(case for case in gpu_ops.quick_cases(*SMALL) if case.op == op)
    row = gpu_ops.row_of(case, BANDWIDTHS, 1, others=False)
    assert row["over_floor"] == row["seconds"] / row["floors_seconds"]["floor"]


@pytest.mark.parametrize("op", ["loss", "top_k", "dense_step"])
def test_other_calls_agree_with_our_call(op):
    case = next(case for case in gpu_ops.cases(*SMALL) if case.op == op)
    ours = jax.tree.leaves(gpu_ops.our_call(case)())
    others = gpu_ops.other_calls(case)
    assert others
    for call in others.values():
        for actual, expected in zip(jax.tree.leaves(call()), ours, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_program_writes_report(tmp_path):
    path = tmp_path / "result.json"
    sizes = [
        "--labels=300",
        "--inputs=40",
        "--batch=7",
        "--connections=5",
        "--rounds=1",
        "--copy_bytes=65536",
    ]
    command = [sys.executable, "-m", "experiments.measure.gpu_ops", *sizes, "--op=kth_smallest"]
    subprocess.run([*command, f"--json={path}"], check=True, capture_output=True)
    report = json.loads(path.read_text())
    assert [row["dtype"] for row in report["rows"]] == ["float32", "bfloat16"]
    assert report["bytes_per_second"]["memory"] > 0
