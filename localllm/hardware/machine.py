"""Everything about this machine that a plan depends on, in one value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localllm.hardware import bandwidth
from localllm.hardware.cgroups import cpu_quota
from localllm.hardware.cores import physical_cores
from localllm.hardware.cpu import cpu_features, cpu_name, last_level_cache_bytes
from localllm.hardware.devices import Device, find_devices
from localllm.hardware.drm import drm_cards
from localllm.hardware.memory import Memory, read_memory
from localllm.hardware.nvidia import nvidia_cards
from localllm.hardware.power import on_battery
from localllm.hardware.sources import Sources, parse_int, read_text, sysctl, this_machine

Measure = Literal["never", "missing", "always"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine at one moment. None is unknown."""

    os: str
    """linux, darwin, windows."""
    arch: str
    cpu_name: str
    physical_cores: int
    """Cores that decoding should use: fast ones, each once, within affinity and CPU quota."""
    logical_cores: int
    """CPUs of the whole machine, hyperthreads included."""
    cpu_features: tuple[str, ...]
    ram: Memory
    devices: tuple[Device, ...]
    """What llama.cpp can put layers on, in its order; empty when it was not asked."""
    on_battery: bool | None
    bandwidth_bytes_per_s: float | None
    """Measured rate at which the cores read RAM."""
    wsl: bool
    cpu_quota: float | None = None
    """CPUs that a control group grants, where it limits them."""
    warnings: tuple[str, ...] = ()


def detect(
    probe: Iterable[Mapping[str, Any]] | None = None,
    *,
    sources: Sources | None = None,
    state: Path | None = None,
    measure: Measure = "never",
) -> Hardware:
    """This machine, or the one that `sources` recorded. Takes well under a second, unless it measures (about another half).

    `probe` is what llama.cpp reported of its devices in a child: dicts with `name`, `description`, `kind` (gpu, igpu, …),
    `total_bytes`, `free_bytes` and, where known, `device_id` (PCI). `state` is the directory that keeps the measured
    bandwidth; without it, nothing is looked up or kept.
    """
    sources = sources or this_machine()
    ram, warnings = read_memory(sources)
    devices, said = _devices(probe, ram, sources)
    cores, name = physical_cores(sources), cpu_name(sources)
    return Hardware(
        os=sources.os,
        arch=sources.arch,
        cpu_name=name,
        physical_cores=cores,
        logical_cores=sources.logical_cores,
        cpu_features=cpu_features(sources),
        ram=ram,
        devices=devices,
        on_battery=on_battery(sources),
        bandwidth_bytes_per_s=_bandwidth(sources, state, bandwidth.key(name, cores), cores, ram, measure),
        wsl=is_wsl(sources),
        cpu_quota=cpu_quota(sources.root) if sources.os == "linux" else None,
        warnings=(*warnings, *said),
    )


def is_wsl(sources: Sources) -> bool:
    """Whether this Linux runs under Windows."""
    return sources.os == "linux" and "microsoft" in read_text(sources.root / "proc/sys/kernel/osrelease").lower()


def _devices(probe: Iterable[Mapping[str, Any]] | None, ram: Memory, sources: Sources) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    if probe is None:
        return (), ()
    cards, said = nvidia_cards(sources.nvml())
    warnings = list(said)
    wired = 0
    if sources.os == "linux":
        more, said = drm_cards(sources.root, ram.available_bytes)
        cards += more
        warnings += said
    elif sources.os == "darwin":
        wired = (parse_int(sysctl(sources.run).get("iogpu.wired_limit_mb", "")) or 0) << 20
    devices, said = find_devices(probe, cards, ram, arch=sources.arch, wired_limit_bytes=wired, env=sources.env)
    warnings += said
    if wired and ram.total_bytes and wired > ram.total_bytes:
        warnings.append(f"iogpu.wired_limit_mb allows the GPU {wired >> 30} GiB, more than there is: the system may freeze")
    if devices and is_wsl(sources):
        warnings.append(
            "under WSL the Windows driver moves what does not fit on the card to RAM: slow, where Linux would say out of memory"
        )
    return devices, tuple(warnings)


def _bandwidth(sources: Sources, state: Path | None, key: str, cores: int, ram: Memory, measure: Measure) -> float | None:
    file = state / bandwidth.FILE if state is not None else None
    known = bandwidth.recall(file, key) if file is not None and measure != "always" else None
    if known is not None or measure == "never":
        return known.bytes_per_s if known is not None else None
    try:
        rate = bandwidth.measure(cores, bandwidth.array_bytes(last_level_cache_bytes(sources), ram.available_bytes))
    except MemoryError:
        return None
    if file is not None:
        with contextlib.suppress(OSError):  # a full or read-only disk costs a measurement each time, no more
            bandwidth.remember(file, key, rate)
    return rate
