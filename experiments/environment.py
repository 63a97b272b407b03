"""What a measurement depends on besides the program, and how to time several programs fairly."""

import concurrent.futures
import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import jax
import numpy as np
import psutil

TIME_BOX_SECONDS = 20
_COPY_BYTES = 1 << 28


def describe() -> dict:
    """The versions, the machine and the commit that a result belongs to; ready for JSON."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")
            },
        },
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": _threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": jax.devices()[0].device_kind,
        "commit": _commit(),
    }


def copy_gb_per_second() -> float:
    """The GB per second, read plus written, of copying memory with all threads: the best of ten runs."""
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.zeros_like(source)
    threads = _threads()
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    seconds = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            seconds.append(time.perf_counter() - start)
    return 2 * _COPY_BYTES / min(seconds) / 1e9


def interleaved_times(calls: dict[Hashable, Callable], repeats: int) -> dict[Hashable, list[float] | str]:
    """Times calls in turn, so that whatever else the machine does hits all of them alike.

    The first round warms up and is not counted. A call takes part until its runs add up to
    TIME_BOX_SECONDS; if its first run did so alone, that one counts.

    Args:
      calls: functions of no arguments that return arrays.
      repeats: the number of rounds that count.

    Returns:
      The seconds of each call's runs, or, for one that failed, the reason.
    """
    results = {key: [] for key in calls}
    for _ in range(repeats + 1):
        for key, call in calls.items():
            if isinstance(results[key], str) or sum(results[key]) >= TIME_BOX_SECONDS:
                continue
            try:
                start = time.perf_counter()
                jax.block_until_ready(call())
                results[key].append(time.perf_counter() - start)
            except Exception as error:
                results[key] = reason(error)
    return {key: r if isinstance(r, str) else r[1:] or r for key, r in results.items()}


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def _threads() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: the CPUs that this process may use, not all there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match.group(1) if match else platform.processor() or platform.machine()


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        output = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return output.stdout.strip()


class PeakMemory:
    """The growth of this process's peak resident memory since the object was made.

    Attributes:
      method: how it is measured, in words.
    """

    method = "peak resident size of the process minus its resident size before the model was built"

    def __init__(self):
        with contextlib.suppress(OSError):  # Linux: forget the peak of what came before, such as loading data
            Path("/proc/self/clear_refs").write_text("5")
        self._before = psutil.Process().memory_info().rss

    def bytes(self) -> int:
        """The growth so far, in bytes; device memory on a GPU is not in it."""
        status = Path("/proc/self/status")
        if status.exists():  # Linux: unlike ru_maxrss, this starts afresh with the program
            kilobytes = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE).group(1)
            return 1024 * int(kilobytes) - self._before
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before
