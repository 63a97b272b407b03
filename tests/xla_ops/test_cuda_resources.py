"""Tests of the registers and memory of each CUDA kernel, which the compiler reports per architecture."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

REPORT = Path(__file__).parents[2] / "xla_ops" / "_cuda_resources.txt"
ARCHITECTURES = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90"}  # newer compilers add more
KERNELS = {"pack", "unpack", "forward", "gradients", "loss", "mean", "merge", "sort", "adam", "count", "find"}
KERNELS |= {"mark", "number", "starts", "add", "round"}  # for sparse inputs
LARGEST_STATIC_SHARED = 48 << 10


class Resources(NamedTuple):
    """The resources of one kernel on one architecture: registers per thread; all others in bytes."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int


def parse(report: str) -> list[Resources]:
    """Parse the output of `ptxas -v`."""
    found = []
    for part in report.split("Compiling entry function ")[1:]:
        kernel, architecture = re.match(r"'(\S+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Resources(
                kernel, architecture, registers, int(shared.group(1)) if shared else 0, stack, stores + loads
            )
        )
    return found


def demangle(kernel: str) -> str:
    """Return a readable name such as `gradients_kernel<float>`, or the same name without binutils."""
    if shutil.which("c++filt") is None:
        return kernel
    name = subprocess.run(["c++filt", kernel], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^void |xla_ops::|cuda::|\(anonymous namespace\)::|\(.*", "", name.strip())


@pytest.fixture(scope="module")
def kernels():
    if not REPORT.exists():
        pytest.skip("xla_ops._cuda was not built here (no nvcc)")
    return [r._replace(kernel=demangle(r.kernel)) for r in parse(REPORT.read_text())]


def test_parse():
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onev' for 'sm_75'
ptxas info    : Function properties for _Z3onev
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 16896 bytes smem
ptxas info    : Compile time = 23.314 ms
ptxas info    : Compiling entry function '_Z3twov' for 'sm_90'
ptxas info    : Function properties for _Z3twov
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers
"""
    one, two = parse(report)
    assert one == Resources("_Z3onev", "sm_75", registers=64, shared=16896, stack=16, spilled=20)
    assert two == Resources("_Z3twov", "sm_90", registers=20, shared=0, stack=0, spilled=0)


def test_every_kernel_is_built_for_every_architecture(kernels):
    built = {(re.match(r"\w*?([a-z]+)_kernel", r.kernel).group(1), r.architecture) for r in kernels}
    assert built >= {(kernel, architecture) for kernel in KERNELS for architecture in ARCHITECTURES}


def test_kernels_do_not_spill_registers(kernels, capsys):
    devices = sorted({r.architecture for r in kernels}, key=lambda name: int(name[3:]))
    found = {(r.kernel, r.architecture): r for r in kernels}
    with capsys.disabled():
        print(
            f"\n{'registers, bytes of shared memory, bytes spilled':42}"
            + "".join(f"{d:>14}" for d in devices)
        )
        for kernel in sorted({r.kernel for r in kernels}):
            resources = [found[kernel, device] for device in devices]
            cells = [f"{r.registers:5}{r.shared:7}{r.spilled:2}" for r in resources]
            print(f"{kernel:48}" + "".join(cells))
    assert not [r for r in kernels if r.spilled or r.stack]
    assert all(r.shared <= LARGEST_STATIC_SHARED for r in kernels)
