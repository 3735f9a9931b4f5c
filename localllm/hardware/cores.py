"""How many threads to decode on: physical cores, the fast kind, within affinity and CPU quota."""

from __future__ import annotations

import struct
from collections.abc import Set
from pathlib import Path

from localllm.hardware.cgroups import cpu_quota
from localllm.hardware.sources import Sources, parse_int, read_int, read_text, sysctl, this_machine

FAST = 0.6
"""Cores at least this fast, next to the fastest, take part. Little ARM cores are near 0.4, compact x86 cores near 0.65."""


def physical_cores(sources: Sources | None = None) -> int:
    """Cores worth a thread each: physical ones, fast ones where the CPU has two kinds, within affinity and CPU quota; at least 1.

    Two hyperthreads of a core share the units that matrix products fill, and the slowest core holds up all the others.
    """
    sources = sources or this_machine()
    match sources.os:
        case "linux":
            return linux_cores(sources.root, sources.affinity)
        case "darwin":
            values = sysctl(sources.run)
            fast = parse_int(values.get("hw.perflevel0.physicalcpu", ""))
            return fast or parse_int(values.get("hw.physicalcpu", "")) or sources.logical_cores
        case "windows" if sources.windows is not None:
            return windows_cores(sources.windows.cores, sources.windows.affinity_mask) or sources.logical_cores
        case _:
            return sources.logical_cores


def linux_cores(root: Path, affinity: Set[int]) -> int:
    """The same, from the `/sys` and `/proc` under `root` and the CPU numbers this process may run on."""
    # A CPU whose siblings are not told counts as a core of its own.
    cores = len({_core(root, cpu) or str(cpu) for cpu in fast_cpus(root, affinity)})
    quota = cpu_quota(root)
    return max(1, min(cores, int(quota)) if quota is not None else cores)


def fast_cpus(root: Path, affinity: Set[int]) -> set[int]:
    """Those of `affinity` that are of the fast kind; all of them where there is one kind, or it is not told."""
    if fast := parse_cpu_list(read_text(root / "sys/devices/cpu_core/cpus")) & affinity:  # Intel's hybrids
        return fast
    speeds = {cpu: _speed(root, cpu) for cpu in affinity}
    top = max(speeds.values(), default=0)
    return {cpu for cpu, speed in speeds.items() if speed >= FAST * top}


def windows_cores(records: bytes, affinity_mask: int) -> int:
    """Cores of the highest efficiency class (on Windows: the fast ones) that the mask allows; 0 when the records say nothing.

    `records` is what GetLogicalProcessorInformationEx(RelationProcessorCore) wrote. The mask speaks of group 0 alone, so cores
    of other groups (more than 64 CPUs) count whenever the process may leave its group; that is the default since Windows 11.
    """
    classes: list[int] = []
    at = 0
    while at + 32 <= len(records):
        relation, size = struct.unpack_from("<II", records, at)
        efficiency, groups = records[at + 9], struct.unpack_from("<H", records, at + 30)[0]
        masks = [struct.unpack_from("<QH", records, at + 32 + 16 * i) for i in range(groups) if at + 48 + 16 * i <= len(records)]
        if relation == 0 and any(group or not affinity_mask or mask & affinity_mask for mask, group in masks):
            classes.append(efficiency)
        at += max(size, 32)
    return classes.count(max(classes)) if classes else 0


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's list format, `0-3,8`, as CPU numbers."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _core(root: Path, cpu: int) -> str:
    """A name shared by the hyperthreads of one core, empty when the kernel does not tell."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    if siblings := read_text(topology / "thread_siblings_list") or read_text(topology / "core_cpus_list"):
        return siblings
    package, core = read_text(topology / "physical_package_id"), read_text(topology / "core_id")
    return f"package {package} core {core}" if core else ""


def _speed(root: Path, cpu: int) -> int:
    """A figure to compare CPUs of one machine by, 0 when unknown: the scheduler's capacity, else the highest clock."""
    folder = root / f"sys/devices/system/cpu/cpu{cpu}"
    return read_int(folder / "cpu_capacity") or read_int(folder / "cpufreq/cpuinfo_max_freq") or 0
