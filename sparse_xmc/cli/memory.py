"""Measurement of the memory of a part of a program."""

import contextlib
import resource
import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")  # exists on Linux


def status_bytes(field: str) -> int:
    """Return a size in /proc/self/status, such as VmRSS, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024  # it is in kB
    raise RuntimeError(f"{_STATUS} has no {field}")


class PeakMemory:
    """The growth of this process's peak resident memory since the object was made.

    Attributes:
      method: description of the method of measurement.
    """

    method = "peak resident size of the process minus its resident size before the model was built"

    def __init__(self):
        with contextlib.suppress(OSError):  # Linux: forget the peak of what came before, such as loading data
            Path("/proc/self/clear_refs").write_text("5")
        self._before = psutil.Process().memory_info().rss

    def bytes(self) -> int:
        """Return the growth so far in bytes, without device memory of a GPU."""
        if _STATUS.exists():  # Unlike ru_maxrss, this value starts anew with the program.
            return status_bytes("VmHWM") - self._before
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before
