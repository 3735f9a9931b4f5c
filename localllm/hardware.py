"""What this machine lets this process use. For now: how many cores to decode on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Set
from pathlib import Path, PurePosixPath


def physical_cores() -> int:
    """Cores worth a thread each: physical ones, fast ones where the CPU has two kinds, within affinity and CPU quota; at least 1.

    Two hyperthreads of a core share the units that matrix products fill, and the slowest core holds up all the others.
    """
    if sys.platform == "linux":
        return linux_cores(Path("/"), os.sched_getaffinity(0))
    if sys.platform == "darwin":
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or 1
    return _psutil_cores()


def linux_cores(root: Path, affinity: Set[int]) -> int:
    """The same, from the `/sys` and `/proc` under `root` and the CPU numbers this process may run on."""
    fast = parse_cpu_list(_read(root / "sys/devices/cpu_core/cpus")) & affinity or affinity
    siblings = {cpu: _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in fast}
    # A CPU whose siblings are not told counts as a core of its own.
    cores = len({text.strip() or str(cpu) for cpu, text in siblings.items()})
    quota = cpu_quota(root)
    return max(1, min(cores, int(quota)) if quota is not None else cores)


def cpu_quota(root: Path) -> float | None:
    """The tightest CPU quota, in CPUs, of the control groups (v1 or v2) that this process is in; None without one."""
    quotas: list[float] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            for group in _groups(root / "sys/fs/cgroup", path):
                quotas += _quota(*(_read(group / "cpu.max").split() or ["max", "0"]))
        elif "cpu" in controllers.split(","):
            for mount in {"cpu", controllers}:
                for group in _groups(root / "sys/fs/cgroup" / mount, path):
                    quotas += _quota(_read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip())
    return min(quotas, default=None)


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's list format, `0-3,8`, as CPU numbers."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """The group at `path` and all above it: any may hold the limit, and inside a container only the top may be visible."""
    relative = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
    for group in (relative, *relative.parents):
        yield mount / group


def _quota(quota: str, period: str) -> list[float]:
    return [int(quota) / int(period)] if quota.isdigit() and period.isdigit() and int(period) > 0 else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _sysctl(name: str) -> int:
    """An integer of macOS' sysctl, 0 where it is unknown."""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def _psutil_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1
