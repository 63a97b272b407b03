"""How much memory a part of a program takes."""

import contextlib
import re
import resource
import sys
from pathlib import Path

import psutil


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
