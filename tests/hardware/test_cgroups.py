"""Control groups: quotas and memory limits from recorded trees of both versions, on hosts and inside containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.hardware.cgroups import MemoryLimit, cpu_quota, memory_limits
from tests.hardware.recorded import GIB, MIB, tree

V1 = "9:cpuset:/\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    "files, quota",
    [
        pytest.param({}, None, id="no cgroups"),
        pytest.param({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None, id="v2 unlimited"),
        pytest.param({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2.5, id="v2"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            },
            1.5,
            id="v2, the parent is tighter",
        ),
        pytest.param({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0, id="v2 in a container"),
        pytest.param({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/x/cpu.max": "100000 100000\n"}, 1.0, id="v2 outside"),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            None,
            id="v1 unlimited",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "350000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            3.5,
            id="v1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
            id="v1 in a container",
        ),
        pytest.param({"proc/self/cgroup": "0::/\nrubbish\n", "sys/fs/cgroup/cpu.max": "a b\n"}, None, id="rubbish"),
    ],
)
def test_the_tightest_quota_is_found(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(tree(tmp_path, files)) == quota


MOUNT_V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
# Docker on a v1 host: the mount shows the container's own group, /proc/self/cgroup still names it in full
MOUNT_DOCKER_V1 = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory\n"


def v2(limit: str, current: int, *, high: str = "max", active: int = 0, inactive: int = 0, slab: int = 0) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.high": f"{high}\n",
        "memory.current": f"{current}\n",
        "memory.stat": f"anon {current}\ninactive_file {inactive}\nactive_file {active}\nslab_reclaimable {slab}\nslab {slab}\n",
    }


def below(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


def rooms(root: Path) -> list[tuple[int, int | None]]:
    return [(limit.limit_bytes, limit.room_bytes) for limit in memory_limits(root)]


def test_v2_cache_does_not_count_as_used(tmp_path: Path) -> None:
    group = v2(str(8 * GIB), 7 * GIB, active=2 * GIB, inactive=3 * GIB, slab=512 * MIB)
    files = {"proc/self/cgroup": "0::/user.slice/app\n", "proc/self/mountinfo": MOUNT_V2, **below("sys/fs/cgroup/user.slice/app", group)}
    assert memory_limits(tree(tmp_path, files)) == [
        MemoryLimit(8 * GIB, 8 * GIB - (7 * GIB - 5 * GIB - 512 * MIB), "memory.max of the control group user.slice/app")
    ]


def test_v2_parents_and_high_count(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "proc/self/mountinfo": MOUNT_V2,
        **below("sys/fs/cgroup/a/b", v2("max", GIB)),
        **below("sys/fs/cgroup/a", v2(str(16 * GIB), 14 * GIB, high=str(12 * GIB))),
        "sys/fs/cgroup/memory.stat": "inactive_file 123\n",
    }
    assert rooms(tree(tmp_path, files)) == [(16 * GIB, 2 * GIB), (12 * GIB, 0)]


def test_v2_inside_a_container(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": MOUNT_V2, **below("sys/fs/cgroup", v2(str(4 * GIB), GIB))}
    assert rooms(tree(tmp_path, files)) == [(4 * GIB, 3 * GIB)]


def test_v2_is_found_where_it_is_mounted(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/\n0::/job\n",
        "proc/self/mountinfo": MOUNT_HYBRID,
        **below("sys/fs/cgroup/unified/job", v2(str(2 * GIB), 0)),
        "sys/fs/cgroup/unified/job/cpu.max": "150000 100000\n",
    }
    root = tree(tmp_path, files)
    assert rooms(root) == [(2 * GIB, 2 * GIB)]
    assert cpu_quota(root) == 1.5


def v1(limit: int, usage: int, *, active: int = 0, inactive: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{usage}\n",
        "memory.stat": f"cache 1\ninactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n",
    }


@pytest.mark.parametrize(
    "mountinfo, folder",
    [
        pytest.param(MOUNT_HYBRID, "sys/fs/cgroup/memory/docker/abc", id="on the host"),
        pytest.param(MOUNT_DOCKER_V1, "sys/fs/cgroup/memory", id="in the container"),
        pytest.param("", "sys/fs/cgroup/memory", id="in a container without mountinfo"),
        pytest.param("", "sys/fs/cgroup/memory/docker", id="the parent's, without mountinfo"),
    ],
)
def test_v1(tmp_path: Path, mountinfo: str, folder: str) -> None:
    group = v1(6 * GIB, 5 * GIB, active=GIB, inactive=2 * GIB)
    root = tree(tmp_path, {"proc/self/cgroup": V1, "proc/self/mountinfo": mountinfo, **below(folder, group)})
    assert rooms(root) == [(6 * GIB, 4 * GIB)]


def test_v1_without_a_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": V1,
        "proc/self/mountinfo": MOUNT_HYBRID,
        **below("sys/fs/cgroup/memory/docker/abc", v1((1 << 63) - 4096, GIB)),
    }
    assert rooms(tree(tmp_path, files)) == []


def test_a_group_that_does_not_tell_its_use_has_unknown_room(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": f"{GIB}\n"}
    assert rooms(tree(tmp_path, files)) == [(GIB, None)]


@pytest.mark.parametrize("text", ["", "rubbish\n", "0::\n", "0::/a:b\n", ":::\n", "x:memory:/a\n"])
def test_rubbish_is_no_limit(tmp_path: Path, text: str) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": text, "proc/self/mountinfo": "rubbish - cgroup2\n - \n", "sys/fs/cgroup/memory.max": "-3\n"})
    assert memory_limits(root) == []
    assert cpu_quota(root) is None
