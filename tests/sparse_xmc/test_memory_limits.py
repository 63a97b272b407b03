"""Tests of memory limits on directories that imitate /proc and /sys/fs/cgroup of several machines."""

import os
import subprocess
import sys

import pytest

from sparse_xmc.memory_limits import memory_left

MB = 1_000_000
CGROUP_V2_MOUNT = "31 22 0:27 {root} {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
CGROUP_V1_MOUNT = "36 25 0:31 {root} {mount} rw,nosuid shared:16 - cgroup cgroup rw,memory\n"
OTHER_MOUNTS = (
    "35 25 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n22 1 8:1 / / rw - ext4 /dev/sda rw\n"
)


def write_tree(directory, groups, mounts, **files):
    """Write /proc/self/cgroup, /proc/self/mountinfo and other files by path to a directory; return it."""
    files = {name: text for group in files.values() for name, text in group.items()}
    files |= {"proc/self/cgroup": groups, "proc/self/mountinfo": OTHER_MOUNTS + mounts}
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return directory


def cgroup_v2_files(group, limit, used, stat=None):
    files = {f"{group}/memory.max": limit, f"{group}/memory.current": used}
    return files if stat is None else files | {f"{group}/memory.stat": stat}


def cgroup_v1_files(group, limit, used, stat=None):
    files = {f"{group}/memory.limit_in_bytes": limit, f"{group}/memory.usage_in_bytes": used}
    return files if stat is None else files | {f"{group}/memory.stat": stat}


def test_no_limits_give_none(tmp_path):
    assert memory_left(tmp_path) is None
    limits = {"proc/self/limits": "Max address space         unlimited            unlimited            bytes"}
    mounts = CGROUP_V2_MOUNT.format(root="/", mount="/sys/fs/cgroup")
    assert memory_left(write_tree(tmp_path, "0::/\n", mounts, limits=limits)) is None


def test_lowest_limit_of_group_and_its_parents_counts(tmp_path):
    top = "sys/fs/cgroup"
    files = {
        **cgroup_v2_files(f"{top}/user.slice", 700 * MB, 300 * MB),
        **cgroup_v2_files(f"{top}/user.slice/job", 900 * MB, 200 * MB),
        **cgroup_v2_files(f"{top}/user.slice/job/step", "max", 200 * MB),
        **cgroup_v2_files(f"{top}/another", 10 * MB, 0),
    }
    mounts = CGROUP_V2_MOUNT.format(root="/", mount="/sys/fs/cgroup")
    assert memory_left(write_tree(tmp_path, "0::/user.slice/job/step\n", mounts, files=files)) == 400 * MB


def test_inactive_file_pages_do_not_count_as_used(tmp_path):
    stat = f"anon {100 * MB}\nfile {260 * MB}\nactive_file {10 * MB}\ninactive_file {250 * MB}"
    files = cgroup_v2_files("sys/fs/cgroup/job", 700 * MB, 400 * MB, stat)
    mounts = CGROUP_V2_MOUNT.format(root="/", mount="/sys/fs/cgroup")
    assert memory_left(write_tree(tmp_path, "0::/job\n", mounts, files=files)) == 550 * MB


def test_cgroup_v1(tmp_path):
    top, unlimited = "sys/fs/cgroup/memory", 9223372036854771712
    stat = f"inactive_file {MB}\ntotal_inactive_file {20 * MB}"
    files = {
        **cgroup_v1_files(top, unlimited, 5000 * MB),
        **cgroup_v1_files(f"{top}/batch", unlimited, 500 * MB),
        **cgroup_v1_files(f"{top}/batch/job", 700 * MB, 120 * MB, stat),
    }
    groups = "12:cpu,cpuacct:/\n5:hugetlb,memory:/batch/job\n1:name=systemd:/batch\n0::/\n"
    mounts = CGROUP_V1_MOUNT.format(root="/", mount="/sys/fs/cgroup/memory") + CGROUP_V2_MOUNT.format(
        root="/", mount="/sys/fs/cgroup/unified"
    )
    assert memory_left(write_tree(tmp_path, groups, mounts, files=files)) == 600 * MB


@pytest.mark.parametrize(
    ("root", "group"),
    [
        ("/docker/abc", "/docker/abc"),  # only the container's group is mounted
        ("/", "/"),  # the container has its own namespace
        ("/", "/docker/abc"),  # the group has another name inside the container
        ("/..", "/../other"),
    ],
)
def test_containers(tmp_path, root, group):
    files = cgroup_v1_files("sys/fs/cgroup/memory", 700 * MB, 100 * MB)
    mounts = CGROUP_V1_MOUNT.format(root=root, mount="/sys/fs/cgroup/memory")
    assert memory_left(write_tree(tmp_path, f"9:memory:{group}\n", mounts, files=files)) == 600 * MB


def test_mount_point_with_space(tmp_path):
    files = {
        **cgroup_v2_files("mnt/c groups", 900 * MB, 0),
        **cgroup_v2_files("mnt/c groups/job", 800 * MB, 50 * MB),
    }
    mounts = CGROUP_V2_MOUNT.format(root="/outer", mount="/mnt/c\\040groups")
    assert memory_left(write_tree(tmp_path, "0::/outer/job\n", mounts, files=files)) == 750 * MB


def test_address_space_limit(tmp_path):
    limit, page = 4000 * MB, os.sysconf("SC_PAGE_SIZE")
    limits = {
        "proc/self/limits": f"Limit  Soft Limit  Units\nMax address space  {limit}  unlimited  bytes",
        "proc/self/statm": "1000 300 200 1 0 400 0",
    }
    assert memory_left(write_tree(tmp_path, "", "", limits=limits)) == limit - 1000 * page
    limits["proc/self/statm"] = f"{2 * limit // page} 0 0 0 0 0 0"
    assert memory_left(write_tree(tmp_path, "", "", limits=limits)) == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="needs Linux")
def test_ulimit():
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n"
    code += "from sparse_xmc.memory_limits import memory_left; print(memory_left())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0 < int(printed) < 2**40
