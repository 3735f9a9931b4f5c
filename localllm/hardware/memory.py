"""RAM: how much there is, how much a new model may take now, and what limits it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from localllm.hardware.cgroups import memory_limits
from localllm.hardware.sources import Sources, parse_int, read_text, sysctl

ABSURD_BYTES = 1 << 50
"""A reading above 1 PiB is a driver's mistake."""


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM in bytes; None is unknown, never zero."""

    total_bytes: int | None
    """Physical memory that the system manages."""
    available_bytes: int | None
    """What can be had now without swapping, within every limit; caches that the system gives back count as available."""
    limit_bytes: int | None = None
    """The most this process may ever have, where that is less than the total."""
    limit_origin: str = ""
    """Who set the limit."""


def read_memory(sources: Sources) -> tuple[Memory, tuple[str, ...]]:
    """The machine's memory and warnings about readings that make no sense."""
    match sources.os:
        case "linux":
            return _linux(sources.root)
        case "darwin":
            return _mac(parse_int(sysctl(sources.run).get("hw.memsize", "")), sources.run(["/usr/bin/vm_stat"]))
        case "windows" if sources.windows is not None:
            return _windows(sources.windows.total_bytes, sources.windows.available_bytes, sources.windows.commit_available_bytes)
        case _:
            return Memory(None, None), ()


def plausible(what: str, total: int | None, free: int | None) -> tuple[int | None, int | None, tuple[str, ...]]:
    """`total` and `free` as far as they can be true, and warnings about the rest.

    Zero of zero is how drivers say "unknown"; more free than there is, a negative or an absurd number means that one of the
    two is wrong, and free is the one to distrust unless the total is impossible in itself.
    """
    if total is not None and not 0 <= total <= ABSURD_BYTES:
        return None, None, (f"{what} reports a size of {total:,} bytes, which cannot be: its memory is unknown",)
    if not total:
        return None, None, ()
    if free is not None and not 0 <= free <= total:
        return total, None, (f"{what} reports {free:,} bytes free of {total:,}, which cannot be: its free memory is unknown",)
    return total, free, ()


def _linux(root: Path) -> tuple[Memory, tuple[str, ...]]:
    values = _meminfo(read_text(root / "proc/meminfo"))
    available = values.get("MemAvailable")
    if available is None and "MemFree" in values:  # before Linux 3.14, and some containers
        available = sum(values.get(name, 0) for name in ("MemFree", "Buffers", "Cached", "SReclaimable")) - values.get("Shmem", 0)
    total, available, warnings = plausible("/proc/meminfo", values.get("MemTotal"), available)
    limits = [limit for limit in memory_limits(root) if total is None or limit.limit_bytes < total]
    for limit in limits:
        room = limit.limit_bytes if limit.room_bytes is None else limit.room_bytes
        # Under an unknown amount of RAM the room of a group is no promise: available stays unknown.
        available = None if available is None else min(available, room)
    tightest = min(limits, key=lambda limit: limit.limit_bytes, default=None)
    if tightest is None:
        return Memory(total, available), warnings
    return Memory(total, available, tightest.limit_bytes, tightest.origin), warnings


def _mac(total: int | None, vm_stat: str) -> tuple[Memory, tuple[str, ...]]:
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = {name: int(count) for name, count in re.findall(r"^Pages ([a-z ]+):\s+(\d+)\.", vm_stat, re.MULTILINE)}
    available = None
    if page and "free" in pages:
        # vm_stat counts speculative pages (read ahead, clean) apart from the free ones.
        available = int(page[1]) * sum(pages.get(name, 0) for name in ("free", "speculative", "inactive", "purgeable"))
        # Purgeable pages may be inactive ones, too: the sum can exceed the truth on an idle machine.
        available = min(available, total) if total else available
    total, available, warnings = plausible("macOS", total, available)
    return Memory(total, available), warnings


def _windows(total: int | None, available: int | None, commit: int | None) -> tuple[Memory, tuple[str, ...]]:
    total, available, warnings = plausible("Windows", total, available)
    if available is not None and commit is not None and commit < available:
        short = f"Windows will promise only {commit / (1 << 30):.1f} GiB more to all programs: its page file is small or full"
        return Memory(total, commit), (*warnings, short)
    return Memory(total, available), warnings


def _meminfo(text: str) -> Mapping[str, int]:
    """/proc/meminfo in bytes."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
