"""Memory limits of this process on Linux, set by control groups or on its address space."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# For each version of control groups: the file of the limit, the file of the memory in use, and the entry of
# `memory.stat` for the part of it that the kernel can drop first, pages of files.
_FILES = {
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_left(root: Path = Path("/")) -> int | None:
    """Return the number of bytes that this process may still allocate under all limits; None without limits.

    Args:
      root: the root of the file system, with `proc` and all mounts; not "/" in tests only.
    """
    left = [*_left_by_cgroups(root), *_left_of_address_space(root)]
    return max(0, min(left)) if left else None


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group of the process, from the innermost to the outermost."""
    for kind, directory, mount in _memory_cgroups(root):
        limit_file, usage_file, cache = _FILES[kind]
        for group in (directory, *directory.parents):
            try:
                limit, used = (int((group / name).read_text()) for name in (limit_file, usage_file))
            except (OSError, ValueError):  # The outermost group has no files, and "max" is not a number.
                pass
            else:
                yield limit - max(0, used - _statistic(group / "memory.stat", cache))
            if group == mount:
                break


def _memory_cgroups(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield the version, the directory of the process's group, and the mount point of its hierarchy."""
    own: dict[str, PurePosixPath] = {}  # the process' group, by version
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            own["cgroup2"] = PurePosixPath(group)
        elif "memory" in controllers.split(","):
            own["cgroup"] = PurePosixPath(group)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *_, options) = before.split(" "), after.split(" ") if after else ("", "")
        if kind not in own or len(fields) < 5 or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top, point = map(_unescape, fields[3:5])
        mount = root / point.lstrip("/")
        path = own[kind]
        # A container sees only its own group, mounted as if it were the outermost one.
        inside = path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else ""
        directory = mount / inside
        yield kind, directory if directory.is_dir() else mount, mount


def _left_of_address_space(root: Path) -> Iterator[int]:
    """Yield the bytes left under the limit set by `ulimit -v`, if there is one."""
    for line in _lines(root / "proc/self/limits"):
        if match := re.match(r"Max address space\s+(\d+)\s", line):
            pages = int(next(_lines(root / "proc/self/statm")).split()[0])
            yield int(match[1]) - pages * os.sysconf("SC_PAGE_SIZE")


def _statistic(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _lines(path) if line.startswith(f"{name} ")), 0)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, or nothing if it cannot be read."""
    try:
        yield from path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return


def _unescape(field: str) -> str:
    r"""Decode a path of `mountinfo`, in which a blank is written as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
