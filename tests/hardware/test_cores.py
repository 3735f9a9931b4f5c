"""How many threads: recorded topologies, affinities and quotas."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.hardware import physical_cores
from localllm.hardware.cores import linux_cores, parse_cpu_list, windows_cores
from localllm.hardware.windows import WindowsReadings
from tests.hardware.recorded import core_record, linux, mac, siblings, tree

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


@pytest.mark.parametrize("quota, cores", [("50000", 1), ("250000", 2), ("399999", 3), ("9900000", 4), ("max", 4)])
def test_a_quota_is_rounded_down_to_at_least_one(tmp_path: Path, quota: str, cores: int) -> None:
    files = {**FOUR_CORES_EIGHT_THREADS, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}
    assert linux_cores(tree(tmp_path, files), set(range(8))) == cores


def capacities(*values: int, name: str = "cpu_capacity") -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/{name}": f"{value}\n" for cpu, value in enumerate(values)}


@pytest.mark.parametrize(
    "files, cores",
    [
        pytest.param(capacities(*[407] * 4, *[1024] * 4), 4, id="RK3588: the little cores stay out"),
        pytest.param(capacities(*[250] * 2, *[760] * 5, 1024), 6, id="a prime core does not push the middle ones out"),
        pytest.param(capacities(*[5100000] * 4, *[3300000] * 4, name="cpufreq/cpuinfo_max_freq"), 8, id="Zen 5c cores take part"),
        pytest.param(capacities(*[1024] * 8), 8, id="all alike"),
    ],
)
def test_slow_cores_stay_out(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert linux_cores(tree(tmp_path, files), set(range(8))) == cores


def test_only_slow_cores_allowed_are_all_used(tmp_path: Path) -> None:
    assert linux_cores(tree(tmp_path, capacities(*[407] * 4, *[1024] * 4)), {0, 1}) == 2


def test_cores_by_package_where_siblings_are_not_told(tmp_path: Path) -> None:
    # two sockets with two cores each; core numbers start anew on each socket
    topology = "sys/devices/system/cpu/cpu{}/topology/{}"
    files = {topology.format(cpu, "core_id"): f"{cpu % 2}\n" for cpu in range(8)}
    files |= {topology.format(cpu, "physical_package_id"): f"{cpu // 4}\n" for cpu in range(8)}
    assert linux_cores(tree(tmp_path, files), set(range(8))) == 4


def test_a_mac_counts_its_performance_cores(tmp_path: Path) -> None:
    assert physical_cores(mac(tmp_path)) == 12
    assert physical_cores(mac(tmp_path, sysctl="hw.memsize: 17179869184\nhw.physicalcpu: 6\n")) == 6, "an Intel Mac"
    assert physical_cores(mac(tmp_path, sysctl="")) == 16, "no sysctl: what Python knows"


# i7-1260P on Windows: four P-cores with two threads each (class 1), eight E-cores (class 0)
I7_1260P = b"".join([core_record(0b11 << 2 * i, efficiency=1) for i in range(4)] + [core_record(1 << 8 + i) for i in range(8)])


@pytest.mark.parametrize(
    "records, mask, cores",
    [
        pytest.param(I7_1260P, 0xFFFF, 4, id="hybrid"),
        pytest.param(I7_1260P, 0, 4, id="mask unknown"),
        pytest.param(I7_1260P, 0b1111, 2, id="pinned to two P-cores"),
        pytest.param(I7_1260P, 0xFF00, 8, id="pinned to the E-cores"),
        pytest.param(b"".join(core_record(0b11 << 2 * i) for i in range(8)), 0xFFFF, 8, id="eight cores alike"),
        pytest.param(core_record(0b11) + core_record(0b11, group=1), 0b11, 2, id="two processor groups"),
        pytest.param(core_record(0b11) + core_record(0b11, relation=3), 0b11, 1, id="another relation"),
        pytest.param(b"", 0xFFFF, 0, id="nothing"),
        pytest.param(I7_1260P[:-20], 0xFFFF, 4, id="cut short"),
        pytest.param(bytes(100), 0xFFFF, 0, id="zeros"),
    ],
)
def test_windows_cores(records: bytes, mask: int, cores: int) -> None:
    assert windows_cores(records, mask) == cores


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_windows_records_never_crash_or_hang(records: bytes, mask: int) -> None:
    assert windows_cores(records, mask) >= 0


def test_windows_uses_its_records(tmp_path: Path) -> None:
    windows = WindowsReadings(cores=I7_1260P, affinity_mask=0xFFFF)
    assert physical_cores(linux(tmp_path, {}, os="windows", windows=windows, cpus=16)) == 4
    assert physical_cores(linux(tmp_path, {}, os="windows", windows=WindowsReadings(), cpus=16)) == 16


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
