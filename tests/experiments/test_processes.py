"""Tests of training with several processes: equal results to one process, and failures of a process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

import experiments
from sparse_xmc.data import Dataset, write_tsv, write_xmc_text
from sparse_xmc.saving import SavedModel

ROOT = Path(experiments.__file__).parents[1]
SECONDS = 240  # from the start of a run until processes that hang are aborted
SMALL = ["--embedding=16", "--penultimate=24", "--fan_in=6", "--direct_inputs=3", "--batch_size=8"]
SMALL += ["--learning_rate=0.01", "--output_bias=-1", "--schedule=linear"]
SMALL += ["--rewire_growth=active", "--rewire_fraction=0.2", "--rewire_interval=7"]


@pytest.fixture(scope="module")
def data(request, tmp_path_factory):
    """Flags of 120 training and 21 test points; no number of devices in these tests divides the 13 labels."""
    directory, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    flags = list(SMALL)
    for name, size in (("train", 120), ("test", 21)):
        labels = [sorted(rng.choice(13, rng.integers(1, 4), replace=False)) for _ in range(size)]
        if request.param == "text":
            texts = [" ".join(f"word{i}" for i in [*row, *rng.integers(0, 13, 1)]) for row in labels]
            write_tsv(directory / f"{name}.tsv", [[f"label {i:02}" for i in row] for row in labels], texts)
            flags.append(f"--{name}={directory / name}.tsv")
            continue
        matrix = scipy.sparse.csr_array(np.array([[i in row for i in range(13)] for row in labels]))
        features = matrix + rng.normal(scale=0.3, size=matrix.shape).astype(np.float32)
        np.save(directory / f"{name}.npy", features.astype(np.float32))
        write_xmc_text(
            directory / f"{name}.txt", Dataset(scipy.sparse.csr_array(matrix, dtype=np.float32), matrix)
        )
        flags += [f"--{name}={directory / name}.txt", f"--{name}_features={directory / name}.npy"]
    return flags


def start(count, devices, flags, logs, last_flags=()):
    """Start `count` processes of a run with `devices` devices each; their messages go to files in `logs`.

    The last process has further flags.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    xla_flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "PYTHONFAULTHANDLER": "1"}
    processes = []
    for number in range(count):
        command = [sys.executable, "-m", "experiments.run", *flags]
        if count > 1:
            command += [
                f"--coordinator=localhost:{port}",
                f"--num_processes={count}",
                f"--process_id={number}",
            ]
        if number == count - 1:
            command += last_flags
        with open(logs / f"{number}.log", "w") as log:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log)
            )
    return processes


def wait(processes, logs):
    """Wait until all processes have ended; return the exit code and the last messages of each.

    Processes that still run after SECONDS are aborted, and the error shows the Python stacks of all threads.
    """
    deadline, hung = time.monotonic() + SECONDS, False
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            hung = True
    ends = [
        (process.wait(), (logs / f"{number}.log").read_text()[-8000:])
        for number, process in enumerate(processes)
    ]
    assert not hung, "\n\n".join(errors for _, errors in ends)
    return ends


def run(count, devices, logs, *flags):
    ends = wait(start(count, devices, flags, logs), logs)
    assert [code for code, _ in ends] == [0] * count, "\n\n".join(errors for _, errors in ends)


def history(workdir):
    return json.loads((workdir / "result.json").read_text())["history"]


@pytest.fixture(scope="module")
def single_process(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    workdir = runs / "single_process"
    run(1, 1, runs, *data, "--epochs=4", f"--workdir={workdir}")
    return workdir


def assert_same_run(workdir, single_process):
    for actual, expected in zip(history(workdir), history(single_process), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    actual, expected = (SavedModel.load(directory).model.head for directory in (workdir, single_process))
    np.testing.assert_array_equal(actual.output.indices[...], expected.output.indices[...])
    np.testing.assert_allclose(actual.output.kernel[...], expected.output.kernel[...], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("data", ["text", "dense"], indirect=True)
def test_several_processes_match_single_process(request, data, single_process, tmp_path):
    text = request.node.callspec.params["data"] == "text"
    count, devices, mesh = (4, 1, "label:4") if text else (2, 2, "data:2,label:2")
    run(count, devices, tmp_path, *data, "--epochs=4", f"--mesh={mesh}", f"--workdir={tmp_path / 'run'}")
    assert_same_run(tmp_path / "run", single_process)


@pytest.mark.parametrize("data", ["text"], indirect=True)
def test_run_resumes_on_other_mesh_after_process_is_killed(data, single_process, tmp_path):
    workdir = tmp_path / "run"
    flags = [*data, "--epochs=4", f"--workdir={workdir}", "--checkpoint_minutes=0"]
    processes = start(2, 1, [*flags, "--mesh=label:2"], tmp_path)
    latest, deadline = workdir / "checkpoints" / "latest", time.monotonic() + SECONDS
    try:
        while not list(latest.glob("*.json")):
            assert time.monotonic() < deadline
            assert processes[0].poll() is None or (workdir / "result.json").exists()
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGKILL)
        ends = wait(processes, tmp_path)
    finally:
        for process in processes:
            process.kill()
    if (workdir / "result.json").exists():
        pytest.skip("the run finished before a process was killed")
    assert all(code != 0 for code, _ in ends)
    run(1, 4, tmp_path, *flags, "--mesh=data:2,label:2")
    assert_same_run(workdir, single_process)


@pytest.mark.parametrize("data", ["text"], indirect=True)
def test_failed_process_ends_other_processes(data, tmp_path):
    flags = [*data, "--epochs=1", "--mesh=label:2", f"--workdir={tmp_path / 'run'}"]
    (first, _), (last, errors) = wait(
        start(2, 1, flags, tmp_path, last_flags=["--train=missing.tsv"]), tmp_path
    )
    assert last == 1
    assert "error: missing.tsv: no such file" in errors
    assert first != 0


@pytest.mark.parametrize("data", ["text"], indirect=True)
def test_several_processes_require_mesh(data, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    ends = wait(start(2, 1, [*data, workdir], tmp_path), tmp_path)
    assert all(code != 0 for code, _ in ends)
    # The end of the first process may end the other one before it prints its error.
    assert any("2 processes need --mesh, such as label:2" in errors for _, errors in ends)
    ((code, errors),) = wait(start(1, 1, [*data, "--num_processes=2", workdir], tmp_path), tmp_path)
    assert code != 0
    assert "--num_processes and --process_id need --coordinator" in errors
