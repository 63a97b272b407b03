"""Description of the environment of a measurement: versions, machine, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import jax
import psutil


def describe() -> dict:
    """Return the versions, the machine and the commit of a result, serializable as JSON."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")
            },
        },
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": jax.devices()[0].device_kind,
        "commit": _commit(),
    }


def threads() -> int:
    """Return the number of threads that can run at the same time."""
    if hasattr(os, "sched_getaffinity"):  # Linux: the CPUs that this process may use, not all there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
