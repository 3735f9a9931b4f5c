"""The disks that models, chats and states lie on: how much is free, of what kind they are, and whether they can be written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localllm.doctor.finding import Finding
from localllm.doctor.system import System
from localllm.library.scan import PART, entries, remains

GIB = 1 << 30
LOW_BYTES = 5 * GIB
"""A 7B model in Q4_K_M takes this."""
FULL_BYTES = GIB // 2
NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "webdav", "ceph", "lustre", "afs", "9p", "drvfs"})
NETWORK_FUSE = frozenset({"fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.davfs", "fuse.glusterfs", "fuse.gcsfuse"})
SMALL_FILES = frozenset({"vfat", "msdos", "fat", "fat32"})
"""No file of 4 GiB or more fits."""


@dataclass(frozen=True, slots=True)
class Mount:
    point: Path
    type: str


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system under one of our directories."""

    use: str
    """models, chats and settings, cache, state."""
    path: Path
    """The directory; it need not exist yet."""
    total_bytes: int
    free_bytes: int
    type: str
    """As the system names it: ext4, apfs, NTFS; empty where unknown."""
    writable: bool

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def mounts() -> list[Mount]:
    """What is mounted on this machine."""
    import psutil

    try:
        return [Mount(Path(each.mountpoint), each.fstype) for each in psutil.disk_partitions(all=True)]
    except (OSError, psutil.Error):
        return []


def read_disks(
    system: System, models: Path, mounted: Sequence[Mount], usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage
) -> list[Disk]:
    """The disks of our directories, the models' first; those that share one with an earlier are left out.

    `usage` gives (total, used, free) of an existing path. Writing is tried with a file that never has a name.
    """
    ours = system.directories
    out: list[Disk] = []
    for use, path in (("models", models), ("settings", ours.config), ("data", ours.data), ("cache", ours.cache), ("state", ours.state)):
        there = existing(path)
        try:
            total, _, free = usage(there)
        except OSError:
            total = free = 0
        disk = Disk(use, path, total, free, type_of(there, mounted), can_write(there))
        same = (disk.total_bytes, disk.free_bytes, disk.type, disk.writable)
        if use == "models" or all((other.total_bytes, other.free_bytes, other.type, other.writable) != same for other in out):
            out.append(disk)
    return out


def existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there."""
    return next((each for each in (path, *path.parents) if each.exists()), path)


def can_write(path: Path) -> bool:
    """Whether a file can be made in the directory `path`."""
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def type_of(path: Path, mounted: Iterable[Mount]) -> str:
    """The type of the file system that `path` is on; empty where no mount point is above it."""
    full = path.resolve()
    over = [mount for mount in mounted if full == mount.point or mount.point in full.parents]
    # The last of equals: it is mounted over the others.
    return max(enumerate(over), key=lambda each: (len(each[1].point.parts), each[0]))[1].type if over else ""


def partial_downloads(models: Path) -> tuple[int, int]:
    """(number, bytes on disk) of downloads that were begun and are not done."""
    left = [each for each in remains(entries(models)) if any(file.path.name.endswith(PART) for file in each.files)]
    return len(left), sum(each.size_bytes for each in left)


def judge_disks(disks: Sequence[Disk]) -> Iterator[Finding]:
    for disk in disks:
        data = disk.to_json()
        free = f"{disk.free_bytes / GIB:.1f} GiB"
        if not disk.writable:
            title = f"the {disk.use} folder cannot be written"
            fix = f"correct the permissions of {existing(disk.path)}, or set LOCALLLM_HOME to a folder of your own"
            yield Finding(f"{disk.use}-not-writable", "problem", "disk", title, str(disk.path), fix, data)
        elif disk.total_bytes and disk.free_bytes < (LOW_BYTES if disk.use == "models" else FULL_BYTES):
            full = disk.free_bytes < FULL_BYTES
            title = f"only {free} are free for {disk.use}"
            fix = "localllm df shows what models take, localllm prune removes what nothing needs"
            yield Finding("disk-full" if full else "disk-low", "problem" if full else "warning", "disk", title, str(disk.path), fix, data)
        if disk.use == "models" and disk.type.lower() in NETWORK | NETWORK_FUSE:
            why = f"{disk.path} is on {disk.type}: a model is read as fast as the network, at every start."
            fix = "keep models on a local disk: set LOCALLLM_HOME"
            yield Finding("models-on-network", "warning", "disk", "models lie on a network file system", why, fix, data)
        if disk.use == "models" and disk.type.lower() in SMALL_FILES:
            why = f"{disk.path} is on {disk.type}, which holds no file of 4 GiB or more."
            yield Finding(
                "models-on-fat", "warning", "disk", "large models do not fit this file system", why, "use exFAT, NTFS or ext4", data
            )


def judge_partials(models: Path) -> Iterator[Finding]:
    number, size = partial_downloads(models)
    if number:
        title = f"{number} unfinished download{'' if number == 1 else 's'}, {size / GIB:.1f} GiB"
        why = "One may be running now; the others go on where they stopped when they are pulled again."
        data = {"count": number, "bytes": size, "path": str(models)}
        yield Finding("partial-downloads", "info", "disk", title, why, "localllm pull NAME goes on, localllm prune removes them", data)
