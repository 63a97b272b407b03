"""Memory limits of a process, read from trees of files as Linux has them."""

import subprocess
import sys

import pytest

from sparse_xmc import planning
from sparse_xmc.memory_limits import bytes_left

V1 = "35 31 0:32 {} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V2 = "31 23 0:28 {} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
OTHER = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
MIB = 2**20


@pytest.fixture
def write(tmp_path):
    """Writes files below a root directory, which it returns."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def v1(group, limit, used):
    path = f"sys/fs/cgroup/memory/{group}"
    return {f"{path}/memory.limit_in_bytes": f"{limit}\n", f"{path}/memory.usage_in_bytes": f"{used}\n"}


def v2(group, limit, used):
    path = f"sys/fs/cgroup/{group}"
    return {f"{path}/memory.max": f"{limit}\n", f"{path}/memory.current": f"{used}\n"}


def proc(cgroup, mountinfo):
    return {"proc/self/cgroup": cgroup, "proc/self/mountinfo": OTHER + mountinfo}


def test_no_limits_where_there_are_no_files(tmp_path):
    assert bytes_left(tmp_path) == []


def test_cgroup_v1(write):
    root = write(
        proc("4:memory:/job/a\n1:cpu:/other\n0::/\n", V1.format("/"))
        | v1("job/a", 700 * MIB, 100 * MIB)
        | v1("job", 9223372036854771712, 200 * MIB)
        | v1("other", 1, 0)
    )
    assert min(bytes_left(root)) == 600 * MIB


def test_the_smallest_limit_of_nested_cgroups_v2_counts(write):
    files = proc("0::/user.slice/job/step\n", V2.format("/")) | v2("user.slice/job/step", "max", 10 * MIB)
    root = write(files | v2("user.slice/job", 500 * MIB, 100 * MIB) | v2("user.slice", 900 * MIB, 300 * MIB))
    assert sorted(bytes_left(root)) == [400 * MIB, 600 * MIB]
    write(v2("user.slice/job/step", 50 * MIB, 10 * MIB))
    assert min(bytes_left(root)) == 40 * MIB
    write(v2("user.slice/job/step", 5 * MIB, 10 * MIB))
    assert min(bytes_left(root)) == 0


@pytest.mark.parametrize(("mounted", "path"), [("/", "/"), ("/docker/a", "/docker/a"), ("/", "/../b")])
def test_a_container_sees_its_group_as_the_top(write, mounted, path):
    root = write(proc(f"0::{path}\n", V2.format(mounted)) | v2("", 800 * MIB, 100 * MIB))
    assert bytes_left(root) == [700 * MIB]


def test_a_part_of_the_hierarchy_is_mounted(write):
    root = write(proc("4:memory:/docker/a/b\n", V1.format("/docker/a")) | v1("b", 300 * MIB, MIB))
    assert bytes_left(root) == [299 * MIB]


def test_both_versions_at_once(write):
    mounts = V1.format("/") + V2.format("/").replace("/sys/fs/cgroup ", "/sys/fs/cgroup/uni\\040fied ")
    files = proc("4:memory:/a\n0::/b\n", mounts) | v1("a", 30 * MIB, MIB) | v2("uni fied/b", 20 * MIB, MIB)
    assert sorted(bytes_left(write(files))) == [19 * MIB, 29 * MIB]


def test_the_address_space(write):
    limits = "Limit                     Soft Limit           Hard Limit           Units     \n"
    limits += "Max address space         1073741824           unlimited            bytes     \n"
    root = write({"proc/self/limits": limits, "proc/self/status": "Name:\tx\nVmSize:\t  524288 kB\n"})
    assert bytes_left(root) == [512 * MIB]
    write({"proc/self/limits": limits.replace("1073741824", "unlimited ")})
    assert bytes_left(root) == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has these files")
def test_a_real_limit_of_the_address_space():
    program = """
import resource
from sparse_xmc.memory_limits import bytes_left
resource.setrlimit(resource.RLIMIT_AS, (64 << 40, resource.getrlimit(resource.RLIMIT_AS)[1]))
assert any((63 << 40) < left < (64 << 40) for left in bytes_left())
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_plans_count_them(monkeypatch):
    monkeypatch.setattr(planning, "bytes_left", lambda: [7_000_000, 4_000_000])
    assert planning._available(None) == (4_000_000, "this machine")
    monkeypatch.setattr(planning, "bytes_left", lambda: [])
    assert planning._available(None)[0] > 4_000_000
