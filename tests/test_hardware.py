"""Machines are recorded as small `/sys` and `/proc` trees."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.hardware import cpu_quota, linux_cores, parse_cpu_list, physical_cores


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def siblings(*groups: str) -> dict[str, str]:
    """thread_siblings_list of every CPU in groups such as `0,8`."""
    name = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {name.format(cpu): group + "\n" for group in groups for cpu in parse_cpu_list(group)}


FOUR_CORES_EIGHT_THREADS = siblings("0,4", "1,5", "2,6", "3,7")


def test_hyperthreads_count_once(tmp_path: Path) -> None:
    root = tree(tmp_path, FOUR_CORES_EIGHT_THREADS)
    assert linux_cores(root, set(range(8))) == 4


@pytest.mark.parametrize("affinity, cores", [({0}, 1), ({0, 4}, 1), ({0, 1, 4}, 2), ({5, 6, 7}, 3)])
def test_affinity_limits(tmp_path: Path, affinity: set[int], cores: int) -> None:
    assert linux_cores(tree(tmp_path, FOUR_CORES_EIGHT_THREADS), affinity) == cores


def test_a_hybrid_cpu_counts_its_fast_cores(tmp_path: Path) -> None:
    # i7-1260P: four P-cores with two threads each, eight E-cores
    files = siblings("0-1", "2-3", "4-5", "6-7", *map(str, range(8, 16)))
    root = tree(tmp_path, {**files, "sys/devices/cpu_core/cpus": "0-7\n", "sys/devices/cpu_atom/cpus": "8-15\n"})
    assert linux_cores(root, set(range(16))) == 4
    assert linux_cores(root, {8, 9, 10}) == 3, "pinned to the slow ones, they are what there is"


def test_without_topology_each_cpu_is_a_core(tmp_path: Path) -> None:
    assert linux_cores(tmp_path, {0, 1, 2}) == 3


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


@pytest.mark.parametrize("quota, cores", [("50000", 1), ("250000", 2), ("399999", 3), ("9900000", 4), ("max", 4)])
def test_a_quota_is_rounded_down_to_at_least_one(tmp_path: Path, quota: str, cores: int) -> None:
    files = {**FOUR_CORES_EIGHT_THREADS, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}
    assert linux_cores(tree(tmp_path, files), set(range(8))) == cores


@given(st.sets(st.integers(0, 300)))
def test_cpu_lists_round_trip(cpus: set[int]) -> None:
    assert parse_cpu_list(",".join(map(str, sorted(cpus))) + "\n") == cpus


def test_cpu_list_ranges() -> None:
    assert parse_cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpu_list("") == set()


def test_this_machine_has_cores() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(sys.platform != "linux", reason="affinity")
def test_this_process_pinned_to_one_cpu_uses_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert physical_cores() == 1
