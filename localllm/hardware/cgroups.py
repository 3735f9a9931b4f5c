"""Control groups: the CPU quota and memory limits that Linux, a container or a job scheduler put on this process.

Both versions, also mixed, and as seen from inside a container, where only the own group may be visible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from localllm.hardware.sources import parse_int, read_int, read_text

UNLIMITED_BYTES = 1 << 60
"""Version 1 writes "no limit" as the largest multiple of the page size, near 2^63."""

RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
"""Lines of memory.stat that the kernel takes back before it refuses memory. Active pages of files are among them, as in MemAvailable:
weights that were mapped before are active, and a second load must not find the group full of them."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One limit on memory, and what is left under it now (None when the group does not say what it uses)."""

    limit_bytes: int
    room_bytes: int | None
    origin: str


def cpu_quota(root: Path) -> float | None:
    """The tightest CPU quota, in CPUs, of the control groups (v1 or v2) that this process is in; None without one."""
    quotas = [_quota(*(read_text(group / "cpu.max").split() or ["max", "0"])[:2]) for group, _ in _groups(root, "")]
    for group, _ in _groups(root, "cpu"):
        quotas.append(_quota(read_text(group / "cpu.cfs_quota_us"), read_text(group / "cpu.cfs_period_us")))
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limits(root: Path) -> list[MemoryLimit]:
    """Every memory limit on this process, its own group's first; limits of parents hold, too."""
    limits: list[MemoryLimit] = []
    for group, name in _groups(root, ""):
        for file in ("memory.max", "memory.high"):
            limits += _limit(group / file, group / "memory.current", "", name)
    for group, name in _groups(root, "memory"):
        limits += _limit(group / "memory.limit_in_bytes", group / "memory.usage_in_bytes", "total_", name)
    return limits


def _limit(file: Path, usage: Path, prefix: str, group: str) -> list[MemoryLimit]:
    limit = read_int(file)
    if limit is None or not 0 <= limit < UNLIMITED_BYTES:
        return []
    used = read_int(usage)
    stat = _stat(file.parent)
    cache = sum(stat.get(prefix + name, 0) for name in RECLAIMABLE)
    room = None if used is None else max(0, limit - max(0, used - cache))
    return [MemoryLimit(limit, room, f"{file.name} of {group}")]


def _stat(group: Path) -> dict[str, int]:
    pairs = (line.partition(" ") for line in read_text(group / "memory.stat").splitlines())
    return {name: value for name, _, text in pairs if (value := parse_int(text)) is not None}


def _quota(quota: str, period: str) -> float | None:
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) > 0 else None


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, str]]:
    """Folders and names of the groups that this process is in, its own first, then the parents: any may hold the limit.

    `controller` is a v1 controller such as `memory`; empty means v2. A group that is not visible from here is passed over later,
    since its files cannot be read.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        mine = controller in controllers.split(",") if controller else number == "0" and not controllers
        if colon and mine:
            for mount, top in _mounts(root, controller, controllers):
                relative = PurePosixPath(*(part for part in _below(path, top).split("/") if part not in ("", "..")))
                for group in (relative, *relative.parents):
                    # The true top has no limits; one that has them is the top of a container.
                    yield mount / group, f"the control group {group}" if group.parts else "the container"


def _mounts(root: Path, controller: str, controllers: str) -> list[tuple[Path, str]]:
    """Where the hierarchy of `controller` is mounted, and which group of it lies there (a container may be shown only its own)."""
    found: list[tuple[Path, str]] = []
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        fields, _, kind = line.partition(" - ")
        match fields.split(), kind.split():
            case [_, _, _, top, point, *_], ["cgroup2", *_] if not controller:
                found.append((root / point.lstrip("/"), top))
            case [_, _, _, top, point, *_], ["cgroup", _, options, *_] if controller and controller in options.split(","):
                found.append((root / point.lstrip("/"), top))
            case _:
                pass
    if found:
        return found
    usual = root / "sys/fs/cgroup"
    return [(usual / name, "/") for name in sorted({controller, controllers})] if controller else [(usual, "/")]


def _below(path: str, top: str) -> str:
    """`path` seen from a mount that shows the group `top`: inside a container of v1 both hold the container's name."""
    top = top.rstrip("/")
    return path[len(top) :] if path == top or path.startswith(f"{top}/") else path
