"""The memory that is left to this process by limits of control groups and of its address space.

Functions take the root directory of the files that they read, `/` on Linux; systems without such files have
no limits here.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# By version of control groups: the files with the limit, and with what the processes of a group use.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}


def bytes_left(root: Path = Path("/")) -> list[int]:
    """The bytes that each limit on this process's memory leaves, at least 0; empty without limits."""
    return [max(0, left) for left in (*_left_by_cgroups(root), *_left_by_address_space(root))]


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """Yields the bytes that each of this process's groups leaves: its own, and all above it."""
    for directory, version in _own_cgroups(root):
        limit, used = (_read(directory / name) for name in _FILES[version])
        try:
            yield int(limit) - int(used)
        except ValueError:  # there are no such files, or the limit is "max"
            continue


def _own_cgroups(root: Path) -> Iterator[tuple[Path, int]]:
    """Yields the directories of those groups, from the process's own upwards, and their version."""
    paths: dict[int, str] = {}  # of the process's group, by version
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    for version, mounted, point in _mounts(root):
        if version not in paths:
            continue
        own = PurePosixPath(paths[version])
        # A mount may show a part of the hierarchy. A path outside of it has no directory here: a container
        # may see its own group as the top of the mount.
        is_inside = own.is_relative_to(mounted) and ".." not in own.parts
        own = own.relative_to(mounted) if is_inside else PurePosixPath()
        for group in (own, *own.parents):
            yield root / point.lstrip("/") / group, version


def _mounts(root: Path) -> Iterator[tuple[int, str, str]]:
    """Yields the mounts of control groups that limit memory: version, the path that is mounted, and where."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mounted, point = (_unescape(field) for field in before.split()[3:5])
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            yield 2, mounted, point
        elif kind == "cgroup" and "memory" in options.split(","):
            yield 1, mounted, point


def _unescape(field: str) -> str:
    """A field of mountinfo, where a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _left_by_address_space(root: Path) -> Iterator[int]:
    """Yields the bytes that `ulimit -v` leaves, if it is set."""
    limit = re.search(r"^Max address space\s+(\d+)", _read(root / "proc/self/limits"), re.MULTILINE)
    used = re.search(r"^VmSize:\s+(\d+) kB", _read(root / "proc/self/status"), re.MULTILINE)
    if limit and used:
        yield int(limit[1]) - 1024 * int(used[1])


def _read(path: Path) -> str:
    """The text of a file, empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
