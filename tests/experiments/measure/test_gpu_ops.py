import json
import subprocess
import sys

import pytest

from experiments.measure import gpu_ops
from experiments.measure.problems import Shape

BANDWIDTHS = gpu_ops.Bandwidths(memory=1e9, l2=4e9, shared=20e9, shared_bytes=100_000)


def test_bytes_of_a_worked_example():
    shape = Shape(labels=10, inputs=7, fan_in=3, batch=2)
    # 30 connections of 4 + 2 bytes, 10 biases, 2 * 7 features and 2 * 10 logits of 4 bytes.
    assert gpu_ops.memory_bytes(shape, "float32") == 30 * 6 + 40 + 56 + 80
    assert gpu_ops.gathered_bytes(shape, "float32") == 30 * 2 * 4
    assert gpu_ops.memory_bytes(shape, "bfloat16") == 30 * 4 + 20 + 28 + 40
    # uint16 does not reach past 65,536 features.
    wide = shape._replace(inputs=65_537)
    assert gpu_ops.memory_bytes(wide, "float32") == 30 * 8 + 40 + 2 * 65_537 * 4 + 80


@pytest.mark.parametrize(
    ("inputs", "batch", "seconds"),
    [
        (100, 32, 10_000 * 32 * 4 / 20e9 + 0.0),  # the rows, out of shared memory
        (1000, 32, 10_000 * 32 * 4 / 4e9),  # out of the second-level cache
    ],
)
def test_floor_of_the_gather(inputs, batch, seconds):
    shape = Shape(labels=1000, inputs=inputs, fan_in=10, batch=batch)
    unlimited = BANDWIDTHS._replace(memory=1e15)
    assert gpu_ops.floor_seconds(shape, "float32", unlimited) == pytest.approx(seconds)


def test_floor_of_the_memory():
    shape = Shape(labels=1000, inputs=100, fan_in=10, batch=32)
    expected = gpu_ops.memory_bytes(shape, "float32") / 1e9
    assert gpu_ops.floor_seconds(shape, "float32", BANDWIDTHS) == expected


def test_speedup_is_over_the_fastest_other_that_ran():
    contenders = {
        "ours": {"forward": 2.0, "forward+backward": 5.0},
        "one": {"forward": 8.0, "forward+backward": "MemoryError: too large"},
        "two": {"forward": 6.0, "forward+backward": 50.0},
    }
    assert gpu_ops.speedups(contenders) == {
        "forward": {"over": "two", "ratio": 3.0},
        "forward+backward": {"over": "two", "ratio": 10.0},
    }
    assert gpu_ops.speedups({"ours": {"forward": 1.0}, "other": {"forward": "failed"}}) == {}
    assert gpu_ops.speedups({"ours": {"forward": "failed"}, "other": {"forward": 1.0}}) == {}


def test_program_writes_a_report(tmp_path):
    path = tmp_path / "result.json"
    sizes = ["--labels=300", "--inputs=40", "--batch=7", "--fan_in=5", "--rounds=1", "--copy_bytes=65536"]
    command = [sys.executable, "-m", "experiments.measure.gpu_ops", *sizes, f"--json={path}"]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads(path.read_text())
    assert [row["dtype"] for row in report["rows"]] == ["float32", "bfloat16"]
    for row in report["rows"]:
        assert row["forward_over_floor"] == pytest.approx(row["forward_seconds"] / row["floor_seconds"])
        assert set(row["gradients_seconds"]) == {"1.0", "0.1", "0.01"}
        assert all(s > 0 for s in row["dense_layer_of_equal_flops"].values())
        assert row["speedup"]["forward+backward"]["over"] in row["contenders"]
